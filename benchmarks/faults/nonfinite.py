"""A loss that is NaN on one rank, at chosen places: is it noticed before the update, on all ranks?

python -m benchmarks.faults.nonfinite --out FILE
"""

import argparse
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Row

STEPS, BATCH, ACCUMULATION = 12, 8, 2
SETTINGS = (f"max_steps={STEPS}", 'schedule={"kind":"constant"}', "model.dropout=0.0", "checkpoint.interval=3")
EACH_STEP = ("checkpoint.interval=1", "checkpoint.keep_last=null")
BACKENDS = ("fsdp", "zero1", "zero2", "zero3")


def stop(work: Path, options: argparse.Namespace) -> list[Row]:
    """on_nonfinite stop: exit code 4, nothing updated, no checkpoint of it."""
    row = Row("F1 stop", "NaN of rank 1 alone: exit code 4 before the update, step, rank and first sample told")
    for backend, step, place in _cases(options):
        folder = work / f"{backend}-{step}-{place}"
        code, output = _train(folder, backend, step, place, ["on_nonfinite=stop"])
        problems = [] if code == 4 and f"at step {step} the loss of rank 1" in output else [f"{code}: {output[-1500:]}"]
        lines = runs.curve(folder)
        last = max(lines, default=0)
        problems += _told(lines, step) + ([] if last == step else [f"it went on to step {last}"])
        newest, damaged = runs.newest(folder)
        wanted = (step - 1) // 3 * 3 or None
        problems += damaged + ([] if newest == wanted else [f"the newest checkpoint is {newest}, not {wanted}"])
        # The same command without the fault goes on from there, and nothing shows.
        problems += _goes_on(folder, backend, work)
        row.trial(f"{backend}, step {step}, micro-step {place}: {problem}" for problem in problems)
    return [row]


def skip(work: Path, options: argparse.Namespace) -> list[Row]:
    """on_nonfinite skip: as if the update had not been."""
    row = Row("F1 skip", "NaN of rank 1 alone, skipped: state and losses as with an update that does not happen")
    control = Row("F1 control", "without the fault, step and checker find the curves to differ")
    for backend, step, place in _cases(options):
        folder = work / f"{backend}-{step}-{place}"
        code, output = _train(folder, backend, step, place, ["on_nonfinite=skip", *EACH_STEP])
        lines = runs.curve(folder)
        problems = [f"exit code {code}: {output[-1500:]}"] if code or len(lines) != STEPS else []
        problems = problems or _told(lines, step)
        if step > 1 and not problems:
            before, after = (runs.digests(runs.checkpoints(folder).path(number)) for number in (step - 1, step))
            problems += [f"{name} was changed by the step" for name in runs.differing(before, after)][:3]
        # Another rank, another micro-step: the same update that is not applied.
        other = work / f"{backend}-{step}-{place}-other"
        code, output = _train(other, backend, step, 1 - place, ["on_nonfinite=skip"], rank=0)
        problems += [f"exit code {code}: {output[-1500:]}"] if code else []
        problems += _same_but(step, lines, runs.curve(other)) or _same_state(folder, other)
        problems += _frozen_step(lines, runs.curve(_undisturbed(work, backend)), step)
        row.trial(f"{backend}, step {step}, micro-step {place}: {problem}" for problem in problems)
        if step < STEPS:
            differ = _same_but(step, lines, runs.curve(_undisturbed(work, backend)))
            control.trial([] if differ else [f"{backend}, step {step}: the curve is the undisturbed one"])
    return [row, control]


def rollback(work: Path, options: argparse.Namespace) -> list[Row]:
    """on_nonfinite rollback: as if the data did not have that batch."""
    row = Row("F1 rollback", "NaN of rank 1 alone, rolled back: from there on the batch is passed over, once")
    for backend, step, place in _cases(options):
        folder = work / f"{backend}-{step}-{place}"
        code, output = _train(folder, backend, step, place, ["on_nonfinite=rollback"])
        lines, plain = runs.read_lines(folder), runs.curve(_undisturbed(work, backend))
        problems = [f"exit code {code}: {output[-1500:]}"] if code else []
        problems += _told({line["step"]: line for line in lines if line["bad_ranks"]}, step)
        last = runs.curve(folder)
        for number in range(1, STEPS + 1):
            first = BATCH * (number - 1 + (number >= step))
            if last[number]["first_sample"] != first:
                problems.append(f"step {number} began at sample {last[number]['first_sample']}, not {first}")
            if number < step and last[number]["loss"] != plain[number]["loss"]:
                problems.append(f"step {number}, before the fault, is not as undisturbed")
        # A run that meets the same batch on the other rank passes it over too, and must come to the same.
        other = work / f"{backend}-{step}-{place}-other"
        _train(other, backend, step, 1 - place, ["on_nonfinite=rollback"], rank=0)
        problems += [f"{name} differs" for name in runs.differing(_final(folder), _final(other))][:3]
        row.trial(f"{backend}, step {step}, micro-step {place}: {problem}" for problem in problems)
    return [row]


CHECKS = {"stop": stop, "skip": skip, "rollback": rollback}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runs.parser("nonfinite", __doc__)
    parser.add_argument("--places", type=int, default=5, help="steps to fail at, for each backend and policy")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    return runs.run(CHECKS, parser.parse_args(arguments), "nonfinite")


def _cases(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(backend, step, micro-step) for each trial: the first step and the last are always among them."""
    chance = random.Random(options.seed)
    found: list[tuple[str, int, int]] = []
    for backend in options.backends.split(","):
        between = chance.sample(range(2, STEPS), max(0, options.places - 2))
        steps = [1, STEPS, *between][: options.places]
        found += [(backend, step, chance.randrange(ACCUMULATION)) for step in steps]
    return found


def _train(
    folder: Path, backend: str, step: int, place: int, settings: Sequence[str], *, rank: int = 1
) -> tuple[int, str]:
    number = (step - 1) * ACCUMULATION + place + 1
    command = runs.training(backend, 2, folder, (*SETTINGS, *settings), script=runs.FAULTY)
    return runs.train(command, folder.with_suffix(".out"), {"FAULT_NAN": f"{rank}:{number}"})


def _undisturbed(work: Path, backend: str) -> Path:
    folder = work / f"undisturbed-{backend}"
    if not folder.exists():
        code, output = runs.train(runs.training(backend, 2, folder, SETTINGS), folder.with_suffix(".out"))
        assert code == 0, output
    return folder


def _goes_on(folder: Path, backend: str, work: Path) -> list[str]:
    code, output = runs.train(runs.training(backend, 2, folder, SETTINGS), folder.with_suffix(".out"))
    if code:
        return [f"going on without the fault: exit code {code}: {output[-1500:]}"]
    plain = _undisturbed(work, backend)
    return _same_but(None, runs.curve(folder), runs.curve(plain)) or _same_state(folder, plain)


def _told(lines: Mapping[int, Mapping[str, Any]], step: int) -> list[str]:
    line = lines.get(step, {})
    found = {name: line.get(name) for name in ("skipped", "bad_ranks", "first_sample")}
    wanted = {"skipped": True, "bad_ranks": [1], "first_sample": (step - 1) * BATCH}
    return [] if found == wanted else [f"metrics.jsonl has {found} for step {step}, not {wanted}"]


def _same_but(
    step: int | None, lines: Mapping[int, Mapping[str, Any]], others: Mapping[int, Mapping[str, Any]]
) -> list[str]:
    kept = [line for number, line in lines.items() if number != step]
    return runs.curve_problems(kept, others)[:3]


def _same_state(folder: Path, other: Path) -> list[str]:
    return [f"{name} differs at the end" for name in runs.differing(_final(folder), _final(other))][:3]


def _frozen_step(
    lines: Mapping[int, Mapping[str, Any]], plain: Mapping[int, Mapping[str, Any]], step: int
) -> list[str]:
    """Up to the fault the curve is the undisturbed one, and all samples are taken as there."""
    early = [number for number in range(1, step) if lines[number]["loss"] != plain[number]["loss"]]
    moved = [number for number in lines if lines[number]["first_sample"] != plain[number]["first_sample"]]
    return [f"step {number} differs before the fault" for number in early] + [f"step {n} moved" for n in moved]


def _final(folder: Path) -> dict[str, str]:
    return runs.digests(runs.checkpoints(folder).path(STEPS))


if __name__ == "__main__":
    sys.exit(main())
