"""Runs that move between backends and numbers of ranks: does the curve, or any restored value, show it?

python -m benchmarks.faults.moves --out FILE
"""

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from benchmarks.faults.runs import Row

CHAIN = (("zero3", 4), ("fsdp", 2), ("zero1", 3), ("ddp", 2), ("single", 1), ("zero2", 4))
PLACES = tuple((backend, ranks) for backend in ("ddp", "fsdp", "zero1", "zero2", "zero3") for ranks in (4, 2, 1))
"""All that a run can move between; "single" on one rank comes on top."""
SMOOTH = ("model.dropout=0.0", "batch.global_batch_size=24", "batch.micro_batch_size=2")
SMOOTH += ('batch.gradient_accumulation_steps="auto"',)
"""Nothing that depends on the number of ranks; a batch that 1, 2, 3 and 4 ranks divide."""


def chain(work: Path, _options: argparse.Namespace) -> list[Row]:
    """Six backends and sizes, ten steps on each, next to one undisturbed process."""
    row = Row("chain", f"moves {' -> '.join(f'{b} x {n}' for b, n in CHAIN)}, fp32: losses within 1e-5", worst=0.0)
    settings = (*SMOOTH, "max_steps=60", "checkpoint.keep_last=null")
    reference = _undisturbed(work / "alone", settings)
    for index, (backend, ranks) in enumerate(CHAIN):
        problems = _go_on(work / "chain", backend, ranks, settings, 10 * index, 10 * index + 10)
        row.trial(problems or _compare(work / "chain", reference, 10 * index, 1e-5, row))
    return [row]


def resumed(work: Path, options: argparse.Namespace) -> list[Row]:
    """4 -> 2 -> 1 ranks and back, from each backend to others; 20 resumed steps each."""
    row = Row("E3", "moves between sizes and backends, fp32: 20 resumed steps, losses within 2e-6", worst=0.0)
    settings = (*SMOOTH, "max_steps=50")
    reference = _undisturbed(work / "alone", settings)
    names = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
    pairs = itertools.product(names, names) if options.all_pairs else zip(names, names[1:] + names[:1], strict=True)
    for number, (first, second) in enumerate(pairs):
        for sizes in ((4, 2, 1), (1, 2, 4)):
            folder, done = work / f"{number}-{sizes[0]}", 0
            for backend, ranks, until in zip((first, second, first), sizes, (10, 30, 50), strict=True):
                problems = _go_on(folder, backend, ranks, settings, done, until)
                problems = problems or _compare(folder, reference, done, 2e-6, row)
                if done:
                    row.trial(f"{first} {second} {sizes} at {backend} x {ranks}: {problem}" for problem in problems)
                done = until
    return [row]


def same_place(work: Path, _options: argparse.Namespace) -> list[Row]:
    """Dropout on, the same backend and size: 10 steps against 5 and 5."""
    row = Row("E2", "backends and sizes, dropout on: 5 + 5 steps equal 10 bit for bit, moments and weights too")
    control = Row("E2 control", "a resume with another dropout is found to differ")
    settings = ("max_steps=10",)
    for backend, ranks in (*PLACES, ("single", 1)):
        folders = [work / f"{backend}-{ranks}-{part}" for part in ("whole", "parts")]
        problems = _go_on(folders[0], backend, ranks, settings, 0, 10)
        problems += _go_on(folders[1], backend, ranks, settings, 0, 5)
        problems += _go_on(folders[1], backend, ranks, settings, 5, 10)
        row.trial(f"{backend} x {ranks}: {problem}" for problem in problems or _unequal(*folders))
    folders = [work / "single-1-whole", work / "control"]
    problems = _go_on(folders[1], "single", 1, settings, 0, 5)
    problems += _go_on(folders[1], "single", 1, (*settings, "model.dropout=0.11"), 5, 10)
    control.trial(problems or ([] if _unequal(*folders) else ["it was not"]))
    return [row, control]


def state(work: Path, _options: argparse.Namespace) -> list[Row]:
    """Each place restores the checkpoints of all others and saves them again, with no step between."""
    rows: list[Row] = []
    places = (*PLACES, ("single", 1))
    for precision in ("fp32", "bf16"):
        row = Row("E1", f"pairs of places (backend x ranks), {precision}: every restored master and moment bit-equal")
        settings = (*SMOOTH, f'precision="{precision}"', "max_steps=5")
        written: dict[str, Path] = {}
        for backend, ranks in places:
            folder = work / f"{precision}-{backend}-{ranks}"
            problems = _go_on(folder, backend, ranks, settings, 0, 5)
            assert not problems, problems
            written[folder.name] = runs.checkpoints(folder).path(5)
        wanted = {name: runs.digests(path) for name, path in written.items()}
        for backend, ranks in places:
            again = work / f"again-{precision}-{backend}-{ranks}"
            problems = _save_again(again, backend, ranks, settings, written)
            for name in written:
                found = {} if problems else runs.digests(again / name / "step-00000005")
                differing = problems or runs.differing(found, wanted[name])
                row.trial(f"{name} -> {backend} x {ranks}: {problem}" for problem in differing[:3])
        rows.append(row)
    return rows


def order(_work: Path, _options: argparse.Namespace) -> list[Row]:
    """Which samples each global step sees, over sizes and after any resume."""
    import numpy as np

    row = Row("E5", "places to resume at, over sizes: each step sees the same samples in the same order")
    epoch, batch, steps = 37, 8, 14  # three epochs and a bit; the boundaries lie within steps
    wanted = [ids for ids in _ids_of_steps(epoch, batch, 1, 1, 0, steps)]
    flat = np.concatenate(wanted)
    once = [sorted(flat[i : i + epoch]) == list(range(epoch)) for i in range(0, len(flat) - epoch + 1, epoch)]
    row.trial([] if once and all(once) else ["a sample comes twice in an epoch"])
    for ranks, micro, start in itertools.product((1, 2, 4), (1, 2), range(steps)):
        found = list(_ids_of_steps(epoch, batch, ranks, micro, start, steps))
        same = len(found) == steps - start and all(
            np.array_equal(a, b) for a, b in zip(found, wanted[start:], strict=True)
        )
        row.trial([] if same else [f"{ranks} ranks, micro {micro}, from step {start}: other samples"])
    return [row]


def changed(work: Path, _options: argparse.Namespace) -> list[Row]:
    """A spec that is no longer that of the checkpoint."""
    refused = Row("E6", "changes of batch, sequence, data, seed or model: exit code 5 and the field's name")
    allowed = Row("E6 allowed", "changes that are passed with --allow-change, or harmless: the run goes on")
    folder = work / "run"
    assert not _go_on(folder, "single", 1, ("max_steps=20",), 0, 3)
    for field, setting in (
        ("batch.global_batch_size", "batch.global_batch_size=16"),
        ("data.sequence_length", "data.sequence_length=16"),
        ("data", "data.masked_fraction=0.2"),
        ("seed", "seed=8"),
        ("model.hidden_size", "model.hidden_size=32"),
    ):
        code, output = runs.train(runs.training("single", 1, folder, ("max_steps=20", setting)), work / "output")
        named = f"`{field}`" in output and "Traceback" not in output
        refused.trial([] if code == 5 and named else [f"{setting}: exit code {code}, {output[-500:]}"])
        if not field.startswith("model"):
            # The fingerprint of made data holds their seed and length, so those are a change of the data, too.
            allow = dict.fromkeys([field, "data"] if field in ("seed", "data.sequence_length") else [field])
            flags = [part for name in allow for part in ("--allow-change", name)]
            allowed.trial(_goes_on(folder, work / field, setting, flags))
    for setting in ("profile.interval=2", "optimizer.lr=0.002"):
        allowed.trial(_goes_on(folder, work / setting, setting, []))
    return [refused, allowed]


CHECKS = {"chain": chain, "resumed": resumed, "same": same_place, "state": state, "order": order, "changed": changed}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = runs.parser("moves", __doc__)
    parser.add_argument("--all-pairs", action="store_true", help="E3 over all pairs of backends, not a ring of them")
    return runs.run(CHECKS, parser.parse_args(arguments), "moves")


def _undisturbed(folder: Path, settings: Sequence[str]) -> dict[int, dict[str, Any]]:
    code, output = runs.train(runs.training("single", 1, folder, settings), folder.with_suffix(".out"))
    assert code == 0, output
    return runs.curve(folder)


def _go_on(
    folder: Path,
    backend: str,
    ranks: int,
    settings: Sequence[str],
    done: int,
    until: int,
    arguments: Sequence[str] = (),
) -> list[str]:
    """Train from step `done` to step `until`; what went wrong with that, progress not made among it."""
    log_from = len(runs.log(folder))
    command = runs.training(backend, ranks, folder, settings, arguments=["--stop-after", str(until), *arguments])
    code, output = runs.train(command, folder.with_suffix(".out"))
    if code:
        return [f"exit code {code}: {output[-1500:]}"]
    resumed_from = runs.resumed_step(runs.log(folder)[log_from:])
    if (resumed_from or 0) != done:
        return [f"it went on from {resumed_from}, not from {done}"]
    return [] if max(runs.curve(folder)) == until else [f"it ended at step {max(runs.curve(folder))}, not at {until}"]


def _compare(folder: Path, reference: Mapping[int, Mapping[str, Any]], after: int, limit: float, row: Row) -> list[str]:
    """Steps after step `after` whose loss is off, or that saw other samples."""
    problems: list[str] = []
    for step, line in runs.curve(folder).items():
        if step > after:
            off = abs(line["loss"] - reference[step]["loss"]) / abs(reference[step]["loss"])
            row.worst = max(row.worst or 0.0, off)
            if not off <= limit:
                problems.append(f"step {step}: the loss is off by {off:.2e}")
            if any(line[field] != reference[step][field] for field in ("samples_seen", "first_sample", "tokens", "lr")):
                problems.append(f"step {step}: other samples or another LR")
    return problems


def _unequal(one: Path, other: Path) -> list[str]:
    problems = runs.curve_problems(runs.read_lines(other), runs.curve(one))
    paths = [runs.checkpoints(folder).path(10) for folder in (one, other)]
    return problems + [f"{key} differs" for key in runs.differing(*map(runs.digests, paths))]


def _save_again(
    again: Path, backend: str, ranks: int, settings: Sequence[str], written: Mapping[str, Path]
) -> list[str]:
    command = runs.training(backend, ranks, again, settings, script=Path(__file__).with_name("resave.py"))
    list_file = again.with_suffix(".json")
    list_file.write_text(json.dumps({name: str(path) for name, path in written.items()}))
    code, output = runs.train([*command, "--checkpoints", str(list_file)], again.with_suffix(".out"))
    return [f"exit code {code}: {output[-1500:]}"] if code else []


def _ids_of_steps(epoch: int, batch: int, ranks: int, micro: int, start: int, steps: int) -> Iterator[Any]:
    import numpy as np
    import torch

    from scaling.data.dataset import MicroBatch
    from scaling.data.loader import step_batches
    from scaling.records import BatchPlan, Progress

    class Ids:
        def __len__(self) -> int:
            return epoch

        def read(self, indices: Any) -> MicroBatch:
            ids = torch.tensor(np.asarray(indices, dtype=np.int64))
            return MicroBatch(ids, ids)

    accumulation = batch // (ranks * micro)
    plan = BatchPlan(batch, micro, accumulation, ranks, 1)
    progress = Progress(step=start, samples=start * batch)
    places = list(progress.first_samples(plan, steps))
    shared: dict[str, Any] = {"seed": 7, "micro_batch": micro, "accumulation": accumulation, "world_size": ranks}
    shared |= {"first_samples": places, "device": torch.device("cpu")}
    for step in zip(*(step_batches(Ids(), rank=rank, **shared) for rank in range(ranks)), strict=True):  # pyright: ignore
        yield np.concatenate([step[r][a].inputs.numpy() for a in range(accumulation) for r in range(ranks)])


def _goes_on(folder: Path, copy: Path, setting: str, arguments: list[str]) -> list[str]:
    """What goes wrong when a copy of the run, 3 steps in, goes on with a changed setting."""
    shutil.copytree(folder, copy)
    return [
        f"{setting} {arguments}: {p}" for p in _go_on(copy, "single", 1, ("max_steps=20", setting), 3, 6, arguments)
    ]


if __name__ == "__main__":
    sys.exit(main())
