"""What stands on the page of one run, from top to bottom: plain values that page.js shows as they are.

A section holds blocks: charts, stacks (bars of parts), tables, documents, texts. One that has none is left out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scaling.report.blocks import Block, charts, document, leaves, parts_table, section, stack, table, text
from scaling.report.charts import Curve, Grids, Source, band, layers, lines, validation
from scaling.report.figures import MEMORY, TIMES, parsed
from scaling.report.head import PEAK, facts, findings, status, tiles
from scaling.report.words import (
    PHASES,
    energy_words,
    flags,
    loss_words,
    percent,
    predicted_and_measured,
    told,
)
from scaling.summarize import RunData, at, column, is_number, names
from scaling.units import format_bytes, format_count, format_seconds
from scaling.view import Sheet, backend_words

ROWS = 200
"""Of a table of events; the newest are shown."""
MEMORY_CURVES = (
    Curve("allocated, peak", ("memory", "allocated_peak_bytes"), 0),
    Curve("active, peak", ("memory", "active_peak_bytes"), 5),
    Curve("reserved, peak", ("memory", "reserved_peak_bytes"), 1),
    Curve("in use on the device", ("memory", "device_used_bytes"), 3),
    Curve("host, resident", ("memory", "host_rss_bytes"), 2),
    Curve("host, pinned", ("memory", "host_pinned_bytes"), 4),
)
DEVICE_CHARTS = (
    ("power", "Power", "watts", "power_watts"),
    ("temperature", "Temperature, highest", "celsius", "temperature_c"),
    ("utilization", "Utilisation", "percent", "utilization"),
    ("clock", "Clock", "megahertz", "clock_mhz"),
)
NORMS = 8
"""Curves of a chart of gradient norms: as many as there are colours."""
QUANTITIES = {
    "allocated_peak_bytes": ("Allocated at the peak", "bytes"),
    "host_rss_bytes": ("Host memory, resident", "bytes"),
    "temperature_c": ("Temperature", "celsius"),
    "clock_mhz": ("Clock", "megahertz"),
    "power_watts": ("Power", "watts"),
    "busy": ("Seconds of a step, without waiting for others", "seconds"),
}
"""What is told of all ranks -> its title and unit; what is not here is a phase of a step, in seconds."""


def single(grids: Grids, source: Source, report: dict[str, Any]) -> dict[str, Any]:
    """The content of the page of one run."""
    run = source.run
    name = report["name"] or source.name
    sections = [
        *_out_of_memory(run),
        section("training", "Training", [charts(_training(grids, source))]),
        section("speed", "Speed", _speed(grids, source, report)),
        section("time", "Where the time goes", _time(grids, source, report)),
        section("memory", "Memory", _memory(grids, source, report)),
        section("device", "Device", _device(grids, source, report)),
        section("ranks", "Ranks", _ranks(grids, source, report)),
        section("validation", "Validation", [table(_validations(run))]),
        section("checkpoints", "Checkpoints and restarts", _history(source, report)),
        section("configuration", "Configuration", _documents(run)),
        section("environment", "Versions and environment", [table(_environment(run))]),
    ]
    return {
        "title": str(name),
        "overline": "run report" if source.name == name else f"run report · {source.name}",
        "status": status(report["exit"]),
        "facts": facts(report),
        "tiles": tiles(report),
        "findings": findings(report),
        "sections": [one for one in sections if one],
    }


def _out_of_memory(run: RunData) -> Iterator[Block | None]:
    """The post-mortem, where there is one."""
    if not (oom := run.oom):
        return
    held, predicted = oom.get("held") or {}, oom.get("predicted") or {}
    place, step = str(oom.get("place", "")).replace("_", " "), oom.get("step")
    where = place if step is None else f"{place} {step}" if place == "step" else f"{place}, step {step}"
    asked = f" asked for {format_bytes(oom['asked_bytes'])} more, and" if is_number(oom.get("asked_bytes")) else ""
    keys = {
        "allocated_bytes": "{} of tensors",
        "reserved_bytes": "{} reserved by the allocator",
        "host_rss_bytes": "{} of host memory",
        "limit_bytes": "where the limit is {}",
    }
    holding = [word.format(format_bytes(held[key])) for key, word in keys.items() if is_number(held.get(key))]
    sides = {"predicted": predicted.get("parts"), "held": held.get("parts")}
    rows = [
        [
            str(one.get("command") or " ".join(flags(one.get("set") or {}))),
            told(one.get("predicted_bytes"), format_bytes),
            told(one.get("slower"), percent),
            str(one.get("sentence") or ""),
        ]
        for one in oom.get("suggestions") or []
    ]
    columns = ["flags", ">predicted", ">slower by", ""]
    yield section(
        "oom",
        "Out of memory",
        [
            text(f"In {where} rank {oom.get('rank')}, on {oom.get('device')},{asked} held {', '.join(holding)}."),
            text(str(oom.get("off_by") or "")),
            stack("Memory when it ran out", "bytes", sides, {}),
            parts_table("by category", sides, format_bytes),
            table(Sheet("What would fit, with the same global batch", columns, rows), wide=True),
            text(str(oom.get("message") or ""), "quote"),
        ],
        alarm=True,
    )


# ---------------------------------------------------------------- curves


def _training(grids: Grids, source: Source) -> list[Block | None]:
    groups = names(source.records, "lr")
    rates = [Curve(group, ("lr", group), number) for number, group in enumerate(groups)]
    loss, norm = [Curve("training", ("loss",))], [Curve("norm", ("grad_norm",), 3)]
    more = {"log": True, "smooth": True}
    dots = validation(grids, source, several=False)
    return [
        lines(grids, [(source, loss)], "loss", "Loss", "loss", wide=True, extra=dots, **more),
        lines(grids, [(source, rates)], "lr", "Learning rate", "lr", log=True, zero=True),
        lines(
            grids,
            [(source, norm)],
            "grad-norm",
            "Gradient norm, before clipping",
            "plain",
            levels=_level("clipped above", source.run.spec.get("max_grad_norm")),
            **more,
        ),
        *(_norms(grids, source, kind) for kind in ("layers", "groups")),
    ]


def _norms(grids: Grids, source: Source, kind: str) -> Block | None:
    """The norms of the gradient by layer or by group: of many the first, the last, and some in between."""
    known = names(source.records, "gradient_norms", kind)
    if len(known) < 2:  # the whole, of which there is a chart
        return None
    last = min(len(known), NORMS) - 1
    some = [known[number * (len(known) - 1) // last] for number in range(last + 1)]
    curves = [Curve(name, ("gradient_norms", kind, name), number) for number, name in enumerate(some)]
    title = f"Gradient norm by {kind.removesuffix('s')}, before clipping"
    if len(known) > NORMS:
        title += f" ({NORMS} of {len(known)})"
    return lines(grids, [(source, curves)], f"grad-norm-{kind}", title, "plain", log=True, smooth=True)


def _speed(grids: Grids, source: Source, report: dict[str, Any]) -> list[Block | None]:
    speed = [Curve("tokens/s", ("tokens_per_second",), 2)]
    mfu = [Curve("of the card's peak", ("mfu",), 3), Curve("of the fastest product measured", ("mfu_of_mamf",), 4)]
    predicted = _level("predicted", report["predicted"]["mfu"])
    known = any(report[side][key] is not None for side in ("predicted", "measured") for key in TIMES)
    sheet = predicted_and_measured(report, tuple(TIMES), "without the steps that warm up")
    found = [
        lines(grids, [(source, speed)], "tokens", "Tokens per second", "rate", zero=True),
        lines(grids, [(source, mfu)], "mfu", "Model FLOPs utilisation", "percent", zero=True, levels=predicted),
    ]
    return [charts(found), table(sheet) if known else None]


def _level(name: str, value: Any) -> list[dict[str, Any]]:
    return [{"name": name, "value": value, "run": 0}] if is_number(value) else []


def _time(grids: Grids, source: Source, report: dict[str, Any]) -> list[Block | None]:
    curves = [
        Curve(PHASES.get(name, name), (kind, name))
        for kind in ("time", "pauses")
        for name in names(source.records, kind)
    ]
    note = "A bar is a logged step, or the mean of several. What a pause took is spread over the steps of its record."
    sides = report["time_parts"]
    return [
        stack("A step, predicted and measured", "seconds", sides, PHASES, values=True),
        stack("The whole run", "seconds", {"": whole_time(report, source.run)}, PHASES, values=True),
        charts([layers(grids, source, "time-parts", "Seconds of a step", curves, wide=True, note=note)]),
    ]


def whole_time(report: dict[str, Any], run: RunData) -> dict[str, float] | None:
    """Seconds from the first start to the last sign of life, by what they went into; None where that is not known."""
    found, parts = report["goodput"], report["time_parts"]["measured"]
    whole = sum(parts.values())
    if found is None or not whole:
        return None
    spent = {name: found["useful_s"] * seconds / whole for name, seconds in parts.items()}
    spent |= {name: seconds for name, seconds in report["pauses"].items() if seconds}
    return spent | {"rest": max(0.0, found["wall_s"] - sum(spent.values()))}


# ---------------------------------------------------------------- memory


def _memory(grids: Grids, source: Source, report: dict[str, Any]) -> list[Block | None]:
    run = source.run
    title = "Memory, highest since the record before"
    levels = _level("predicted peak of tensors", report["predicted"][PEAK])
    curves = [curve for curve in MEMORY_CURVES if run.highest(*curve.path)]
    sides = report["memory_parts"]
    one_number = None if sides["measured"] else report["measured"][PEAK]
    bars: dict[str, Any] = {**sides, "measured": {"allocated, at the peak": one_number}} if one_number else sides
    keys = [key for key in (*MEMORY, "host_rss_bytes") if report["measured"][key] is not None]
    return [
        charts([lines(grids, [(source, curves)], "memory", title, "bytes", wide=True, zero=True, levels=levels)]),
        stack("Tensors at the peak, predicted and measured", "bytes", bars, {}),
        parts_table(_counted(run), sides, format_bytes),
        table(predicted_and_measured(report, keys, _allocator(run))) if keys else None,
    ]


def _counted(run: RunData) -> str:
    if not run.memory:
        return "by category"
    step, phase = run.memory.get("step"), run.memory.get("peak_phase")
    return f"by category, counted at step {step}, at the peak in {phase}"


def _allocator(run: RunData) -> str:
    """What the allocator had trouble with."""
    words: list[str] = []
    if (share := run.median("memory", "fragmentation")) is not None:
        words.append(f"fragmentation {percent(share)} at the median")
    if (retries := run.highest("memory", "allocation_retries")) is not None:
        words.append(f"{retries:,.0f} allocation retries")
    phases = {name: run.highest("memory", "phases", name) for name in names(run.steps, "memory", "phases")}
    if told_peaks := [f"{name} {format_bytes(peak)}" for name, peak in phases.items() if peak]:
        words.append(f"peaks by phase: {', '.join(told_peaks)}")
    return "; ".join(words)


# ---------------------------------------------------------------- device and ranks


def _device(grids: Grids, source: Source, report: dict[str, Any]) -> list[Block | None]:
    run = source.run
    found = [
        lines(grids, [(source, [Curve(title, ("device", key), number)])], name, title, unit, zero=unit == "percent")
        for number, (name, title, unit, key) in enumerate(DEVICE_CHARTS)
    ]
    reasons = Counter(str(reason) for step in run.steps for reason in at(step, "device", "throttle") or [])
    rows = [[reason, f"{count:,}", percent(count / len(run.steps))] for reason, count in reasons.most_common()]
    words = [f"Energy: {energy}"] if (energy := energy_words(report["energy"])) else []
    for key, what in (("ecc_errors", "memory errors (ECC)"), ("xid_errors", "driver errors (XID)")):
        count = sum(value or 0 for value in column(run.lines, "device", key))
        words += [f"{count:,.0f} {what}"] if count else []
    return [
        charts(found),
        table(Sheet("Throttled", ["reason", ">records", ">share"], rows)),
        text("; ".join(words)),
    ]


def _ranks(grids: Grids, source: Source, report: dict[str, Any]) -> list[Block | None]:
    quantities = names(source.records, "ranks", "of")
    titles = {
        name: QUANTITIES.get(name, (f"Seconds of a step: {PHASES.get(name, name)}", "seconds")) for name in quantities
    }
    found = [band(grids, source, name, *titles[name]) for name in sorted(titles, key=lambda name: name != "busy")]
    records = sum(one["records"] for one in report["slowest_ranks"])
    rows = [
        [str(one["rank"]), str(one["host"] or ""), str(one["device"] or ""), percent(one["records"] / records)]
        for one in report["slowest_ranks"][:8]
    ]
    columns = ["rank", "host", "device", ">of the records"]
    return [charts(found), table(Sheet("The slowest rank, how often", columns, rows))]


# ---------------------------------------------------------------- tables and documents


def _validations(run: RunData) -> Sheet:
    """The newest validations, the best marked."""
    known = [line["loss"] for line in run.validations if is_number(line.get("loss"))]
    best = min(known, default=None)
    rows = [
        [
            f"{line['step']:,}",
            loss_words(line.get("loss")),
            told(line.get("bits_per_byte"), "{:.4f}".format),
            told(line.get("tokens"), format_count),
            told(line.get("seconds"), format_seconds),
            "★ best" if line.get("loss") is not None and line["loss"] == best else "",
        ]
        for line in run.validations[-ROWS:]
    ]
    columns = [">after step", ">loss", ">bits per byte", ">tokens", ">took", ""]
    return Sheet("", columns, rows, _newest(len(run.validations)))


def _newest(count: int) -> str:
    return f"the newest {ROWS} of {count:,}" if count > ROWS else ""


def _history(source: Source, report: dict[str, Any]) -> list[Block | None]:
    rows: list[Sequence[str]] = []
    for event in source.run.events:
        since, step = source.since_start(event.get("wall_time")), event.get("step")
        name, details = str(event.get("event", "")).replace("_", " "), event.get("details") or {}
        rows.append([told(since, format_seconds), told(step, "{:,}".format), name, _details(details)])
    sheet = Sheet("", [">time", ">after step", "what", ""], rows[-ROWS:], _newest(len(rows)))
    good = report["goodput"]
    if good is None or good["share"] is None:
        return [table(sheet, wide=True)]
    useful, wall = format_seconds(good["useful_s"]), format_seconds(good["wall_s"])
    sentence = f"Goodput {percent(good['share'])}: {useful} of {wall} went into steps that count."
    return [text(sentence), table(sheet, wide=True)]


DETAILS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "world_size": ("{} ranks", str),
    "backend": ("{}", lambda backend: str(backend_words(backend) if isinstance(backend, dict) else backend)),
    "hosts": ("on {}", lambda hosts: ", ".join(map(str, hosts[:8]))),
    "bytes": ("{}", format_bytes),
    "seconds": ("took {}", format_seconds),
    "stall_seconds": ("training waited {}", format_seconds),
    "code": ("exit code {}", str),
    "rank": ("rank {}", str),
}
"""Of events: how each of their details is told. What is not here is told by its name, but for what no reader wants."""


def _details(details: dict[str, Any]) -> str:
    known = {name: value for name, value in details.items() if value is not None}
    words: list[str] = []
    for name, value in known.items():
        sentence, form = DETAILS.get(name, (name.replace("_", " ") + ": {}", str))
        try:
            words.append(sentence.replace("{}", form(value)))
        except (TypeError, ValueError):  # of another version, or of another hand
            words.append(f"{name}: {value}")
    return ", ".join(words)


def _documents(run: RunData) -> list[Block | None]:
    spec = parsed(run.spec)
    own = None if spec is None else list(leaves(spec.model_dump(mode="json", by_alias=True, exclude_defaults=True)))
    return [
        document("spec.json, as resolved", run.spec, own),
        document("rendered.json, what the backend got", run.rendered),
    ]


def _environment(run: RunData) -> Sheet:
    versions = run.environment.get("versions") or {}
    rows = [[str(name), told(version, str)] for name, version in versions.items()]
    rows += [
        [str(key), str(value)] for key, value in run.environment.items() if key != "versions" and value is not None
    ]
    return Sheet("", ["", ""], rows)
