"""The tests that each show one fault of the bar, as rows of its table.

    python -m benchmarks.faults.suite --out FILE

Runs the tests that are marked with the fault's name, `@pytest.mark.fault("F6")`, "F6 control" for those that show that
the check would see what it is for.
"""

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.faults import runs
from benchmarks.faults.runs import Row

WHAT = {
    "R4": "the order of writes, syncs and renames of a commit",
    "R7": "thousand sequences of saves, crashes and deletions; retention: the last whole checkpoint is never lost",
    "R11": "failures of the background writer: told at the next step, nothing is left behind, training goes on",
    "F2": "SIGTERM or SIGINT to a rank, the launcher or all: saved at the same step everywhere, exit code 75, goes on; "
    "a second one ends it at once",
    "F3": "signals with data workers in the same process group: they ignore them",
    "F4": "stops with less time than a save takes: said, exit code 143, the last checkpoint stands",
    "F5": "data that goes bad under a run: ended at once, with file and place, or rank and cause",
    "F6": "ranks that hang (asleep, stopped, holding the GIL, missing a collective): ended with exit code 8, the rank, "
    "phase, step and collective named, all stacks dumped",
    "F6 control": "without the watchdog the run hangs; a slow run, a stopped or killed watchdog is no hang",
    "F7": "ranks that die: named with the cause, the others end",
    "F8": "launchers that are killed: no rank is left after 5 s",
    "F8 control": "without either guard the ranks go on",
    "F9": "failures that come back: the third restart without a newer checkpoint ends with exit code 7",
    "F10": "clocks that are set: neither a hang, nor one hidden",
    "S2": "misspelt keys, of each kind at each level: refused with the right one",
    "S3": "specs that are no file, or no JSON worth reading: refused at once",
    "S4": "specs that name code: nothing is imported without --allow-import",
    "S5": "checkpoints and weights of an attacker's make: refused in one line, no code runs, no other file is read",
    "S5 control": "the planted code does run where pickles are believed",
    "S6": "what lets code in is the command line's alone: neither a spec nor a checkpoint can set it",
    "S7": "secrets in environment, spec and errors: none in the folder of a run",
    "S8": "names and folders of runs that lead elsewhere: refused",
    "S9": "a run on one machine listens to nobody else; its folder is its owner's alone",
    "S9 control": "a process that listens is seen",
    "locks": "locks of killed compilations, on which every later start would hang: removed, those at work left",
}


def main() -> int:
    options = runs.parser("suite", __doc__).parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "junit.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "fault",
            "-n",
            "2",
            "--dist",
            "loadfile",
            "--junitxml",
            str(found),
        ]
        subprocess.run(command, cwd=runs.ROOT, check=False)  # the file says what failed
        rows = rows_of(ElementTree.parse(found).getroot())
    return runs.finish(options, "suite", rows, time.monotonic() - began)


def rows_of(root: ElementTree.Element) -> list[Row]:
    """A row for each fault, in the order of WHAT; skipped tests are no trials."""
    results: dict[str, list[list[str]]] = defaultdict(list)
    for case in root.iter("testcase"):
        problems = [
            f"{case.get('name')}: {found.get('message', '')}" for found in (*case.iter("failure"), *case.iter("error"))
        ]
        if case.find("skipped") is None:
            for fault in (p.get("value") for p in case.iter("property") if p.get("name") == "fault"):
                results[str(fault)].append(problems)
    if unknown := results.keys() - WHAT.keys():
        raise ValueError(f"no row is known for {sorted(unknown)}")
    rows = []
    for fault, what in WHAT.items():
        row = Row(fault, f"tests: {what}")
        for problems in results[fault]:
            row.trial(problems)
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
