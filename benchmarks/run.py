"""Throughput and memory of specs under backends, on as many GPUs as are asked for, by the real command line.

    python -m benchmarks.run --gpus 1,4,8 --out FILE [--rehearse] [--only WORD]
    python -m benchmarks.run --gpus 1 --beside ../other-checkout --out new.json --beside-out base.json

What is run stands in matrix.json (matrix.py says how). Each row is some runs of launch/train.py under torchrun or the
deepspeed launcher, in turns with the other rows, forwards and backwards, so that a machine that grows slower harms all
alike. A run that fails or runs out of memory is a result. Counts of GPUs that this machine lacks are skipped, and the
row says so; `--rehearse` takes rank 0 of that many instead, alone on one device: memory and its own work are measured,
communication is predicted, and the row says so. Without a GPU ranks on the CPU's cores stand for GPUs, with small
models, and every row says so.

`--beside` runs each row of another checkout next to this one's, now before and now after it: `benchmarks.compare` then
has pairs to go by. Exit code 0 whatever is found; 2 where the command line is wrong.
"""

import json
import statistics
import subprocess
import tempfile
import time
import uuid
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cell import ROOT, facts, measure, rehearse, resolved
from benchmarks.machine import Device, device, end_on_sigterm, is_busy, load, ran_on, taken_gpus
from benchmarks.matrix import MATRIX, Cell, cells, load_matrix
from scaling.errors import CommandLine, UserError, positive, run_program
from scaling.run_folder import environment
from scaling.units import format_bytes, format_seconds

KIND = "benchmarks.run"
SPREAD = 0.05
"""Between the repeats of a row, largest less smallest over the median: from here on the machine was not steady."""


@dataclass
class Side:
    """A checkout that is measured, and its result."""

    root: Path
    out: Path
    document: dict[str, Any] = field(default_factory=dict[str, Any])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    _check(options)
    end_on_sigterm()
    here = device()
    planned = list(
        plan(load_matrix(options.matrix).get(here.kind, []), options.gpus, options.only, here, options.rehearse)
    )
    for line in _introduction(here, options.gpus, rehearse=options.rehearse):
        print(line, flush=True)
    sides = [Side(ROOT, options.out)]
    if options.beside:
        sides.append(Side(options.beside.resolve(), options.beside_out))
    session, before = uuid.uuid4().hex[:12], load()
    for side in sides:
        side.document = _document(side, here, options, session, before)
        side.document["rows"] = [{**row, "runs": []} for _, row in planned]
    with tempfile.TemporaryDirectory(prefix="scaling-bench-") as folder:
        _measure_all([cell for cell, _ in planned], sides, here, options, Path(folder))
    for side in sides:
        print(f"written: {side.out}")
    return 0


# ---------------------------------------------------------------- what is to be done


def plan(
    entries: Sequence[dict[str, Any]], counts: Sequence[int], only: str, here: Device, fill: bool
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each row to be: its cell, and what is known of it before anything runs. "status" is absent where it is to run.

    `fill`: rehearse what the machine is too small for, which is skipped otherwise.
    """
    for cell in cells(entries, counts, only):
        lacking = cell.ranks > here.count
        row: dict[str, Any] = {
            "name": cell.name,
            "spec": cell.spec,
            "option": cell.option,
            "launcher": None if lacking else cell.launcher,
            "settings": list(cell.settings),
            "ran_on": None if lacking and not fill else ran_on(here, cell.ranks, rehearsed=lacking),
        }
        try:
            row |= facts(resolved(cell))
        except UserError as error:
            row |= {"world_size": cell.ranks, "ran_on": None, "status": "refused", "reason": str(error)}
        if lacking and not fill and "status" not in row:
            row |= {"status": "skipped", "reason": _lack(here, cell.ranks)}
        yield cell, row


def _lack(here: Device, ranks: int) -> str:
    if here.kind == "gpu":
        return f"this machine has {here.count} of {ranks} GPUs"
    return f"this machine has no GPU, and {here.count} cores for {ranks} ranks"


def _introduction(here: Device, counts: Sequence[int], *, rehearse: bool) -> Iterator[str]:
    """What is about to be measured, and what is not."""
    if here.kind == "gpu":
        yield f"{here.count} x {here.name}"
    else:
        yield f"no GPU here: ranks on the CPU's cores ({here.count}) stand for GPUs, with the matrix's small models"
    for ranks in counts:
        if ranks > here.count:
            yield f"{ranks}: {_lack(here, ranks)}: {'rank 0 is rehearsed alone' if rehearse else 'skipped'}"


def _document(side: Side, here: Device, options: Namespace, session: str, before: dict[str, Any]) -> dict[str, Any]:
    versions = environment(1, here.name)["versions"]
    return {
        "kind": KIND,
        "schema_version": 1,
        "session": session,
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"kind": here.kind, "device": here.name, "count": here.count, "before": before},
        "environment": {"versions": versions, **checkout(side.root)},
        "asked": {"gpus": options.gpus, "steps": options.steps, "warm_up": options.warm_up, "repeats": options.repeats},
        "beside": options.beside is not None,
        "noise": [],
    }


def checkout(root: Path) -> dict[str, Any]:
    """The commit of a checkout, and whether its files are no longer those of the commit; None: not known."""

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "changed_since": None if changes is None else bool(changes)}


# ---------------------------------------------------------------- doing it


def _measure_all(planned: list[Cell], sides: list[Side], here: Device, options: Namespace, folder: Path) -> None:
    """Repeat by repeat, there and back; each side's file is written anew after each run."""
    places = range(len(planned))
    for repeat in range(options.repeats):
        for place in places if repeat % 2 == 0 else reversed(places):
            order = sides if (repeat + place) % 2 == 0 else sides[::-1]
            for side in order:
                row = side.document["rows"][place]
                if "status" in row and row["status"] != "ok":
                    continue  # skipped, refused, or failed before, which it would again
                run = folder / f"{place}-{repeat}-{sides.index(side)}"
                row["runs"].append({"repeat": repeat, **_once(planned[place], row, run, side, here, options)})
                row |= summary(row)
                other = "" if side is sides[0] else f"{side.root.name}: "
                print(f"{repeat + 1}/{options.repeats} {other}{line(row)}", flush=True)
                save(side)
    for side in sides:
        save(side)


def _once(cell: Cell, row: dict[str, Any], run: Path, side: Side, here: Device, options: Namespace) -> dict[str, Any]:
    if row["ran_on"]["rehearsed"]:
        return rehearse(cell, run, here, options.limit, side.root)
    return measure(cell, run, options.steps, options.warm_up, here, options.limit, side.root)


def save(side: Side) -> None:
    """Write a side's result, whole or not at all, with what is known of the machine's rest."""
    side.document["noise"] = noise(side.document)
    temporary = side.out.with_name(f".{side.out.name}.part")
    temporary.write_text(json.dumps(side.document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(side.out)


# ---------------------------------------------------------------- what it comes to


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """A row's figures over its runs: medians, the highest memory, and whether it was quiet meanwhile."""
    failed = next((run for run in row["runs"] if run["status"] != "ok"), None)
    if failed is not None:
        return {"status": failed["status"], "reason": failed["reason"]}
    runs = row["runs"]
    found: dict[str, Any] = {"status": "ok"}
    for name in ("tokens_per_second", "tokens_per_second_per_device", "mfu", "joules_per_million_tokens", *REHEARSED):
        values = [run[name] for run in runs if run.get(name) is not None]
        found[name] = statistics.median(values) if values else None
    steps = [run["step_seconds"] for run in runs if "step_seconds" in run]
    found["step_seconds"] = {key: statistics.median(step[key] for step in steps) for key in steps[0]} if steps else None
    found["spread"] = spread([run["tokens_per_second"] for run in runs if "tokens_per_second" in run])
    measured = [run["memory"]["peak_allocated_bytes"] for run in runs if run["memory"]["peak_allocated_bytes"]]
    predicted = runs[0]["predicted"]["memory"]["peak_allocated_bytes"]
    found["memory"] = {
        "measured_bytes": max(measured, default=None),
        "predicted_bytes": predicted,
        "measured_to_predicted": max(measured) / predicted if measured else None,
        "host_rss_bytes": max((run["memory"].get("host_rss_bytes") or 0 for run in runs), default=0) or None,
    }
    return found


REHEARSED = (
    *("compute_seconds", "compute_only_tokens_per_second_per_device", "compute_only_mfu"),
    *("predicted_communication_seconds", "predicted_tokens_per_second"),
)
"""What a rehearsal says in place of a speed."""


def spread(values: Sequence[float]) -> float | None:
    """Largest less smallest over the median; None of fewer than two."""
    return (max(values) - min(values)) / statistics.median(values) if len(values) > 1 else None


def noise(document: dict[str, Any]) -> list[str]:
    """What speaks against the figures of a result: others at work, repeats apart, too few of them."""
    found: list[str] = []
    before = document["machine"]["before"]
    if is_busy(before["others_cores"]):
        found.append(f"before the first run others kept {before['others_cores']:.1f} cores busy")
    if taken := taken_gpus(before["gpus"]):
        found.append(f"before the first run others were at work on {taken} of {len(before['gpus'])} GPUs")
    runs = [run for row in document["rows"] for run in row["runs"] if run["status"] == "ok"]
    if busy := [run["others_cores"] for run in runs if run.get("busy")]:
        most = max(busy)
        found.append(f"in {len(busy)} of {len(runs)} runs others kept cores busy, up to {most:.1f} of them")
    timed = [row for row in document["rows"] if row.get("tokens_per_second")]
    if apart := [row for row in timed if row["spread"] is not None and row["spread"] > SPREAD]:
        worst = max(apart, key=lambda row: row["spread"])
        found.append(
            f"the repeats of {len(apart)} of {len(timed)} rows are more than {_percent(SPREAD)} apart, at worst "
            f"{_percent(worst['spread'])} ({worst['name']})"
        )
    if any(len(row["runs"]) < 3 for row in timed):
        found.append("rows of fewer than three runs say little of how steady they are")
    return found


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    if row["status"] != "ok":
        return f"{row['name']}: {row['status']}: {row['reason']}"
    words = [f"{row['name']} on {row['ran_on']['words']}:"]
    if row["tokens_per_second"] is not None:
        seconds = format_seconds(row["step_seconds"]["median"])
        words.append(f"{row['tokens_per_second']:,.0f} tokens/s, {seconds} a step,")
    if row["compute_only_tokens_per_second_per_device"] is not None:
        words.append(f"its own work alone {row['compute_only_tokens_per_second_per_device']:,.0f} tokens/s,")
    if row["mfu"] is not None:
        words.append(f"MFU {_percent(row['mfu'])},")
    memory = row["memory"]
    if memory["measured_bytes"] is not None:
        words.append(f"{format_bytes(memory['measured_bytes'])},")
    words.append(f"predicted {format_bytes(memory['predicted_bytes'])}")
    return " ".join(words)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


# ---------------------------------------------------------------- the command line


def _check(options: Namespace) -> None:
    """UserError for what cannot be."""
    if options.steps < options.warm_up + 2:
        raise UserError(
            f"`--steps` must be at least 2 more than `--warm-up` ({options.warm_up}), but is {options.steps}; raise it"
        )
    if (options.beside is None) != (options.beside_out is None):
        raise UserError("`--beside` and `--beside-out` must be given together, but one is not; give both or none")
    if options.beside is not None and not (options.beside / "launch" / "train.py").is_file():
        raise UserError(f"`--beside` must be a checkout, but {options.beside} has no launch/train.py; name another")
    for option, path in (("--out", options.out), ("--beside-out", options.beside_out)):
        if path is not None and not path.parent.is_dir():
            raise UserError(f"`{option}` must be a file in a folder that exists, but {path.parent} does not; make it")


def _counts(text: str) -> list[int]:
    try:
        found = [positive(part) for part in text.split(",")]
    except (ArgumentTypeError, ValueError):
        raise ArgumentTypeError(f"must be numbers of GPUs such as 1,4,8, but is {text!r}; correct it") from None
    return list(dict.fromkeys(found))


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m benchmarks.run", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--gpus", type=_counts, required=True, metavar="1,4,8", help="numbers of GPUs; ranks where there is none")
    add("--out", type=Path, default=Path("benchmark.json"), metavar="FILE", help="the result (default %(default)s)")
    add("--rehearse", action="store_true", help="rank 0 alone for numbers of GPUs that this machine lacks")
    add("--matrix", type=Path, default=MATRIX, metavar="FILE", help="what is run (default benchmarks/matrix.json)")
    add("--only", default="", metavar="WORD", help="rows whose name has this in it")
    add("--steps", type=positive, default=30, metavar="N", help="optimizer steps of a run (default %(default)s)")
    add(
        "--warm-up", type=positive, default=5, metavar="N", help="of which the first do not count (default %(default)s)"
    )
    add("--repeats", type=positive, default=3, metavar="N", help="runs of each row (default %(default)s)")
    add(
        "--limit",
        type=positive,
        default=900,
        metavar="S",
        help="seconds after which a run has failed (default %(default)s)",
    )
    add("--beside", type=Path, metavar="FOLDER", help="another checkout to measure in turns with this one")
    add("--beside-out", type=Path, metavar="FILE", help="its result")
    return parser


if __name__ == "__main__":
    run_program(main)
