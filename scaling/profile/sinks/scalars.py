"""Records as flat numbers with names, as dashboards take them: what stands before the slash is a group of curves."""

from typing import Any

from scaling.records import StepRecord, ValidationRecord
from scaling.summarize import at


def step_scalars(record: StepRecord) -> dict[str, float]:
    """All of a step that is a number; what is not known has no name."""
    memory = {name: value for name, value in record.memory.items() if name != "phases"}
    norms = record.gradient_norms or {}
    groups: dict[str, dict[str, Any]] = {
        "train": {
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "tokens": record.tokens,
            "samples": record.samples_seen,
            "skipped": int(record.skipped),
            "sequence_length": record.sequence_length,
        },
        "speed": {
            "step_seconds": record.step_seconds,
            "tokens_per_second": record.tokens_per_second,
            "tokens_per_second_per_device": record.tokens_per_second_per_device,
            "samples_per_second": record.samples_per_second,
            "mfu": record.mfu,
            "mfu_of_mamf": record.mfu_of_mamf,
        },
        "lr": record.lr,
        "gradient_norm_by_layer": norms.get("layers") or {},
        "gradient_norm_by_group": norms.get("groups") or {},
        "time": record.time,
        "pause": record.pauses,
        "memory": memory,
        "memory_by_phase": record.memory.get("phases") or {},
        "device": {**record.device, "throttled": int(bool(record.device.get("throttle")))} if record.device else {},
        "energy": record.energy,
        "ranks": _over_ranks(record),
    }
    return {
        f"{group}/{name}": float(value)
        for group, values in groups.items()
        for name, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _over_ranks(record: StepRecord) -> dict[str, Any]:
    quantities = at(record.ranks, "of") or {}
    return {
        f"{name}_{end}": values[end] for name, values in quantities.items() for end in ("min", "max") if end in values
    }


def validation_scalars(record: ValidationRecord) -> dict[str, float]:
    """The same of a validation."""
    found = {"validation/loss": record.loss, "validation/seconds": record.seconds}
    found |= {f"validation/{name}": value for name, value in record.measures.items()}
    return found if record.bits_per_byte is None else {**found, "validation/bits_per_byte": record.bits_per_byte}
