"""Ten thousand wrong specs and command lines: none may end in a traceback, hang, or be refused in other than one line.

    python -m benchmarks.faults.specs --count 10000 --seed 7 --out benchmarks/results/faults/specs.json

Mutations of valid specs (benchmarks/faults/mutations.py) are checked in this process by what both commands do before
torch is imported; a share of them and all that is no regular file go through the real commands, each with a time limit.
Every key of maximal specs is misspelt in every way that `typos` knows. Exit code 0 if nothing was found, else 1.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.mutations import (
    key_places,
    maximal_specs,
    mutant,
    renamed,
    small_spec,
    typos,
    valid_specs,
    written,
)
from benchmarks.faults.runs import Row, write_result
from scaling.errors import UserError
from scaling.spec import load_spec, parse_spec
from scaling.spec.__main__ import validate
from scaling.spec.document import document_of
from scaling.train import resolve

LIMIT_S, COMMAND_LIMIT_S = 5.0, 30.0
"""What takes longer counts as hung: a spec in this process, and a command, whose start is most of its time."""
LINE = 200
"""Characters that a line of a message should keep to. Longer ones are counted, and fail at LONGEST_LINE."""
LONGEST_LINE = 500
MEMORY_BYTES = 2 * 2**30
"""Address space of a command: one that reads /dev/zero to its end is stopped by it."""
ROOT = Path(__file__).resolve().parent.parent.parent
CANARY = "CANARY-in-a-url"

_MUST = re.compile(r" must .*\bbut .*(?:; .+|\?$)")
_TAIL = "and more problems; correct these first"


class Hung(BaseException):
    """Raised by the alarm; nothing below catches it."""


class Findings:
    """What has been seen so far."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = {}
        self.failures: list[dict[str, Any]] = []
        self.lines = self.long_lines = self.longest_line = 0
        self.slowest_s = 0.0

    def count(self, name: str, outcome: str, seconds: float) -> None:
        self.outcomes.setdefault(name, Counter())[outcome] += 1
        self.slowest_s = max(self.slowest_s, seconds)

    def fail(self, name: str, case: str, what: str) -> None:
        self.failures.append({"mutation": name, "case": case, "what": what[-2000:]})

    def message(self, name: str, case: str, text: str) -> None:
        """Check the form of a refusal."""
        for line in text.splitlines() or [""]:
            self.lines += 1
            self.long_lines += len(line) > LINE
            self.longest_line = max(self.longest_line, len(line))
            if len(line) > LONGEST_LINE:
                self.fail(name, case, f"a line of {len(line)} characters: {line}")
            elif line != _TAIL and not _MUST.search(line):
                self.fail(name, case, f"not in the house form: {line}")
            elif not line.isprintable() or CANARY in line:
                self.fail(name, case, f"shows what it must not: {line!a}")


def mutants(findings: Findings, seed: int, indices: Sequence[int]) -> list[int]:
    """Check these mutants in this process; returns those that were refused."""
    bases = valid_specs()
    refused: list[int] = []
    with tempfile.TemporaryDirectory() as folder, _working_in(folder):
        for index in indices:
            name, text, assignments = mutant(seed, index, bases)
            _write(text)
            if _check_here(findings, name, f"{seed}:{index}", assignments) == "refused":
                refused.append(index)
    return refused


def misspelt_keys(findings: Findings) -> None:
    """Each key of each maximal spec, with each of its typos: refused, with the right key in the message."""
    seen: set[tuple[str, str, str]] = set()
    for spec in maximal_specs():
        for path, key in key_places(spec):
            owner: Any = spec
            for part in path:
                owner = owner[part]
            for typo in typos(key):
                place = (".".join(map(str, path)) + str(owner.get("kind")), key, typo)
                if typo not in owner and place not in seen:
                    seen.add(place)
                    _check_typo(findings, renamed(spec, path, key, typo), key, typo)


def _check_typo(findings: Findings, spec: dict[str, Any], key: str, typo: str) -> None:
    name, case = "key misspelt, every one", f"{typo} for {key}"
    try:
        parse_spec(document_of("spec.json", written(spec).decode()))
        findings.fail(name, case, "accepted")
    except UserError as error:
        findings.count(name, "refused", 0.0)
        findings.message(name, case, str(error))
        lines = [line for line in str(error).splitlines() if f"{typo}`" in line]
        # Of a missing `kind` the message is: it must be set; did you mean it by that key?
        wanted = (f"did you mean `{key}`?", f"did you mean it by `{typo}`?" if key == "kind" else "-")
        if not any(line.endswith(wanted) for line in lines):
            findings.fail(name, case, f"no hint: {error}")


def _check_here(findings: Findings, name: str, case: str, assignments: list[str]) -> str:
    began, outcome = time.perf_counter(), "accepted"
    try:
        with alarm(LIMIT_S):
            validate("spec.json", assignments)
            resolve(load_spec("spec.json", assignments), 1, ["my_code"])
    except UserError as error:
        outcome = "refused"
        findings.message(name, case, str(error))
        if error.code != 2:
            findings.fail(name, case, f"code {error.code}: {error}")
    except Hung:
        outcome = "hung"
        findings.fail(name, case, f"took more than {LIMIT_S:g} s")
    except BaseException:
        outcome = "traceback"
        findings.fail(name, case, traceback.format_exc())
    findings.count(name, outcome, time.perf_counter() - began)
    return outcome


# ---------------------------------------------------------------- the real commands


def commands(findings: Findings, seed: int, indices: Sequence[int], refused: set[int], count: int) -> None:
    """Send `count` mutants through the real commands: every other one, if refused, by launch/train.py."""
    bases = valid_specs()
    with tempfile.TemporaryDirectory() as folder:
        for turn, index in enumerate(indices[:: max(1, len(indices) // max(1, count))][:count]):
            name, text, assignments = mutant(seed, index, bases)
            if any("\0" in assignment for assignment in assignments):
                continue  # no command line can hold one
            Path(folder, "spec.json").write_bytes(text)
            settings = [part for assignment in assignments for part in ("--set", assignment)]
            # A valid one would train; that it is accepted is seen by `validate`, which is content with any world size.
            kind = "train" if turn % 2 and index in refused else "validate"
            wanted = {2} if kind == "train" else {0, 2}
            run_command(findings, f"{kind}: {name}", f"{seed}:{index}", folder, kind, "spec.json", settings, wanted)


def files(findings: Findings) -> None:
    """What is no spec's file, through both commands."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # short: a socket's path has at most 107 bytes
        sources = special_files(Path(folder))
        for source, wanted in sources.items():
            for kind in ("validate", "train") if wanted == {2} else ("validate",):
                run_command(findings, f"{kind}: no spec's file", source[:40], folder, kind, source, [], wanted)
        for stdin in ("closed", "/dev/zero", "/dev/null"):
            run_command(findings, "standard input", stdin, folder, "validate", "-", [], {2}, stdin=stdin)


def special_files(folder: Path) -> dict[str, set[int]]:
    """Makes them in `folder`; each name with the exit codes that are right for it."""
    good = written(small_spec())
    (folder / "good.json").write_bytes(good)
    (folder / "link.json").symlink_to("good.json")
    (folder / "broken-link.json").symlink_to("nowhere.json")
    (folder / "loop.json").symlink_to("loop.json")
    os.mkfifo(folder / "pipe.json")
    (folder / "link-to-pipe.json").symlink_to("pipe.json")
    (folder / "link-to-zero.json").symlink_to("/dev/zero")
    (folder / "folder.json").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket.json"))
    with (folder / "zeros.json").open("wb") as file:
        file.truncate(100 * 2**20)
    (folder / "text.json").write_bytes(b'{"name": "' + b"x" * (100 * 2**20) + b'"}')
    (folder / "secret.json").write_bytes(good)
    (folder / "secret.json").chmod(0)
    no_permission = {0} if os.geteuid() == 0 else {2}  # root reads everything
    accepted = {"good.json": {0}, "link.json": {0}, "secret.json": no_permission}
    refused = ["broken-link.json", "loop.json", "pipe.json", "link-to-pipe.json", "link-to-zero.json", "folder.json"]
    refused += ["socket.json", "zeros.json", "text.json", "absent.json", "absent/spec.json", ""]
    refused += ["/dev/zero", "/dev/full", "/dev/null", "/proc/self/mem", "/proc/kmsg", "x" * 300, "x/" * 3000, "a\nb"]
    refused += [".", "/", "\udcff.json", "\x1b[31m.json"]
    return accepted | {name: {2} for name in refused}


def run_command(
    findings: Findings,
    name: str,
    case: str,
    folder: str,
    kind: str,
    source: str,
    settings: list[str],
    wanted: set[int],
    stdin: str = "/dev/null",
) -> None:
    """Run `validate` or `train` on `source` in `folder` and check how it ends."""
    head = ["-m", "scaling.spec", "validate", source] if kind == "validate" else [str(ROOT / "launch" / "train.py")]
    command = [sys.executable, *head, *([] if kind == "validate" else ["--spec", source]), *settings]
    command = ["prlimit", f"--as={MEMORY_BYTES}", *command]
    if stdin == "closed":
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    began = time.perf_counter()
    try:
        with open("/dev/null" if stdin == "closed" else stdin, "rb") as given:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=given,
                capture_output=True,
                timeout=COMMAND_LIMIT_S,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
    except subprocess.TimeoutExpired:
        findings.count(name, "hung", COMMAND_LIMIT_S)
        findings.fail(name, case, f"took more than {COMMAND_LIMIT_S:g} s")
        return
    said = done.stderr.decode("utf-8", "surrogateescape")
    findings.count(name, f"exit code {done.returncode}", time.perf_counter() - began)
    if done.returncode not in wanted or "Traceback" in said:
        findings.fail(name, case, f"exit code {done.returncode}: {said}")
    elif done.returncode == 2:
        findings.message(name, case, said)


# ---------------------------------------------------------------- the rest


def _write(text: bytes) -> None:
    """A new file each time: some file systems wait for the disk where one is written over."""
    Path("spec.json").unlink(missing_ok=True)
    Path("spec.json").write_bytes(text)


@contextlib.contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def report(findings: Findings, count: int, seed: int, seconds: float) -> dict[str, Any]:
    """The findings as plain JSON values, among them the row of the table."""
    totals = dict(sum(findings.outcomes.values(), Counter[str]()))
    trials = sum(totals.values())
    what = "wrong specs, special files and command lines: no traceback, no hang, each refused in one line or accepted"
    row = Row("S1", what, trials, trials - len(findings.failures))
    return {
        "seed": seed,
        "count": count,
        "seconds": round(seconds, 1),
        "rows": [asdict(row)],
        "totals": totals,
        "outcomes": {name: dict(outcomes) for name, outcomes in sorted(findings.outcomes.items())},
        "message_lines": findings.lines,
        f"message_lines_over_{LINE}_characters": findings.long_lines,
        "longest_message_line": findings.longest_line,
        "slowest_s": round(findings.slowest_s, 3),
        "failures": findings.failures,
    }


def main() -> int:
    options = _parser().parse_args()
    findings, began = Findings(), time.perf_counter()
    indices = range(options.count)
    refused = set(mutants(findings, options.seed, indices))
    misspelt_keys(findings)
    if options.commands:
        commands(findings, options.seed, indices, refused, options.commands)
        files(findings)
    result = report(findings, options.count, options.seed, time.perf_counter() - began)
    if options.out:
        write_result(options.out, "specs", result)
    print(json.dumps({**result, "failures": len(findings.failures)}, indent=1))
    for failure in findings.failures[:20]:
        print(json.dumps(failure), file=sys.stderr)
    return 1 if findings.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.specs", description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000, help="mutated specs (default 10000)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--commands", type=int, default=200, help="so many of them as commands, too (0: none)")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
