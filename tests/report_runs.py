"""Made-up run folders with all that a report can show: restarts, refused steps, ranks, a post-mortem."""

import json
import math
import random
from pathlib import Path
from typing import Any

from made_runs import START, GiB, event, make_run, step, validation

PARTS = {
    "parameters": GiB,
    "gradients": GiB,
    "optimizer": 2 * GiB,
    "activations": 52 * GiB,
    "logits": 3 * GiB,
    "communication": GiB,
    "workspace": GiB,
    "other": GiB // 4,
}
LAST, REFUSED, KILLED_AT, SAVED_AT = 400, 237, 180, 150
"""Steps: the run was killed at one, and went on from the checkpoint at another."""
SPEC = {"max_steps": LAST, "schedule": {"warmup_steps": 100}}


def full_run(folder: Path, *, seed: int = 0, speed: float = 1.0, spec: dict[str, Any] | None = None) -> Path:
    """A run of 400 logged steps that was killed once, refused a step, failed to save once, and ended well."""
    noise = random.Random(seed)
    lines, now = [], START + 30
    for number in [*range(1, KILLED_AT + 1), *range(SAVED_AT + 1, LAST + 1)]:
        line = _line(number, noise, speed)
        lost = 60 if lines and number < lines[-1]["step"] else 0
        now += lost + line["step_seconds"] + sum(line["pauses"].values())
        lines.append(line | {"wall_time": now})
    at = {line["step"]: line["wall_time"] - START for line in lines}
    place = {"backend": "fsdp", "world_size": 8, "hosts": ["node0"]}
    events = [event("start", 0, 0, **place)]
    for number in range(50, LAST + 1, 50):
        if number == 300:
            events.append(event("checkpoint_failed", at[number] + 1, number, reason="no space left on device"))
        else:
            events.append(event("checkpoint", at[number] + 1, number, seconds=4.0, bytes=2 * GiB, stall_seconds=0.2))
        if number == SAVED_AT:
            events.append(event("start", at[KILLED_AT] + 60, SAVED_AT, **place))
    events.append(event("rollback", at[262], 250))
    events.append(event("end", at[LAST] + 3, LAST, code=0, reason="done", rank=0))
    checks = [validation(number) | {"wall_time": START + at[number]} for number in range(50, LAST + 1, 50)]
    make_run(folder, lines, spec=SPEC | (spec or {}), events=events, validations=checks)
    counted = {"step": 20, "method": "allocator", "peak_phase": "backward", "phases": {}, "parts": PARTS}
    (folder / "memory.json").write_text(json.dumps(counted | {"peak_allocated_bytes": sum(PARTS.values())}))
    return folder


def _line(number: int, noise: random.Random, speed: float) -> dict[str, Any]:
    def near(value: float, share: float = 0.03) -> float:
        return value * (1 + share * noise.gauss(0, 1))

    phases = {"data": 0.005, "forward": 0.3, "backward": 0.6, "optimizer": 0.05, "communication": 0.07, "other": 0.03}
    phases = {name: abs(near(seconds)) / speed for name, seconds in phases.items()}
    seconds = sum(phases.values())
    refused = number == REFUSED
    of = {"busy": seconds, "allocated_peak_bytes": 60 * GiB, "temperature_c": 62.0}
    spread = {
        name: {"min": near(0.97 * mean, 0.005), "mean": mean, "max": near(1.05 * mean, 0.01), "lowest": 2, "highest": 5}
        for name, mean in of.items()
    }
    slowest = {"rank": 5 if noise.random() < 0.8 else 1, "host": "node0", "device": "5", "seconds": seconds}
    return step(
        number,
        loss=None if refused else near(2 + 8 * math.exp(-number / 120), 0.01),
        grad_norm=None if refused else near(0.6 + 2 * math.exp(-number / 40), 0.1),
        step_seconds=seconds,
        tokens_per_second=524_288 / seconds,
        tokens_per_second_per_device=65_536 / seconds,
        mfu=0.45 / seconds,
        time=phases,
        pauses={"validation": 2.0 * (number % 50 == 0), "checkpoint": 0.2 * (number % 50 == 0)},
        memory={"allocated_peak_bytes": int(near(60 * GiB, 0.004)), "host_rss_bytes": int((4 + number / 300) * GiB)},
        device={
            "power_watts": near(640),
            "temperature_c": near(62),
            "clock_mhz": near(1880, 0.01),
            "throttle": ["sw_power_cap"] if noise.random() < 0.2 else [],
        },
        ranks={"count": 8, "of": spread, "slowest": slowest, "fastest": slowest | {"rank": 2}},
        window_steps=1,
        warm_up=number in (1, 2, SAVED_AT + 1),
        skipped=refused,
        bad_ranks=[3] if refused else [],
        gradient_norms={
            "layers": {f"layers.{layer}": None if refused else near(0.2, 0.1) for layer in range(12)},
            "groups": {"all": None if refused else near(0.6, 0.1)},
        },
    )


def out_of_memory_run(folder: Path) -> Path:
    """A run that ran out of memory in its 38th step."""
    end = {"code": 3, "reason": "`batch.micro_batch_size` must be smaller, but is 16; use 8", "rank": 3, "step": 37}
    make_run(folder, [step(number, window_steps=1) for number in range(1, 38)], end=end)
    plan = json.loads((folder / "plan.json").read_text())
    held = {"allocated_bytes": 74 * GiB, "reserved_bytes": 77 * GiB, "host_rss_bytes": 4 * GiB, "limit_bytes": 79 * GiB}
    change = {"batch.micro_batch_size": 8, "batch.gradient_accumulation_steps": 8}
    command = " ".join(f"--set {name}={value}" for name, value in change.items())
    suggestion = {
        "set": change,
        "command": command,
        "predicted_bytes": 38 * GiB,
        "slower": 0.04,
        "sentence": "half of it",
    }
    told = {
        "schema_version": 1,
        "place": "step",
        "step": 38,
        "rank": 3,
        "device": "NVIDIA H100 80GB HBM3",
        "asked_bytes": 2 * GiB,
        "message": "CUDA out of memory. </script><img src=x> <!-- Tried to allocate 2.00 GiB.",
        "held": {**held, "parts": PARTS | {"activations": 66 * GiB}},
        "predicted": plan["memory"],
        "off_by": "Activations hold 66 GiB where 50 GiB were predicted.",
        "suggestions": [suggestion],
    }
    (folder / "oom.json").write_text(json.dumps(told))
    return folder


def bare_run(folder: Path) -> Path:
    """A run of a version that recorded less: no spec, no events, no times of day, no phases."""
    folder.mkdir(parents=True, exist_ok=True)
    memory = {"peak_allocated_bytes": 10 * GiB, "peak_reserved_bytes": 11 * GiB, "device_used_bytes": 12 * GiB}
    plan = {"device": "NVIDIA H200", "world_size": 8, "memory": memory, "time": None}
    held = {
        "allocated_peak_bytes": 9 * GiB,
        "reserved_peak_bytes": None,
        "device_used_bytes": None,
        "host_rss_bytes": 5,
    }
    lines = [
        {"step": number, "loss": 1 / number, "step_seconds": 2.0, "mfu": None, "tokens_per_second_per_device": 50.0,
         "memory": held}
        for number in range(1, 30)
    ]  # fmt: skip
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
