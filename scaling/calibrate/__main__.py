"""What this machine sustains, measured in under a minute, as a file for `python -m scaling.plan --hardware FILE`.

    python -m scaling.calibrate --out FILE [--ranks N] [--seconds S]
    torchrun --nnodes=2 --nproc_per_node=8 … -m scaling.calibrate --out FILE

Matrix products and attention in each precision, memory, copies between pinned host memory and a GPU, all-gathers and
all-reduces within the node, and between nodes where torchrun starts ranks on several. Without a launcher it starts a
rank for each GPU, or two on a CPU, whose cores and memory they share: its file then describes `--gpus 2xcpu`.

The measured rates stand under "measured" (`Measured` in scaling/hardware.py), and the planner takes them as they are.
The peaks beside them are those of the table of GPUs, null for a card that it lacks: factors are for peaks alone, so
that no efficiency counts twice. Under "calibration" is what they were measured on, how, when, with which versions, and
each figure's lowest and highest repeat. What was not measured is null, and "not_measured" says why.
"""

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling.calibrate.launch import measure_here, measure_on
from scaling.calibrate.result import Figure, Found, Sizes, hardware_file
from scaling.errors import CommandLine, UserError, positive, run_program
from scaling.units import format_bytes
from scaling.view import Sheet, print_sheet, progress

CPU_RANKS = 2
"""Where there is no GPU: as many as it takes for a collective."""
UNSTEADY = 2.0
"""Highest over lowest repeat from which on a figure tells more about what else ran."""


def main(arguments: Sequence[str] | None = None, sizes: Sizes | None = None) -> int:
    """The command line; returns the exit code. `sizes`: of what is measured, in place of the usual ones."""
    options = _parser().parse_args(arguments)
    launched = "RANK" in os.environ
    if launched and options.ranks:
        raise UserError("`--ranks` must be absent under a launcher, but is given; the launcher has started the ranks")
    speaks = not launched or os.environ["RANK"] == "0"
    path = Path(options.out)
    if speaks:
        _check_writable(path)
    with progress("calibrating") if speaks else contextlib.nullcontext(lambda name, total: None) as tell:
        if launched:
            found = measure_here(options.seconds, sizes, tell)
        else:
            found = measure_on(_ranks(options.ranks), options.seconds, sizes, tell)
    if speaks:
        _save(path, hardware_file(found))
        print_sheet(results(found))
        if unsteady := [name for name, one in found.figures.items() if one.highest > UNSTEADY * one.lowest]:
            print(f"unsteady: {', '.join(unsteady)}; measure again when nothing else runs")
        print(f"written: {path}; plan with `--hardware {path}{_gpus(found)}`")
    return 0


def _ranks(asked: int | None) -> int:
    """Processes to start: `--ranks`, or all GPUs, or CPU_RANKS."""
    import torch

    gpus = torch.cuda.device_count()
    if asked and gpus and asked > gpus:
        raise UserError(f"`--ranks` must be at most the GPUs of this machine, {gpus}, but is {asked}; lower it")
    return asked or gpus or CPU_RANKS


def _gpus(found: Found) -> str:
    ranks, nodes = found.facts["ranks"], found.facts["nodes"]
    count = f"{nodes}x{ranks // nodes}" if nodes > 1 else str(ranks)
    return f" --gpus '{count}x{hardware_file(found)['name']}'"


# ---------------------------------------------------------------- the file


def _check_writable(path: Path) -> None:
    """UserError where `path` cannot be written; now, not after a minute of measuring."""
    if path.is_dir():
        raise UserError(f"`--out` must be a file, but {str(path)[:200]!r} is a folder; name a file in it")
    try:
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from None


def _save(path: Path, value: dict[str, Any]) -> None:
    """Whole or not at all: a file that is broken off, or that a planner reads meanwhile, would be another machine's."""
    try:
        temporary = _temporary(path)
        try:
            temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise _not_writable(path, error) from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _not_writable(path: Path, error: OSError | ValueError) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return UserError(
        f"`--out` must be a file that can be written, but {str(path)[:200]!r} is not ({reason}); name another"
    )


# ---------------------------------------------------------------- what is shown


def results(found: Found) -> Sheet:
    """The figures and what is missing."""
    rows = [_row(name, figure) for name, figure in found.figures.items()]
    rows += [[name, "n/a", "", "", "", reason] for name, reason in found.not_measured.items()]
    ranks, memory = found.facts["ranks"], found.memory_bytes
    kind = "GPU" if found.device_type == "cuda" else "CPU, no GPU"
    title = f"{found.device} ({kind}), {ranks} rank{'s' if ranks > 1 else ''}, {found.facts['seconds']} s"
    caption = f"memory of each rank: {'n/a' if memory is None else format_bytes(memory)}"
    return Sheet(title, ["figure", ">median", ">lowest", ">highest", ">repeats", "of"], rows, caption)


def _row(name: str, figure: Figure) -> list[str]:
    rates = [_rate(name, value) for value in (figure.median, figure.lowest, figure.highest)]
    return [name, *rates, str(figure.repeats), figure.of]


def _rate(name: str, value: float) -> str:
    unit = "B/s" if name.endswith("bytes_per_s") else "FLOP/s"
    letter, size = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / size:.4g} {letter}{unit}"


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.calibrate", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="the hardware file, which is replaced if it is there")
    add("--ranks", type=positive, metavar="N", help="processes to start (default: one for each GPU; two on a CPU)")
    add("--seconds", type=positive, default=30, metavar="S", help="time to measure for (default %(default)s)")
    return parser


if __name__ == "__main__":
    run_program(main)
