"""Checkpoints that were damaged: is every damage noticed, and what does the run do?

    python -m benchmarks.faults.corruption --out FILE

Every damage is first looked for in the files alone, then a sample of them through the real command.
"""

import argparse
import random
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.faults import runs
from benchmarks.faults.runs import Row
from scaling.checkpoint.store import LATEST, MANIFEST, problems_of

SETTINGS = ("max_steps=100", "checkpoint.interval=4", "checkpoint.keep_last=null")
Damage = Callable[[Path, random.Random], str]
"""Damages a file; says how."""


def flip(file: Path, chance: random.Random) -> str:
    """One bit, anywhere."""
    data = bytearray(file.read_bytes())
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    file.write_bytes(data)
    return f"bit {bit} of byte {place}"


def truncate(file: Path, chance: random.Random) -> str:
    """An end that is missing."""
    size = chance.randrange(file.stat().st_size)
    with open(file, "rb+") as opened:
        opened.truncate(size)
    return f"cut to {size} bytes"


def zero_tail(file: Path, chance: random.Random) -> str:
    """An end of zeros, as a power loss leaves it."""
    data = bytearray(file.read_bytes())
    start = chance.randrange(len(data) - 1)
    data[start:-1] = bytes(len(data) - 1 - start)
    data[-1] ^= 0xFF  # what was zero already must not count as damage
    file.write_bytes(data)
    return f"zeros from byte {start}"


def delete(file: Path, _chance: random.Random) -> str:
    """A file that is gone."""
    file.unlink()
    return "deleted"


def noticed(work: Path, options: argparse.Namespace) -> list[Row]:
    """All damages, file by file."""
    folder = _trained(work)
    newest, chance = runs.checkpoints(folder).path(8), random.Random(options.seed)
    files = sorted(path.name for path in newest.iterdir())
    assert len(files) >= 20 and problems_of(newest) == [], files
    rows: list[Row] = []
    for damage, trials in ((flip, options.flips), (truncate, options.truncations), (zero_tail, 0), (delete, 0)):
        row = Row("R5", f"{damage.__name__.replace('_', ' ')}: damages of a checkpoint of {len(files)} files noticed")
        # A chosen number at random places, or once for each file.
        for name in chance.choices(files, k=trials) if trials else files:
            row.trial(_unnoticed(newest, name, damage, chance))
        rows.append(row)
    control = Row("R5 control", "copies without damage that are found whole")
    control.trial(problems_of(newest))
    return [*rows, control]


def fallen_back(work: Path, options: argparse.Namespace) -> list[Row]:
    """The real command after a sample of damages to its newest checkpoint."""
    row = Row("R5 command", "damages of the newest checkpoint: one warning that names the file, the one before is used")
    folder, chance = _trained(work), random.Random(options.seed)
    reference = runs.curve(_reference(work))
    whole, newest = work / "whole", runs.checkpoints(folder).path(8)
    files = sorted(path.name for path in newest.iterdir())
    data = [name for name in files if name.endswith(".distcp")]
    shutil.copytree(folder, whole)
    cases = [
        (damage, name) for damage in (flip, truncate, zero_tail, delete) for name in (chance.choice(data), MANIFEST)
    ]
    cases += [(flip, ".metadata"), (truncate, "state.json"), (delete, "spec.json"), (zero_tail, ".metadata")]
    for damage, name in cases:
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        what = damage(newest / name, chance)
        code, output = _go_on(folder, work)
        log = (folder / "train.log").read_text()[len((whole / "train.log").read_text()) :]
        told = [line for line in log.splitlines() if "WARNING: damaged checkpoint passed over" in line]
        problems = [] if code == 0 and runs.resumed_step(log) == 4 else [f"exit code {code}: {output[-1000:]}"]
        if len(told) != 1 or str(newest / name) not in told[0] or "Traceback" in output:
            problems.append(f"it told {told}")
        problems += runs.curve_problems(runs.read_lines(folder), reference)
        row.trial(f"{name} {what}: {problem}" for problem in problems)
    return [row]


def nothing_left(work: Path, options: argparse.Namespace) -> list[Row]:
    """All checkpoints damaged, or gone."""
    row = Row("R6", "runs without a whole checkpoint: exit code 5, one message, never a fresh start")
    folder, chance = _trained(work), random.Random(options.seed)
    whole = work / "whole"
    shutil.copytree(folder, whole)
    for case in ("damaged", "manifests gone", "folders gone", "emptied", "links"):
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        for path in map(runs.checkpoints(folder).path, (4, 8)):
            _ruin(path, case, chance)
        lines = len(runs.read_lines(folder))
        code, output = _go_on(folder, work)
        problems = [] if code == 5 and "Traceback" not in output else [f"exit code {code}: {output[-1500:]}"]
        if len(runs.read_lines(folder)) != lines:
            problems.append("it trained")
        row.trial(f"{case}: {problem}" for problem in problems)
    control = Row("R6 control", "the same run with its checkpoints goes on")
    shutil.rmtree(folder)
    shutil.copytree(whole, folder)
    (folder / "checkpoints" / LATEST).write_text("step-00000099\n")
    code, output = _go_on(folder, work)
    control.trial([] if code == 0 else [f"exit code {code}: {output[-1500:]}"])
    return [row, control]


CHECKS = {"noticed": noticed, "command": fallen_back, "nothing": nothing_left}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runs.parser("corruption", __doc__)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--truncations", type=int, default=50)
    return runs.run(CHECKS, parser.parse_args(arguments), "corruption")


def _trained(work: Path) -> Path:
    """A run with whole checkpoints of steps 4 and 8, of many small files each."""
    folder = work / "run"
    command = runs.training("single", 1, folder, SETTINGS, script=runs.FAULTY, arguments=["--stop-after", "8"])
    code, output = runs.train(command, work / "output", {"FAULT_SMALL_FILES": "100000"})
    assert code == 0 and runs.checkpoints(folder).steps() == [4, 8], output
    return folder


def _reference(work: Path) -> Path:
    command = runs.training("single", 1, work / "reference", SETTINGS, arguments=["--stop-after", "10"])
    code, output = runs.train(command, work / "output")
    assert code == 0, output
    return work / "reference"


def _go_on(folder: Path, work: Path) -> tuple[int, str]:
    command = runs.training("single", 1, folder, SETTINGS, arguments=["--stop-after", "10"])
    return runs.train(command, work / "output")


def _unnoticed(checkpoint: Path, name: str, damage: Damage, chance: random.Random) -> Iterator[str]:
    saved = (checkpoint / name).read_bytes()
    what = damage(checkpoint / name, chance)
    found = problems_of(checkpoint)
    if not found or not found[0].startswith(str(checkpoint / name)):
        yield f"{name}, {what}: {found}"
    (checkpoint / name).write_bytes(saved)


def _ruin(checkpoint: Path, case: str, chance: random.Random) -> None:
    if case == "damaged":
        flip(chance.choice(sorted(checkpoint.iterdir())), chance)
    elif case == "manifests gone":
        (checkpoint / MANIFEST).unlink()
    elif case == "folders gone":
        shutil.rmtree(checkpoint)
    elif case == "emptied":
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
    else:
        file = next(checkpoint.glob("*.distcp"))
        shutil.move(file, checkpoint.parent / f"{checkpoint.name}-{file.name}")
        file.symlink_to(f"../{checkpoint.name}-{file.name}")


if __name__ == "__main__":
    sys.exit(main())
