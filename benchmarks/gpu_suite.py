"""All that is to be measured on a machine with one GPU and no network, in one command and 20 minutes at most.

    python -m benchmarks.gpu_suite --out FOLDER [--minutes 20] [--only NAME,…]
    python -m benchmarks.gpu_suite --tiny --out FOLDER      (the same at tiny size, to try it on a CPU)

Each cell is a command of this project in a process of its own, and writes to FOLDER. Called again with the same folder,
the suite goes on: cells that are done are not done again, those that failed or ran out of time are. When the minutes
are over it ends what runs and begins nothing more. FOLDER/summary.json and summary.md say what came of each cell, and
FOLDER/RESULTS.md has the rows of its recipes.

Exit code 0 where every cell is done, whether its bars held or not; 1 where some is left, or failed.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import results_page
from benchmarks.machine import Device, device, end_on_sigterm, run_within
from scaling.errors import CommandLine, UserError, positive, run_program
from scaling.run_folder import environment
from scaling.units import format_seconds

ROOT = Path(__file__).resolve().parent.parent
MATRIX = Path(__file__).parent / "suite_matrix.json"
STATES = "cells"
LEAST_S = 10
"""With less time left nothing is begun."""
BAR_MISSED = 1
"""The exit code of a benchmark that has measured, and is not content."""


@dataclass(frozen=True)
class Cell:
    """One command of the suite."""

    name: str
    about: str
    words: tuple[str, ...]
    """Behind `python -m`."""
    out: str
    """The file in the folder that it writes; with it there the cell is done."""
    limit_s: int
    """Seconds that it may take."""
    add: str = ""
    """A pattern: files of the folder that it is given with --add, as they are when it begins."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    folder = options.out
    chosen = _chosen(list(cells(folder, tiny=options.tiny)), options.only)
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU, wherever it is tried
    here = device()
    if here.kind == "cpu" and not options.tiny:
        raise UserError("`--tiny` must be given where there is no GPU, but is not; add it")
    end_on_sigterm()
    (folder / STATES).mkdir(parents=True, exist_ok=True)
    print(f"{len(chosen)} cells on {_place(here)}, {options.minutes} minutes at most, into {folder}", flush=True)
    states = run_cells(chosen, folder, 60.0 * options.minutes)
    _write_summary(folder, here, states, tiny=options.tiny)
    return 0 if all(state["status"] == "done" for state in states) else 1


def _place(here: Device) -> str:
    return f"one {here.name}" if here.kind == "gpu" else f"a CPU ({here.name}), no GPU"


def _chosen(found: list[Cell], only: str) -> list[Cell]:
    """The cells of `only`, names with commas between; all where it is empty. Raises UserError."""
    names = [name for name in only.split(",") if name]
    known = [cell.name for cell in found]
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"`--only` must name cells of {', '.join(known)}, but names {unknown[0]!r}; correct it")
    return [cell for cell in found if not names or cell.name in names]


# ---------------------------------------------------------------- what there is to do


def cells(folder: Path, *, tiny: bool) -> Iterator[Cell]:
    """All cells, the most wanted first. Commands and their limits; only on a GPU is it known how long they take."""
    make = _maker(folder)
    seconds = "1" if tiny else "30"
    yield make("calibrate", "rates of this machine", 90, "scaling.calibrate", "--ranks", "1", "--seconds", seconds)
    yield _parity(make, tiny=tiny)
    yield from _runs(make, tiny=tiny)
    yield from _peers(make, tiny=tiny)
    yield from _memory(make, tiny=tiny)
    size = ("--tiny",) if tiny else ()
    spent = ("--seconds", "60" if tiny else "200")
    yield make("largest", "the largest model that trains", 240, "benchmarks.largest", *size, *spent)
    yield _checkpoints(make, folder, size)
    yield _recording(make, tiny=tiny)
    yield _calibration(make, folder, tiny=tiny)


Maker = Callable[..., Cell]


def _maker(folder: Path) -> Maker:
    def make(name: str, about: str, limit_s: int, module: str, *words: str, flag: str = "--out") -> Cell:
        return Cell(name, about, (module, *words, flag, str(folder / f"{name}.json")), f"{name}.json", limit_s)

    return make


def _parity(make: Maker, *, tiny: bool) -> Cell:
    if not tiny:
        words = ("--precisions", "bf16", "--world-sizes", "1", "--steps", "10")
        backends = ("--backends", "single,ddp,fsdp,zero1,zero2,zero3")
        return make("parity", "the same curve under every backend, bf16", 150, "benchmarks.parity", *words, *backends)
    spec = str(ROOT / "tests" / "specs" / "gpt-parity.json")
    words = ("--spec", spec, "--set", "precision=bf16", "--world-sizes", "1", "--steps", "2")
    backends = ("--backends", "single,fsdp")
    return make("parity", "the same curve, bf16", 90, "scaling.parity", *words, *backends, flag="--json")


def _runs(make: Maker, *, tiny: bool) -> Iterator[Cell]:
    """Recipes, the speed of a larger one, and one rank of a model that is cut over eight."""
    common = ("benchmarks.run", "--matrix", str(MATRIX), "--repeats", "1")
    if tiny:
        words = (*common, "--gpus", "1,512", "--rehearse", "--steps", "5", "--warm-up", "2")
        yield make("recipes", "recipes, and one rank of 512", 150, *words)
        return
    steps = ("--gpus", "1", "--steps", "100", "--warm-up", "10")
    for name, row, limit in (
        ("recipe-gpt2-124m", "gpt2-124m single x1 recipe", 200),
        ("recipe-atlas-vla", "atlas-vla single x1 recipe", 150),
        ("recipe-lora-8b", "llama-8b single x1 lora", 200),
        ("recipe-gpt2-dolly", "gpt2-dolly single x1 recipe", 120),
        ("speed-1.5b", "gpt2-1.5b single x1 speed", 150),
    ):
        yield make(name, f"100 steps of {row}", limit, *common, *steps, "--only", row)
    only = ("--gpus", "8", "--rehearse", "--only", "llama-8b fsdp x8 sharded")
    yield make("rehearsed-llama-8b", "Llama 8B, rank 0 of 8: compute alone", 120, *common, *only)


def _peers(make: Maker, *, tiny: bool) -> Iterator[Cell]:
    """The same work by other toolkits, where that benchmark is there."""
    try:
        there = importlib.util.find_spec("benchmarks.peers.__main__") is not None
    except ModuleNotFoundError:
        there = False
    if there:
        words = ("--ranks", "1", *(("--tiny", "--rounds", "2", "--peers", "ours,plain") if tiny else ()))
        yield make("peers", "the same work by other toolkits", 200, "benchmarks.peers", *words)


def _memory(make: Maker, *, tiny: bool) -> Iterator[Cell]:
    """The planner's memory and time against real steps, and against ranks of many rehearsed."""
    if tiny:
        words = ("benchmarks.gpu_memory", "--tiny", "--only", "gpt2-1.5b zero2 x8")
        yield make("memory-gpt2-1.5b", "memory predicted and measured", 90, *words)
        return
    for model in ("llama-8b", "gpt2-1.5b", "gpt2-124m", "llama-3b", "gpt2-774m", "llama-1b", "gpt2-350m"):
        words = ("benchmarks.gpu_memory", "--only", model)
        yield make(f"memory-{model}", f"memory of {model} predicted and measured", 120, *words)


def _checkpoints(make: Maker, folder: Path, size: tuple[str, ...]) -> Cell:
    words = ("--ranks", "1", "--backend", "fsdp", "--repeats", "2" if size else "10", "--folder", str(folder), *size)
    return make("checkpoint", "how long a step waits for a save", 150, "benchmarks.checkpoint_cost", *words)


def _recording(make: Maker, *, tiny: bool) -> Cell:
    words = ["--spec", "gpt2-tiny" if tiny else "gpt2-124m", "--pairs", "2" if tiny else "20"]
    length = 32 if tiny else 1024
    for change in (f'data={{"kind":"synthetic","sequence_length":{length}}}', "backend.kind=single", "compile=false"):
        words += ["--set", change]
    return make("recording", "what recording costs", 150, "benchmarks.profiler", *words)


def _calibration(make: Maker, folder: Path, *, tiny: bool) -> Cell:
    """A trace, which needs no GPU, and all predictions of this folder beside what was measured."""
    traced = "gpt2-124m ddp x8 none" if tiny else "llama-8b fsdp x8 full"
    words = ("--trace", "--only", traced, "--rows", str(folder / "rows.jsonl"))
    cell = make("calibration", "errors of all predictions", 120, "benchmarks.calibration", *words)
    return replace(cell, add="memory-*.json")


# ---------------------------------------------------------------- doing it


def run_cells(chosen: Sequence[Cell], folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Each cell that is not done, as long as there is time. Its state is written as soon as it is known."""
    ends = time.monotonic() + seconds
    found: list[dict[str, Any]] = []
    for cell in chosen:
        path = folder / STATES / f"{cell.name}.json"
        state = _done_before(path, folder / cell.out)
        if state is None:
            state = _attempt(cell, folder, ends - time.monotonic())
            path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        found.append(state)
        print(_line(state), flush=True)
    return found


def _done_before(path: Path, out: Path) -> dict[str, Any] | None:
    """The state of a cell that an earlier call has finished; None of any other."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if state.get("status") == "done" and out.exists() else None


def _attempt(cell: Cell, folder: Path, left_s: float) -> dict[str, Any]:
    """Run a cell. What it leaves behind, not its exit code alone, tells whether it has measured."""
    state: dict[str, Any] = {"name": cell.name, "about": cell.about, "command": ["python", "-m", *cell.words]}
    if left_s < LEAST_S:
        return state | {"status": "left", "reason": "no time was left"}
    out, began = folder / cell.out, time.monotonic()
    out.unlink(missing_ok=True)
    log = folder / STATES / f"{cell.name}.log"
    code = _launch(_with_files(cell, folder), log, min(cell.limit_s, left_s))
    state |= {"seconds": time.monotonic() - began, "exit_code": code, "out": cell.out}
    if code is None:
        return state | {"status": "timed out", "reason": f"took longer than {min(cell.limit_s, left_s):.0f} s"}
    if code not in (0, BAR_MISSED) or not out.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return state | {"status": "failed", "reason": " / ".join(lines[-2:])[:400]}
    return state | {"status": "done", "bars_held": code == 0}


def _with_files(cell: Cell, folder: Path) -> tuple[str, ...]:
    """A cell's words, with the files that it is given."""
    files = sorted(str(path) for path in folder.glob(cell.add)) if cell.add else []
    return (*cell.words, "--add", *files) if files else cell.words


def _launch(words: Sequence[str], log: Path, limit_s: float) -> int | None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        return run_within(limit_s, [sys.executable, "-m", *words], cwd=ROOT, env=environ, output=file)


# ---------------------------------------------------------------- what came of it


def _line(state: dict[str, Any]) -> str:
    took = f" in {format_seconds(state['seconds'])}" if "seconds" in state else ""
    if state["status"] == "done":
        return f"{state['name']}: done{took}" + ("" if state["bars_held"] else ", a bar was missed")
    return f"{state['name']}: {state['status']}{took}: {state['reason']}"


def _write_summary(folder: Path, here: Device, states: Sequence[dict[str, Any]], *, tiny: bool) -> None:
    """summary.json, summary.md, and RESULTS.md where rows were measured."""
    place = _place(here) + (", tiny sizes: a trial of the commands, no measurement" if tiny else "")
    document = {"ran_on": place, "tiny": tiny, "environment": environment(1, here.name), "cells": list(states)}
    (folder / "summary.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = [
        "# GPU suite",
        "",
        f"On {place}.",
        "",
        "| cell | what | came to | seconds | file |",
        "|---|---|---|---:|---|",
    ]
    for state in states:
        came = state["status"] + ("" if state.get("bars_held", True) else ", a bar was missed")
        came += f": {state['reason'].replace('|', '/')}" if "reason" in state else ""
        seconds = f"{state['seconds']:.0f}" if "seconds" in state else ""
        lines.append(f"| {state['name']} | {state['about']} | {came} | {seconds} | {state.get('out', '')} |")
    (folder / "summary.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if list(results_page.results(folder)):
        results_page.main(["--results", str(folder), "--out", str(folder / "RESULTS.md")])


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m benchmarks.gpu_suite", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="results; an earlier call's are gone on from")
    add("--minutes", type=positive, default=20, metavar="N", help="the most that this call takes (default %(default)s)")
    add("--only", default="", metavar="NAME,…", help="cells of these names")
    add("--tiny", action="store_true", help="tiny sizes, to try it on a CPU")
    return parser


if __name__ == "__main__":
    run_program(main)
