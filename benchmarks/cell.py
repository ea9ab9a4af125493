"""One row measured: the real command line in a process of its own, and what it has written; or a rehearsal."""

import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Device, Others, cores, is_busy, run_within
from benchmarks.matrix import Cell
from scaling.errors import UserError
from scaling.estimate.time import estimate_time
from scaling.hardware import Cluster, gpu_from_device_name
from scaling.run import Job, resolve
from scaling.run_folder import EXIT, MEMORY, METRICS, OOM
from scaling.spec import load_spec

ROOT = Path(__file__).resolve().parent.parent
COMMON = (
    # Every step is recorded, for the spread: what that costs, benchmarks.profiler tells.
    *("validation=null", "checkpoint=null", "profile.interval=1", "tracking.tensorboard=false"),
    "epochs=null",
    'schedule={"kind": "constant", "warmup_steps": 0}',
)
COUNTED = "profile.memory_step=2"
"""On a CPU no allocator counts: tensors are, one by one, in a step that warms up and is in no time."""
REHEARSED_STEPS = 5
DOES_NOT_FIT = 3
"""The exit code of a run that has run out of memory."""


def settings(cell: Cell, steps: int, *, counted: bool = False) -> list[str]:
    """All changes to the cell's spec. `counted`: with a step in which tensors are counted."""
    return [*COMMON, f"max_steps={steps}", *cell.settings, *([COUNTED] if counted else [])]


def resolved(cell: Cell) -> Job:
    """What the cell trains. Raises UserError."""
    return resolve(load_spec(cell.spec, settings(cell, 1)), cell.ranks)


def facts(job: Job) -> dict[str, Any]:
    """What a row says of the job, in the words of `scaling.plan --json` and `scaling.rehearse`."""
    plan = job.plan
    return {
        "world_size": plan.world_size,
        "global_batch_size": plan.global_batch,
        "micro_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "sequence_length": plan.sequence_length,
        "tokens_per_step": plan.global_tokens,
        "flops_per_token": job.flops_per_token,
        "parameters": sum(group.parameters for group in job.groups),
        "backend": job.spec.backend.model_dump(mode="json"),
        "activation_checkpointing": job.spec.activation_checkpointing,
        "precision": job.spec.precision,
        "compile": job.spec.compile,
    }


# ---------------------------------------------------------------- a run


def command(cell: Cell, run: Path, steps: int, kind: str) -> list[str]:
    """The command line of a cell, as a user would write it."""
    ranks = str(cell.ranks)
    if cell.launcher == "deepspeed":
        head = ["-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", str(_free_port())]
    elif cell.launcher == "python":
        head = []
    else:
        head = ["-m", "torch.distributed.run", "--nproc_per_node", ranks]
        head += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    words = [word for setting in settings(cell, steps, counted=kind == "cpu") for word in ("--set", setting)]
    return [sys.executable, *head, "launch/train.py", "--spec", cell.spec, "--run-dir", str(run), *words]


def measure(
    cell: Cell, folder: Path, steps: int, warm_up: int, here: Device, limit_s: float, root: Path
) -> dict[str, Any]:
    """Run the cell once, from the checkout `root`, into `folder`: what came of it. Whatever fails is a result."""
    threads = max(1, cores() // cell.ranks)
    found: dict[str, Any] = {"began": time.time(), "threads": threads if here.kind == "cpu" else None}
    others = Others()
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        code = _launch(command(cell, folder, steps, here.kind), threads, here.kind, log, limit_s, root)
    taken = others.cores()
    found |= {"seconds": time.time() - found["began"], "others_cores": taken, "busy": is_busy(taken)}
    if code == 0:
        return found | {"status": "ok", **read_run(folder, warm_up)}
    return found | _failure(folder, code, Path(log.name), limit_s)


def _launch(words: Sequence[str], threads: int, kind: str, log: Any, limit_s: float, root: Path) -> int | None:
    environment = {**os.environ, "PYTHONPATH": str(root)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    if kind == "cpu":
        environment["OMP_NUM_THREADS"] = str(threads)
    return run_within(limit_s, words, cwd=root, env=environment, output=log)


def _failure(folder: Path, code: int | None, log: Path, limit_s: float) -> dict[str, Any]:
    """Out of memory is said apart from other ends; the reason is the run's own, or the last lines of its output."""
    ended = _read(folder / EXIT) or {}
    if code is None:
        return {"status": "failed", "reason": f"took longer than {limit_s:.0f} s"}
    full = DOES_NOT_FIT in (ended.get("code"), code) or (folder / OOM).exists()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = ended.get("reason") or f"exit code {code}: {' / '.join(lines[-3:])}"[:600]
    return {"status": "out of memory" if full else "failed", "reason": reason, "exit_code": ended.get("code", code)}


def read_run(folder: Path, warm_up: int) -> dict[str, Any]:
    """Speed, memory and energy of a run folder, from the records after `warm_up` steps."""
    records = [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]
    warm = [record for record in records if not record["warm_up"] and record["step"] > warm_up]
    if not warm:
        raise UserError(f"`--steps` must leave some after warming up, but {len(records)} steps leave none; raise it")
    steps = sum(record["window_steps"] for record in warm)
    seconds = sum(record["step_seconds"] * record["window_steps"] for record in warm)
    tokens = sum(record["tokens_per_second"] * record["step_seconds"] * record["window_steps"] for record in warm)
    planned = _read(folder / "plan.json") or {}
    counted = _read(folder / MEMORY) or {}
    joules = [record["energy"]["joules_per_million_tokens"] for record in warm]
    return {
        "steps": steps,
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_per_device": tokens / seconds / planned["world_size"],
        "step_seconds": _spread([record["step_seconds"] for record in warm]),
        "mfu": _mean([record["mfu"] for record in warm]),
        "last_loss": records[-1]["loss"],
        "memory": _memory(records, counted),
        "predicted": {"memory": planned["memory"], "time": planned["time"]},
        "joules_per_million_tokens": _mean(joules),
    }


def _memory(records: list[dict[str, Any]], counted: dict[str, Any]) -> dict[str, Any]:
    """Peaks over all steps: on a GPU its allocator's, on a CPU those of tensors that were counted in one step."""
    names = ("allocated_peak_bytes", "reserved_peak_bytes", "device_used_bytes", "host_rss_bytes")
    peaks = {name: max(record["memory"][name] or 0 for record in records) or None for name in names}
    allocated = peaks["allocated_peak_bytes"]
    return {
        "peak_allocated_bytes": allocated or counted.get("peak_allocated_bytes"),
        "method": "the allocator" if allocated else counted.get("method"),
        "peak_reserved_bytes": peaks["reserved_peak_bytes"],
        "device_used_bytes": peaks["device_used_bytes"],
        "host_rss_bytes": peaks["host_rss_bytes"],
    }


def _spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


# ---------------------------------------------------------------- a rehearsal


def rehearse(cell: Cell, folder: Path, here: Device, limit_s: float, root: Path) -> dict[str, Any]:
    """Rank 0 of the cell's ranks, alone on this device, by the checkout `root`: memory, and a GPU's time for its work.

    What it would wait for the others is the planner's, and so are the times with it: they have names of their own.
    """
    words = [word for setting in settings(cell, 1) for word in ("--set", setting)]
    folder.mkdir()
    out, log = folder / "rehearsed.json", folder / "log"
    ranks = ("--world-size", str(cell.ranks), "--steps", str(REHEARSED_STEPS))
    head = [sys.executable, "-m", "scaling.rehearse", "--spec", cell.spec, *ranks, "--json", str(out)]
    began, others = time.time(), Others()
    with log.open("w") as file:
        code = _launch([*head, *words], cores(), here.kind, file, limit_s, root)
    taken = others.cores()
    found: dict[str, Any] = {"began": began, "seconds": time.time() - began, "others_cores": taken}
    found["busy"] = is_busy(taken)
    report = _read(out)
    if code != 0 or report is None:
        return found | _failure(folder, code, log, limit_s)
    names = ("peak_allocated_bytes", "method", "peak_reserved_bytes", "device_used_bytes")
    found |= {
        "status": "ok",
        "memory": {name: report["memory"].get(name) for name in names},
        "predicted": {"memory": report["predicted"], "time": None},
        "compute_seconds": report["compute_seconds"],
    }
    if report["compute_seconds"] is not None:
        found |= _beside_others(cell, here, report["compute_seconds"])
    return found


def _beside_others(cell: Cell, here: Device, compute_s: float) -> dict[str, Any]:
    """The rate of the rehearsed rank's own work, and with the communication that is predicted for one node."""
    job = resolved(cell)
    gpu, tokens = gpu_from_device_name(here.name), job.plan.global_tokens
    peak = None if gpu is None else gpu.peak_flops(job.spec.precision)
    rate = tokens / job.plan.world_size / compute_s
    flops = job.flops_per_token
    found: dict[str, Any] = {
        "compute_only_tokens_per_second_per_device": rate,
        "compute_only_mfu": None if peak is None or flops is None else rate * flops / peak,
        "predicted_communication_seconds": None,
        "predicted_tokens_per_second": None,
    }
    if gpu is None:
        return found
    try:
        cluster = Cluster(1, cell.ranks, gpu)
        planned = estimate_time(job.spec, job.plan, job.groups, job.rendered, cluster)
    except UserError:
        return found
    waits = planned.parts["communication_exposed"]
    both = {"predicted_communication_seconds": waits, "predicted_tokens_per_second": tokens / (compute_s + waits)}
    return found | both


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
