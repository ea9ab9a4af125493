"""Run folders made by hand, of any course: a healthy run of 8 GPUs unless the caller says otherwise."""

import json
import math
from pathlib import Path
from typing import Any

from scaling.spec import load_spec

GiB = 2**30
START = 1_800_000_000.0
"""When made runs begin, seconds since 1970."""
PHASES = {"data": 0.004, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "communication": None, "other": 0.046}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; `changes` replace fields, objects are merged into those that are there."""
    line = {
        "step": number,
        "loss": 2.0 + 8.0 * math.exp(-number / 120),
        "grad_norm": 0.6 + 2.0 * math.exp(-number / 40),
        "lr": {"all": 6e-4 * min(1.0, number / 100)},
        "tokens": number * 524_288,
        "samples_seen": number * 512,
        "step_seconds": 1.0,
        "tokens_per_second": 524_288.0,
        "tokens_per_second_per_device": 65_536.0,
        "samples_per_second": 512.0,
        "mfu": 0.45,
        "mfu_of_mamf": None,
        "memory": {
            "allocated_peak_bytes": 60 * GiB,
            "active_peak_bytes": 62 * GiB,
            "reserved_peak_bytes": 66 * GiB,
            "device_used_bytes": 68 * GiB,
            "host_rss_bytes": 4 * GiB,
            "host_pinned_bytes": 0,
            "fragmentation": 0.05,
            "allocation_retries": 0,
            "out_of_memory_count": 0,
            "phases": {"forward": 50 * GiB, "backward": 60 * GiB, "optimizer": 40 * GiB},
        },
        "time": dict(PHASES),
        "pauses": {"validation": 0.0, "checkpoint": 0.0},
        "device": {
            "utilization": 0.97,
            "power_watts": 640.0,
            "temperature_c": 62.0,
            "clock_mhz": 1900.0,
            "max_clock_mhz": 1980.0,
            "throttle": [],
            "ecc_errors": 0,
            "xid_errors": 0,
        },
        "energy": {"joules_per_step": 5120.0, "joules_per_million_tokens": 9766.0},
        "ranks": None,
        "window_steps": 10,
        "warm_up": number <= 10,
        "wall_time": START + 30 + number,
        "skipped": False,
        "first_sample": (number - 1) * 512,
        "bad_ranks": [],
    }
    return merged(line, changes)


def merged(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`value` with `changes`, objects within objects likewise."""
    return value | {
        key: merged(value[key], new) if isinstance(new, dict) and isinstance(value.get(key), dict) else new
        for key, new in changes.items()
    }


def validation(number: int, loss: float | None = None) -> dict[str, Any]:
    """A line of validation.jsonl."""
    loss = 2.05 + 8.0 * math.exp(-number / 120) if loss is None else loss
    return {"step": number, "loss": loss, "bits_per_byte": None, "tokens": 100_000, "seconds": 2.0,
            "wall_time": START + 30 + number}  # fmt: skip


def event(name: str, at_s: float, number: int | None, **details: Any) -> dict[str, Any]:
    """A line of events.jsonl, `at_s` seconds after the start of the run."""
    return {"event": name, "wall_time": START + at_s, "step": number, "details": details}


def make_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    *,
    spec: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    validations: list[dict[str, Any]] | None = None,
    events: list[dict[str, Any]] | None = None,
    end: dict[str, Any] | None = None,
    device: str = "NVIDIA H100 80GB HBM3",
    world_size: int = 8,
) -> Path:
    """Write the files of a run of 400 steps, each replaced or merged with what is given; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    resolved = load_spec("gpt2-124m", ["profile.interval=10"]).to_json()
    memory = {
        "peak_allocated_bytes": 59 * GiB,
        "peak_reserved_bytes": 65 * GiB,
        "device_used_bytes": 67 * GiB,
        "low_bytes": 62 * GiB,
        "high_bytes": 70 * GiB,
        "peak_phase": "backward",
        "parts": {"parameters": GiB, "gradients": GiB, "optimizer": 2 * GiB, "activations": 50 * GiB,
                  "logits": 3 * GiB, "communication": GiB, "workspace": GiB, "framework": 0},
        "host_bytes": 0,
        "staging_bytes": GiB,
        "checkpoint_bytes": 2 * GiB,
    }  # fmt: skip
    parts = {
        "compute": 0.85,
        "communication_exposed": 0.03,
        "optimizer": 0.04,
        "offload_exposed": 0.0,
        "overhead": 0.03,
    }
    duration = {"step_seconds": 0.95, "tokens_per_second_per_gpu": 69_000.0, "mfu": 0.47, "parts": parts}
    estimate = {
        "schema_version": 1,
        "device": device,
        "world_size": world_size,
        "micro_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "memory": memory,
        "time": duration,
    }
    versions = {"scaling": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "python": "3.11.7"}
    machine = {"versions": versions, "commit": None, "world_size": world_size, "device": device, "cores": 64}
    lines = [step(number) for number in range(10, 401, 10)] if lines is None else lines
    last = lines[-1]["step"] if lines else 0
    if events is None:
        start = event("start", 0, 0, world_size=world_size, backend="fsdp", hosts=["node0"])
        save = event("checkpoint", 30 + last, last, seconds=4.0, bytes=2 * GiB, stall_seconds=0.2)
        events = [start, save, event("end", 32 + last, last, code=0, reason="done", rank=0)]
    end = {"code": 0, "reason": "done", "rank": 0, "step": last, "time": START + 32 + last} if end is None else end
    for name, value in {
        "spec": merged(resolved, spec or {}),
        "rendered": {"fsdp": {}},
        "plan": merged(estimate, plan or {}),
        "environment": machine,
        "exit": end,
    }.items():
        if value:
            (folder / f"{name}.json").write_text(json.dumps(value))
    if validations is None:
        validations = [validation(number) for number in range(100, last + 1, 100)]
    for name, entries in (("metrics", lines), ("validation", validations), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder
