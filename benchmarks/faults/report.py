"""Write docs/reliability.md from the results of the fault checks.

    python -m benchmarks.faults.report

Our own figures come from benchmarks/results/faults/*.json and nowhere else; a check without a result there is listed
as not run. The figures of the stock libraries were measured once, with tiny models on a CPU.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults.runs import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "faults"
PAGE = ROOT / "docs" / "reliability.md"
_UNKNOWN = "not measured"
FAULTS: tuple[tuple[str, str, str, str], ...] = (
    (
        "R1",
        "`kill -9` of a random rank, or of all, at a random moment",
        "one folder overwritten: 19/30 resume, some with mixed steps and no error; a folder per step: 30/30",
        "29/30 resume; `latest` is written before other ranks' shards are",
    ),
    ("R3", "a rank ends at each single moment of a save", _UNKNOWN, _UNKNOWN),
    (
        "R5",
        "a bit flipped, an end cut off or zeroed, a file deleted",
        "59/60 flips load silently (`torch.load` 199/200, safetensors 200/200)",
        "no checksums",
    ),
    (
        "R6",
        "no checkpoint is whole",
        "`AssertionError` after a 30-line traceback",
        "`latest` missing: trains from scratch in silence; empty: bare `AssertionError`",
    ),
    (
        "R8",
        "disk full within a save",
        "with several writer threads `save()` returns, publishes, and loading fails with `KeyError`",
        "one rank full: `latest` names the broken folder",
    ),
    ("R9", "run folder read-only, not a folder, gone in mid-run", _UNKNOWN, "`NotADirectoryError`, `Connection reset`"),
    ("R10", "several starts on one run folder", _UNKNOWN, 'both run ("ok"), one overwrites the other'),
    (
        "E1",
        "restored at another backend or number of ranks: every master and moment bit-equal",
        _UNKNOWN,
        "another number of ranks only after an offline conversion; no FSDP",
    ),
    (
        "E2",
        "5 + 5 steps against 10 on the same backend, dropout on",
        "8 of 15 losses differ unless RNG is saved by hand",
        "no RNG in its checkpoints",
    ),
    ("E3", "moves between backends and sizes, fp32", _UNKNOWN, _UNKNOWN),
    ("chain", "six backends and sizes in a row", _UNKNOWN, _UNKNOWN),
    ("E5", "the order of samples over sizes and resumes", _UNKNOWN, "no data position in its checkpoints"),
    ("E6", "batch, sequence, data or seed changed on resume", _UNKNOWN, _UNKNOWN),
    (
        "F1",
        "NaN on one rank",
        "FSDP2 has no check",
        "skipped in silence, and the step counter advances",
    ),
    ("F2", "SIGTERM", _UNKNOWN, _UNKNOWN),
    (
        "F6",
        "a rank hangs",
        "error after the process group's time-out (30 minutes), the rank not named",
        _UNKNOWN,
    ),
    ("F8", "`kill -9` of the launcher", "torchrun: both workers were still stepping 6 s later", _UNKNOWN),
    (
        "locks",
        "`kill -9` of a process that compiles an op of DeepSpeed's",
        "-",
        "every later run waits for ever for the lock that it left",
    ),
    ("S2", "a misspelt key in the configuration", "-", "unknown keys are accepted"),
    (
        "S5",
        "a checkpoint with code in it",
        "`.metadata` and plain entries run it; absolute paths are read",
        _UNKNOWN,
    ),
)
NOT_RUN = (
    "Power loss: a virtual machine cannot be cut from its disk here. What is checked instead is the order of writes, "
    "fsyncs and renames (tests/test_store.py).",
    "Network file systems (NFS, Lustre): none at hand. Locks fall back on the host and process id in run.lock there.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    results = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(page(results), encoding="utf-8")
    return 0


def page(results: Sequence[dict[str, Any]]) -> str:
    """The document, as Markdown."""
    lines = ["# What faults do to a run", ""]
    lines += [
        "Made by `python -m benchmarks.faults.report` from the files in benchmarks/results/faults; not edited by hand."
    ]
    lines += [
        "k/n: k of n trials went as they must. The columns of the stock libraries are measurements with tiny models"
    ]
    lines += ["on a CPU (torch 2.13's Distributed Checkpoint and FSDP2, DeepSpeed 0.19.8).", ""]
    lines += ["| | fault | stock DCP | stock DeepSpeed | here |", "|---|---|---|---|---|"]
    lines += [f"| {id_} | {fault} | {dcp} | {ds} | {_here(id_, results)} |" for id_, fault, dcp, ds in FAULTS]
    return (
        "\n".join([*lines, "", *_chaos_table(results), *_rows_table(results), *_commands(results), *_not_run()]) + "\n"
    )


def _here(id_: str, results: Sequence[dict[str, Any]]) -> str:
    if id_ == "R1":
        kills = [result for result in results if result["check"] == "chaos"]
        total, in_save = (sum(result[name] for result in kills) for name in ("kills", "kills_in_a_save"))
        failures = sum(result["failures"] for result in kills)
        told = f"{total} kills, {in_save} of them within a save: {failures} failures, every logged step bit-equal"
        return (told if not failures else f"{total} kills, {failures} failures") if kills else "not yet run"
    rows = [row for row in _all_rows(results) if row["id"].split()[0] == id_ and "control" not in row["id"]]
    trials, passed = (sum(row[name] for row in rows) for name in ("trials", "passed"))
    worst = max((row["worst"] for row in rows if row["worst"] is not None), default=None)
    return (
        f"{passed}/{trials}" + (f", at most {worst:.1e} off" if worst is not None else "") if trials else "not yet run"
    )


def _chaos_table(results: Sequence[dict[str, Any]]) -> list[str]:
    kills = [result for result in results if result["check"] == "chaos"]
    if not kills:
        return []
    head = ("backend", "ranks", "seed", "kills", "within a save", "in start-up", "of everything", "resumes")
    head += ("steps compared", "steps repeated", "failures")
    keys = (
        "backend",
        "ranks",
        "seed",
        "kills",
        "kills_in_a_save",
        "kills_in_startup",
        "kills_of_everything",
        "resumes",
    )
    keys += ("steps_compared", "steps_repeated", "failures")
    lines = ["## Kills", "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    return [*lines, *[f"| {' | '.join(str(result[key]) for key in keys)} |" for result in kills], ""]


def _rows_table(results: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["## All checks", "", "| | passed | of what | seed |", "|---|---:|---|---:|"]
    for row in _all_rows(results):
        worst = f"; at most {row['worst']:.1e} off" if row["worst"] is not None else ""
        note = f" ({row['note']})" if row["note"] else ""
        lines.append(f"| {row['id']} | {row['passed']}/{row['trials']} | {row['what']}{worst}{note} | {row['seed']} |")
    return [*lines, ""]


def _commands(results: Sequence[dict[str, Any]]) -> list[str]:
    if not results:
        return []
    versions = results[0]["environment"]["versions"]
    told = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed"))
    return ["## Commands", "", f"With {told}:", "", *[f"    {result['command']}" for result in results], ""]


def _not_run() -> list[str]:
    return ["## Not run", "", *[f"- {line}" for line in NOT_RUN]]


def _all_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "seed": result["seed"]} for result in results for row in result.get("rows", ())]


if __name__ == "__main__":
    sys.exit(main())
