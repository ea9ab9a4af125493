"""What stands on the page of several runs: their figures, what their specs differ in, and their curves in one chart."""

import json
from collections.abc import Sequence
from typing import Any

from scaling.report.blocks import Block, charts, leaves, section, stack, table
from scaling.report.charts import Curve, Grids, Source, lines, validation
from scaling.report.head import PEAK, findings
from scaling.report.words import NOT_KNOWN, PHASES, devices, exit_words, joules, loss_words, percent, rate_words, told
from scaling.summarize import names
from scaling.units import format_bytes, format_seconds
from scaling.view import Sheet

COMMON = ("device", "backend", "precision")
"""Figures that are said once where they are alike in all runs."""
ABSENT = "-"
"""What stands for a field that a spec does not have: a backend's own, of another backend."""
LONGEST = 120
"""Characters of a value of a spec in the table of differences."""


def comparison(grids: Grids, sources: Sequence[Source], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The content of the page of several runs."""
    figures = {source.name: _figures(report) for source, report in zip(sources, reports, strict=True)}
    alike = _alike(figures)
    sections = [
        section("runs", "The runs", [_runs(table(_summary(figures), wide=True))]),
        section("differences", "What their specs differ in", [table(differences(sources), wide=True)]),
        section("training", "Training", [charts(_training(grids, sources))]),
        section("speed", "Speed", _speed(grids, sources, reports)),
        section("memory", "Memory", _memory(grids, sources, reports)),
        section("device", "Device", [charts(_device(grids, sources))]),
    ]
    told_of = [
        finding for source, report in zip(sources, reports, strict=True) for finding in findings(report, source.name)
    ]
    return {
        "title": " · ".join(source.name for source in sources),
        "overline": f"comparison of {len(sources)} runs",
        "status": None,
        "facts": list(alike.values()),
        "tiles": [],
        "findings": told_of,
        "sections": [one for one in sections if one],
    }


# ---------------------------------------------------------------- tables


def _alike(figures: dict[str, dict[str, str]]) -> dict[str, str]:
    """What all runs have in common, taken out of their figures: it is said once."""
    rows = list(figures.values())
    alike = {name: rows[0][name] for name in COMMON if len({row[name] for row in rows}) == 1}
    for row in rows:
        for name in alike:
            del row[name]
    return {name: value for name, value in alike.items() if value}


def _summary(figures: dict[str, dict[str, str]]) -> Sheet:
    """A row for each run."""
    columns = next(iter(figures.values()))
    return Sheet("", ["run", *columns], [[name, *row.values()] for name, row in figures.items()])


def _runs(block: Block | None) -> Block | None:
    """A table whose rows are the runs: each with the line by which charts show it."""
    return block and {**block, "runs": list(range(len(block["rows"])))}


def _figures(report: dict[str, Any]) -> dict[str, str]:
    measured, good = report["measured"], report["goodput"] or {}
    peak = measured[PEAK]
    loss = report["loss"]["last"] if report["last_step"] is not None else None
    return {
        "device": devices(report) or "",
        "backend": report["backend"] or "",
        "precision": report["precision"] or "",
        "ended": exit_words(report["exit"]),
        ">steps": told(report["last_step"], "{:,}".format),
        ">loss": NOT_KNOWN if report["last_step"] is None else loss_words(loss),
        ">best validation": told(report["best_validation_loss"], loss_words),
        ">tokens/s": told(report["tokens_per_second"], rate_words),
        ">step": told(measured["step_seconds"], format_seconds),
        ">MFU": told(measured["mfu"], percent),
        ">goodput": told(good.get("share"), percent),
        ">peak memory": told(peak, format_bytes),
        ">predicted": told(report["predicted"][PEAK], format_bytes),
        ">host memory": told(measured["host_rss_bytes"] if peak is None else None, format_bytes),
        ">energy/1M tokens": told(report["energy"]["joules_per_million_tokens"], joules),
    }


def differences(sources: Sequence[Source]) -> Sheet:
    """A row for each field of the spec that is not alike in all, a column for each run.

    Null is as good as absent: kinds of backends have fields of their own, most of which nobody has set.
    """
    flat = [leaves(source.run.spec) for source in sources]
    fields = dict.fromkeys(field for one in flat for field in one)
    shown = {field: [_value(one, field) for one in flat] for field in fields}
    apart = {field: {ABSENT if value == "null" else value for value in values} for field, values in shown.items()}
    rows = [[field, *values] for field, values in shown.items() if len(apart[field]) > 1]
    return Sheet("", ["field", *(source.name for source in sources)], rows)


def _value(flat: dict[str, Any], field: str) -> str:
    if field not in flat:
        return ABSENT
    value = flat[field]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


# ---------------------------------------------------------------- charts


def _training(grids: Grids, sources: Sequence[Source]) -> list[Block | None]:
    loss = [(source, [Curve("", ("loss",))]) for source in sources]
    norm = [(source, [Curve("", ("grad_norm",))]) for source in sources]
    rates = [(source, [Curve("", ("lr", group))] if (group := _highest_group(source)) else []) for source in sources]
    dots = [one for source in sources for one in validation(grids, source, several=True)]
    return [
        lines(grids, loss, "loss", "Loss", "loss", wide=True, log=True, smooth=True, extra=dots),
        lines(grids, rates, "lr", "Learning rate, of the group with the highest", "lr", log=True, zero=True),
        lines(grids, norm, "grad-norm", "Gradient norm, before clipping", "plain", log=True, smooth=True),
    ]


def _highest_group(source: Source) -> str | None:
    rates = {name: source.run.highest("lr", name) or 0.0 for name in names(source.records, "lr")}
    return max(rates, key=lambda name: rates[name], default=None)


def _speed(grids: Grids, sources: Sequence[Source], reports: Sequence[dict[str, Any]]) -> list[Block | None]:
    each = [(source, [Curve("", ("tokens_per_second_per_device",))]) for source in sources]
    mfu = [(source, [Curve("", ("mfu",))]) for source in sources]
    seconds = [(source, [Curve("", ("step_seconds",))]) for source in sources]
    charted = [
        lines(grids, each, "tokens", "Tokens per second and device", "rate", zero=True),
        lines(grids, mfu, "mfu", "Model FLOPs utilisation", "percent", zero=True),
        lines(grids, seconds, "step-seconds", "Seconds of a step", "seconds", log=True, zero=True),
    ]
    sides = _sides(sources, [report["time_parts"] for report in reports])
    return [charts(charted), stack("A step", "seconds", sides, PHASES, values=True)]


def _memory(grids: Grids, sources: Sequence[Source], reports: Sequence[dict[str, Any]]) -> list[Block | None]:
    allocated = ("memory", "allocated_peak_bytes")
    host = ("memory", "host_rss_bytes")
    known = any(source.run.highest(*allocated) for source in sources)
    curves = [(source, [Curve("", allocated if known else host)]) for source in sources]
    title = "Allocated on the device, highest" if known else "Host memory, resident"
    parts: list[dict[str, Any]] = []
    for report in reports:
        sides, peak = report["memory_parts"], report["measured"][PEAK]
        parts.append(sides if sides["measured"] or peak is None else sides | {"measured": {"allocated": peak}})
    return [
        charts([lines(grids, curves, "memory", title, "bytes", wide=True, zero=True)]),
        stack("Tensors at the peak", "bytes", _sides(sources, parts), {}),
    ]


def _sides(sources: Sequence[Source], parts: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any] | None]:
    """Of each run what was predicted, and what was measured."""
    return {
        f"{source.name}, {side}": found[side]
        for source, found in zip(sources, parts, strict=True)
        for side in ("predicted", "measured")
    }


def _device(grids: Grids, sources: Sequence[Source]) -> list[Block | None]:
    power = [(source, [Curve("", ("device", "power_watts"))]) for source in sources]
    heat = [(source, [Curve("", ("device", "temperature_c"))]) for source in sources]
    return [
        lines(grids, power, "power", "Power", "watts", zero=True),
        lines(grids, heat, "temperature", "Temperature, highest", "celsius"),
    ]
