"""The same spec over backends and world sizes: where do the curves part, and by how much?

    python -m scaling.parity --spec SPEC [--backends ddp,fsdp,zero2] [--world-sizes 1,2,4] [--steps 20]

Each world size is a launch of real processes; in it the backends train one after the other, each from
the start. Compared with the first run (single, if asked for) are loss, gradient norm and the LR of every group, step
by step. Exit code 0 where all agree within the tolerance, 1 where they part.
"""

import json
import math
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

from scaling.errors import CommandLine, UserError, positive, run_program
from scaling.inventory import dropout
from scaling.rehearse import forks
from scaling.run_folder import strict
from scaling.spec import Spec, load_spec
from scaling.spec.sections import HuggingFace, HuggingFaceVla
from scaling.view import parity_table, print_table

BACKENDS: dict[str, dict[str, Any]] = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp-replicate": {"kind": "fsdp", "frozen": "replicate"},
    "fsdp-keep": {"kind": "fsdp", "reshard_after_forward": False},
    "fsdp-offload": {"kind": "fsdp", "cpu_offload": True},
    "hsdp": {"kind": "fsdp", "replicate": 2},
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero3-replicate": {"kind": "deepspeed", "zero_stage": 3, "frozen": "replicate"},
    "zero3-hpz": {"kind": "deepspeed", "zero_stage": 3, "zero_hpz_partition_size": 2},
    "zero1-offload": {"kind": "deepspeed", "zero_stage": 1, "offload_optimizer": "cpu"},
    "zero2-offload": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3-offload": {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
}
DEFAULT_BACKENDS = "single,ddp,fsdp,hsdp,zero1,zero2,zero3,zero2-offload"
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}
"""Largest relative difference that counts as agreement, by precision."""


@dataclass(frozen=True)
class Curve:
    """What one backend did at one world size."""

    backend: str
    world_size: int
    steps: tuple[dict[str, Any], ...]
    """Per step: loss, grad_norm, lr."""
    error: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How far one curve is from the reference: the largest relative differences over the steps."""

    backend: str
    world_size: int
    loss: float = math.nan
    grad_norm: float = math.nan
    lr: float = math.nan
    first_step_apart: int | None = None
    """First step at which loss or gradient norm differ by more than the tolerance."""
    error: str | None = None
    """Why there is no curve."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    spec = load_spec(options.spec, options.set)
    combinations = _combinations(options.backends, options.world_sizes)
    tolerance = options.tolerance or TOLERANCE[spec.precision]
    curves = measure(spec, combinations, options.steps)
    outcomes = compare(curves, tolerance)
    print_table(parity_table(outcomes, tolerance, options.steps))
    for outcome in outcomes:
        if outcome.error is not None:
            _say(f"{outcome.backend} on {outcome.world_size} ranks failed: {outcome.error}")
    for field, on in (("model.dropout", dropout(spec.model)), ("lora.dropout", spec.lora and spec.lora.dropout)):
        if on:
            _say(f"note: dropout is on, whose masks differ between world sizes; set {field}=0 to compare")
    if options.json:
        Path(options.json).write_text(json.dumps(report(spec, curves, outcomes, tolerance), indent=2) + "\n")
    return 0 if agree(outcomes, tolerance) else 1


def measure(spec: Spec, combinations: Sequence[tuple[str, int]], steps: int) -> list[Curve]:
    """Train `spec` for `steps` steps in each combination of backend and world size, in real processes."""
    curves: list[Curve] = []
    preload = ["peft"] if spec.lora is not None else []
    preload += (
        ["transformers.models.auto.modeling_auto"] if isinstance(spec.model, HuggingFace | HuggingFaceVla) else []
    )
    preload += ["deepspeed"] if any(name.startswith("zero") for name, _ in combinations) else []
    with tempfile.TemporaryDirectory(prefix="scaling-parity-") as folder:
        spec_file = Path(folder) / "spec.json"
        spec_file.write_text(json.dumps(spec.to_json()))
        for world_size in dict.fromkeys(size for _, size in combinations):
            names = [name for name, size in combinations if size == world_size]
            while names:
                found = _launch(spec_file, names, world_size, steps, preload)
                curves += found
                names = names[len(found) :]
    order = {combination: i for i, combination in enumerate(combinations)}
    return sorted(curves, key=lambda curve: order[curve.backend, curve.world_size])


def compare(curves: Sequence[Curve], tolerance: float) -> list[Outcome]:
    """Each curve against the first that has steps."""
    reference = next((curve for curve in curves if curve.error is None), None)
    return [
        Outcome(curve.backend, curve.world_size, error=curve.error)
        if curve.error is not None or reference is None
        else _difference(reference, curve, tolerance)
        for curve in curves
    ]


def agree(outcomes: Sequence[Outcome], tolerance: float) -> bool:
    """Whether everything ran and nothing differs by more than the tolerance."""
    return all(
        outcome.error is None and max(outcome.loss, outcome.grad_norm, outcome.lr) <= tolerance for outcome in outcomes
    )


def report(spec: Spec, curves: Sequence[Curve], outcomes: Sequence[Outcome], tolerance: float) -> dict[str, Any]:
    """The outcome as plain JSON values, curves included."""
    return {
        "spec": spec.to_json(),
        "tolerance": tolerance,
        "agree": agree(outcomes, tolerance),
        "outcomes": strict([asdict(outcome) for outcome in outcomes]),
        "curves": strict([asdict(curve) for curve in curves]),
    }


def _difference(reference: Curve, curve: Curve, tolerance: float) -> Outcome:
    pairs = list(zip(curve.steps, reference.steps, strict=True))
    losses = [_apart(have["loss"], want["loss"]) for have, want in pairs]
    norms = [_apart(have["grad_norm"], want["grad_norm"]) for have, want in pairs]
    assert all(have["lr"].keys() == want["lr"].keys() for have, want in pairs), "the groups differ"
    lrs = [_apart(have["lr"][name], want["lr"][name]) for have, want in pairs for name in want["lr"]]
    first = next((i + 1 for i in range(len(pairs)) if max(losses[i], norms[i]) > tolerance), None)
    return Outcome(curve.backend, curve.world_size, max(losses), max(norms), max(lrs), first)


def _apart(have: float, want: float) -> float:
    """Relative difference. Where only one is finite, infinite: `max` would lose a NaN, and a broken run would agree."""
    if not (math.isfinite(have) and math.isfinite(want)):
        return 0.0 if math.isfinite(have) == math.isfinite(want) else math.inf
    return abs(have - want) / max(abs(want), 1e-12)


def _launch(spec_file: Path, names: Sequence[str], world_size: int, steps: int, preload: Sequence[str]) -> list[Curve]:
    """One launch of `world_size` processes; it ends after the first backend that fails, the rest is launched anew."""
    out = spec_file.with_name(f"curves-{world_size}.jsonl")
    out.unlink(missing_ok=True)
    errors = spec_file.with_name(f"errors-{world_size}")
    errors.unlink(missing_ok=True)
    _say(f"world size {world_size}: {', '.join(names)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        same = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    context, ranks = forks(*preload), [{**same, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(world_size)]
    running = [context.Process(target=_rank, args=(rank, errors, out, spec_file, names, steps)) for rank in ranks]
    for process in running:
        process.start()
    code = _ended(running)
    lines = out.read_text().splitlines() if out.exists() else []
    curves = [Curve(row["backend"], world_size, tuple(row["steps"]), row["error"]) for row in map(json.loads, lines)]
    if len(curves) < len(names) and all(curve.error is None for curve in curves):
        said = errors.read_text(errors="replace").splitlines()
        tail = " | ".join(line for line in said if "Error" in line)[-600:]
        curves.append(Curve(names[len(curves)], world_size, (), tail or f"exit code {code}"))
    return curves


def _ended(running: Sequence[BaseProcess]) -> int:
    """Wait for all of them; no rank survives another. The first exit code that is not 0."""
    waited = {process.sentinel: process for process in running}
    code = 0
    try:
        while waited and not code:
            for sentinel in wait(list(waited)):
                process = waited.pop(cast(int, sentinel))
                process.join()
                code = code or process.exitcode or 0
    finally:
        for process in waited.values():
            process.kill()
            process.join()
    return code


def _rank(
    environment: dict[str, str], errors: Path, out: Path, spec_file: Path, names: Sequence[str], steps: int
) -> None:
    """What each rank of a launch does; what it prints goes to the file `errors`."""
    os.environ.update(environment)
    with open(errors, "ab", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    _work(spec_file, out, names, steps)


def _work(spec_file: Path, out: Path, names: Sequence[str], steps: int) -> None:
    """Train each backend from the start, rank 0 noting the curves."""
    from scaling.engine.process import process_from_environment
    from scaling.models.recorded import look_at
    from scaling.profile.sinks import Memory
    from scaling.run import resolve, run

    with process_from_environment() as process:
        for name in names:
            memory, error = Memory(), None
            try:
                spec = load_spec(str(spec_file), _assignments(name, process.world_size))
                look_at(spec.model, ())
                run(resolve(spec, process.world_size), process, [memory], stop_after=steps)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}"[:600]
            if process.is_main:
                curve = [{"loss": s.loss, "grad_norm": s.grad_norm, "lr": s.lr} for s in memory.steps]
                with open(out, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"backend": name, "steps": curve, "error": error}) + "\n")
            if error is not None:
                if not process.is_main:
                    print(f"[rank {process.rank}] {error}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)  # other ranks may wait for this one: leave at once, the launch ends them


def _assignments(name: str, world_size: int) -> list[str]:
    backend = dict(BACKENDS[name])
    for halves in ("replicate", "zero_hpz_partition_size"):
        if halves in backend and world_size % 2:
            backend[halves] = 1  # one rank, or an odd number of them, has no halves
    return [f"backend={json.dumps(backend)}", "profile.interval=1", "validation=null", "tracking.tensorboard=false"]


def _combinations(backends: str, world_sizes: str) -> list[tuple[str, int]]:
    names = backends.split(",")
    for name in names:
        if name not in BACKENDS:
            raise UserError(f"`--backends` must be of {', '.join(BACKENDS)}, but has {name!r}; drop or correct it")
    sizes = world_sizes.split(",")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"`--world-sizes` must be positive numbers such as 1,2,4, but is {world_sizes!r}; correct it")
    found = [(name, 1 if name == "single" else int(size)) for name in names for size in sizes]
    return list(dict.fromkeys(found))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.parity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--spec", required=True, metavar="SPEC", help="a spec.json, a recipe's name, or - for stdin")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field; repeatable")
    parser.add_argument("--backends", default=DEFAULT_BACKENDS, help=f"of {','.join(BACKENDS)}")
    parser.add_argument("--world-sizes", default="1,2", help="numbers of processes (default 1,2)")
    parser.add_argument("--steps", type=positive, default=20, help="optimizer steps of each run (default 20)")
    parser.add_argument("--tolerance", type=float, help="relative (default: 1e-5 in fp32, 1e-2 in 16 bits)")
    parser.add_argument("--json", metavar="FILE", help="write differences and curves there")
    return parser


if __name__ == "__main__":
    run_program(main)
