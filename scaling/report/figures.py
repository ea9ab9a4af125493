"""The figures of a run: what its plan.json predicted, and what its metrics.jsonl measured."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from scaling.doctor import examine
from scaling.errors import UserError
from scaling.run_folder import METRICS
from scaling.summarize import RunData, at, column, goodput, is_number, names, read_run
from scaling.view import backend_words

SCHEMA_VERSION = 1
MEMORY = {
    "peak_allocated_bytes": ("allocated_peak_bytes", "memory of tensors, at the peak"),
    "peak_reserved_bytes": ("reserved_peak_bytes", "memory that the allocator holds"),
    "device_used_bytes": ("device_used_bytes", "memory in use on the device"),
}
"""Predicted key -> measured key, and what it is."""
TIMES = {
    "step_seconds": ("step_seconds",),
    "tokens_per_second_per_gpu": ("tokens_per_second_per_device",),
    "mfu": ("mfu",),
}
"""Predicted key -> where the measured value is in a record."""


def run_report(folder: Path) -> dict[str, Any]:
    """Predicted and measured figures of the run in `folder`, as plain JSON values; null is what is not known.

    Raises UserError where the folder holds no run.
    """
    return figures(read_logged(folder))


def read_logged(folder: Path) -> RunData:
    """The run in `folder`. Raises UserError where there is none, or one of which nothing can be told yet."""
    run = read_run(folder)
    if not (run.steps or run.exit or run.oom):
        raise UserError(
            f"RUN_DIR must be the folder of a run, but {str(folder)[:200]} has no logged step in {METRICS}; "
            "name another, or let the run log one"
        )
    return run


def figures(run: RunData) -> dict[str, Any]:
    """As `run_report`, of a run that has been read."""
    plan, steps = run.plan, run.steps
    predicted = {key: at(plan, "memory", key) for key in MEMORY} | {key: at(plan, "time", key) for key in TIMES}
    predicted |= {"host_rss_bytes": None}
    measured = {key: run.highest("memory", own) for key, (own, _) in MEMORY.items()}
    if measured["peak_allocated_bytes"] is None:  # on a CPU, which has no allocator to ask
        measured["peak_allocated_bytes"] = run.memory.get("peak_allocated_bytes")
    measured |= {key: run.median(*path, of=run.settled) for key, path in TIMES.items()}
    measured |= {"host_rss_bytes": run.highest("memory", "host_rss_bytes")}
    best = _best_validation(run)
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(run.folder),
        "name": run.spec.get("name"),
        "model": _model(run.spec),
        "backend": backend_words(run.spec.get("backend") or {}),
        "precision": run.spec.get("precision"),
        "device": plan.get("device"),
        "world_size": plan.get("world_size"),
        "max_steps": run.spec.get("max_steps"),
        "logged_steps": len(steps),
        "last_step": steps[-1]["step"] if steps else None,
        "loss": {"first": steps[0].get("loss"), "last": steps[-1].get("loss")}
        if steps
        else dict(first=None, last=None),
        "best_validation_loss": best and best["loss"],
        "best_validation_step": best and best["step"],
        "exit": run.exit or None,
        "predicted": predicted,
        "measured": measured,
        "measured_to_predicted": {key: _ratio(measured[key], predicted[key]) for key in measured},
        "tokens_per_second": run.median("tokens_per_second", of=run.settled),
        "memory_parts": {"predicted": at(plan, "memory", "parts"), "measured": run.memory.get("parts")},
        "time_parts": {"predicted": at(plan, "time", "parts"), "measured": time_parts(run)},
        "goodput": _goodput(run),
        "pauses": pauses(run),
        "energy": energy(run),
        "slowest_ranks": _slowest(run),
        "findings": _findings(run),
    }


def _findings(run: RunData) -> list[dict[str, Any]]:
    """What the doctor has to say of the run: "rule", "severity", "title", "evidence", "threshold", "advice", "set"."""
    return [dataclasses.asdict(finding) for finding in examine(run)]


def time_parts(run: RunData) -> dict[str, float]:
    """Seconds of a step by phase: the mean over the records whose times count, each weighed by its steps."""
    settled = {id(step) for step in run.settled}
    weights = [window if id(step) in settled else 0 for step, window in zip(run.steps, run.windows, strict=True)]
    found: dict[str, float] = {}
    for name in names(run.steps, "time"):
        weighed = zip(run.column("time", name), weights, strict=True)
        known = [(value, weight) for value, weight in weighed if value is not None and weight]
        if known:
            found[name] = sum(value * weight for value, weight in known) / sum(weight for _, weight in known)
    return found


def pauses(run: RunData) -> dict[str, float]:
    """Seconds that training stood still in all, by reason; those of steps that were taken again count too."""
    return {
        name: sum(value for value in column(run.lines, "pauses", name) if value is not None)
        for name in names(run.lines, "pauses")
    }


def _best_validation(run: RunData) -> dict[str, Any] | None:
    known = [line for line in run.validations if is_number(line.get("loss"))]
    return min(known, key=lambda line: line["loss"], default=None)


def _goodput(run: RunData) -> dict[str, Any] | None:
    found = goodput(run)
    if found is None:
        return None
    return {"share": found.share, "useful_s": found.useful_s, "wall_s": found.wall_s, "starts": found.starts}


def energy(run: RunData) -> dict[str, float | None]:
    """Joules: of a step and of a million tokens at the median, and of all steps ever taken."""
    each, windows = column(run.lines, "energy", "joules_per_step"), column(run.lines, "window_steps")
    spent = [(value, window or 1) for value, window in zip(each, windows, strict=True) if value is not None]
    kinds = ("joules_per_step", "joules_per_million_tokens")
    return {kind: run.median("energy", kind, of=run.settled) for kind in kinds} | {
        "joules": sum(value * window for value, window in spent) if spent else None
    }


def _slowest(run: RunData) -> list[dict[str, Any]]:
    """Ranks that were the slowest in some record, the most frequent first: "rank", "host", "device", "records"."""
    named = [one for step in run.settled if isinstance(one := at(step, "ranks", "slowest"), dict)]
    counted = Counter((one.get("rank"), one.get("host"), one.get("device")) for one in named)
    keys = ("rank", "host", "device", "records")
    return [dict(zip(keys, (*who, count), strict=True)) for who, count in counted.most_common()]


def _model(spec: dict[str, Any]) -> dict[str, Any]:
    """ "kind", "parameters" and "trainable_parameters"; null where this version does not know the spec."""
    from scaling.groups import resolve_groups
    from scaling.inventory import parameters

    found: dict[str, Any] = {"kind": at(spec, "model", "kind"), "parameters": None, "trainable_parameters": None}
    if (known := parsed(spec)) is None:
        return found
    try:
        groups = resolve_groups(known.param_groups, known.optimizer, parameters(known.model, known.lora))
    except UserError:
        return found
    found["parameters"] = sum(group.parameters for group in groups)
    found["trainable_parameters"] = sum(group.parameters for group in groups if not group.frozen)
    return found


def parsed(spec: dict[str, Any]) -> Any:
    """The `Spec` that a run folder's spec.json holds; None where this version of the package refuses it."""
    from scaling.spec.document import document_of
    from scaling.spec.load import parse_spec

    try:
        return parse_spec(document_of("spec.json", json.dumps(spec)))
    except UserError:
        return None


def _ratio(measured: float | None, predicted: float | None) -> float | None:
    return measured / predicted if measured is not None and predicted else None
