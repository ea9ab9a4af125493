"""The curves of the page: columns of a run's records, thinned to what a screen can show.

A curve keeps the lowest and the highest value of each stretch that it is thinned to, so that no spike is lost; layers
of time, which are looked at as sums, keep means.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from scaling.summarize import RunData, is_number

ROWS = 2400
"""Records of a chart over all runs on the page: about two for each pixel across a wide screen."""
BARS = 480
"""Stretches of time in a chart of layers; the page joins more of them where the screen is small."""
MARKS = 400
"""Of one kind on the axis; more of them would be a line."""


@dataclass
class Grids:
    """The places on the x axis of all curves of a page, each list of records once."""

    values: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """"step", "time" (seconds since the run began) and "tokens" of some records; null is what is not known."""
    _known: dict[tuple[int, tuple[int, ...]], int] = field(default_factory=dict[tuple[int, tuple[int, ...]], int])

    def of(self, source: "Source", rows: Sequence[int]) -> int:
        """The place in `values` of these rows of the records of a run."""
        key = (source.number, tuple(rows))
        if key not in self._known:
            self._known[key] = len(self.values)
            columns = (source.steps, source.times, source.tokens)
            step, time, tokens = ([column[row] for row in rows] for column in columns)
            self.values.append({"step": step, "time": time, "tokens": tokens})
        return self._known[key]

    def points(self, steps: list[int], times: list[float | None]) -> int:
        """A grid of its own, for what is not in the records of steps."""
        self.values.append({"step": steps, "time": times, "tokens": None})
        return len(self.values) - 1


class Source:
    """The records of one run, column by column."""

    def __init__(self, run: RunData, number: int, name: str, runs: int) -> None:
        """`number` of `runs` that share the page."""
        self.run, self.number, self.name = run, number, name
        self.limit = max(200, ROWS // runs)
        self.records = run.steps
        self.steps: list[int] = [record["step"] for record in self.records]
        self.began, self.times = _times(run)
        self.tokens = run.column("tokens")

    @property
    def thinned(self) -> bool:
        """Whether the charts show fewer records than there are."""
        return len(self.records) > self.limit

    def since_start(self, wall_time: Any) -> float | None:
        """Seconds since the run began, of a time of day."""
        return round(wall_time - self.began, 2) if self.began is not None and is_number(wall_time) else None


def _times(run: RunData) -> tuple[float | None, list[float]]:
    """When the run began, and the seconds from then to each record; (None, time spent in steps) where that is unknown.

    A resumed run that was begun by a version that wrote no times has none.
    """
    walls = [wall for wall in run.column("wall_time") if wall is not None]
    spent = [(seconds or 0.0) * window for seconds, window in zip(run.column("step_seconds"), run.windows, strict=True)]
    if not walls or len(walls) < len(run.steps):
        return None, [round(seconds, 2) for seconds in accumulate(spent)]
    starts = [event["wall_time"] for event in run.events if event.get("event") == "start"]
    began = min([*starts, walls[0] - spent[0]])
    return began, [round(wall - began, 2) for wall in walls]


# ---------------------------------------------------------------- thinning


def extremes(columns: Sequence[Sequence[float | None]], limit: int) -> list[int]:
    """Rows to keep, at most about `limit`: of each stretch those where a column is lowest, highest, or begins a gap."""
    count = len(columns[0])
    if count <= limit:
        return list(range(count))
    kept = {0, count - 1}
    for begin, end in stretches(count, max(1, limit // (2 * len(columns)))):
        for column in columns:
            known = [value for value in column[begin:end] if value is not None]
            if known:
                kept.add(column.index(min(known), begin, end))
                kept.add(column.index(max(known), begin, end))
            if len(known) < end - begin:
                kept.add(column.index(None, begin, end))
    return sorted(kept)


def stretches(count: int, parts: int) -> Iterator[tuple[int, int]]:
    """`count` rows in at most `parts` stretches as equal as can be: where each begins, and where it ends."""
    parts = min(count, parts)
    edges = [count * part // parts for part in range(parts + 1)] if parts else [0]
    yield from pairwise(edges)


def means(column: Sequence[float | None], weights: Sequence[float], parts: int) -> list[float | None]:
    """The mean of each stretch, weighed; None where nothing is known."""
    found: list[float | None] = []
    for begin, end in stretches(len(column), parts):
        known = [(column[row], weights[row]) for row in range(begin, end) if column[row] is not None]
        whole = sum(weight for _, weight in known)
        found.append(sum(value * weight for value, weight in known) / whole if whole else None)  # pyright: ignore[reportOptionalOperand]
    return found


def short(values: Sequence[float | None]) -> list[float | None]:
    """`values` in six digits, which is more than a screen shows."""
    return [value if value is None or type(value) is int else float(f"{value:.6g}") for value in values]


# ---------------------------------------------------------------- charts


@dataclass(frozen=True)
class Curve:
    """One curve of a run."""

    name: str
    path: tuple[str, ...]
    colour: int = 0
    """Which of the page's colours, and of its kinds of dashes."""


def lines(
    grids: Grids, curves: Sequence[tuple[Source, Sequence[Curve]]], name: str, title: str, unit: str, **more: Any
) -> dict[str, Any] | None:
    """A chart of curves of one or several runs; None where there is no value for any. `more`: what else the chart has.

    Of several runs the colour is the run's; of one, the curve's.
    """
    several, smooth = len(curves) > 1, bool(more.get("smooth"))
    series = [one for source, some in curves for one in _curves(grids, source, some, several=several, smooth=smooth)]
    series += more.pop("extra", [])
    if not series:
        return None
    return {"id": name, "title": title, "unit": unit, "kind": "lines", "series": series, **more}


def _curves(
    grids: Grids, source: Source, curves: Sequence[Curve], *, several: bool, smooth: bool
) -> Iterator[dict[str, Any]]:
    columns = {curve: source.run.column(*curve.path) for curve in curves}
    columns = {curve: column for curve, column in columns.items() if any(value is not None for value in column)}
    if not columns:
        return
    rows = extremes(list(columns.values()), source.limit)
    for curve, column in columns.items():
        one: dict[str, Any] = {
            "name": source.name if several else curve.name,
            "run": source.number,
            "colour": source.number if several else curve.colour,
            "grid": grids.of(source, rows),
            "values": short([column[row] for row in rows]),
        }
        if smooth and source.thinned:  # lowest and highest values alone would lead a mean astray
            parts = source.limit // 2
            middles = [(begin + end) // 2 for begin, end in stretches(len(column), parts)]
            values = short(means(column, source.run.windows, parts))
            one["means"] = {"grid": grids.of(source, middles), "values": values}
        yield one


def layers(
    grids: Grids, source: Source, name: str, title: str, curves: Sequence[Curve], **more: Any
) -> dict[str, Any] | None:
    """A chart of seconds on top of one another; None where there is no value for any."""
    weights = source.run.windows
    count = len(source.records)
    parts = min(count, BARS)
    series = [
        {
            "name": curve.name,
            "run": source.number,
            "colour": curve.colour,
            "key": curve.path[-1],
            "values": short(found),
        }
        for curve in curves
        if any(found := means(layer_column(source, curve), weights, parts))
    ]
    if not series:
        return None
    ends = [end - 1 for _, end in stretches(count, parts)]
    grid = grids.of(source, ends)
    sums = [sum(weights[begin:end]) for begin, end in stretches(count, parts)]
    chart = {"id": name, "title": title, "unit": "seconds", "kind": "bars", "weights": sums, **more}
    return chart | {"series": [{**one, "grid": grid} for one in series]}


def layer_column(source: Source, curve: Curve) -> list[float | None]:
    """Seconds of a step; a pause's are spread over the steps of its record."""
    column = source.run.column(*curve.path)
    if curve.path[0] != "pauses":
        return column
    windows = source.run.windows
    return [None if value is None else value / window for value, window in zip(column, windows, strict=True)]


def band(grids: Grids, source: Source, quantity: str, title: str, unit: str) -> dict[str, Any] | None:
    """A chart of a quantity over the ranks: the mean, between the lowest and the highest; None where it is unknown."""
    low, mean, high = (source.run.column("ranks", "of", quantity, key) for key in ("min", "mean", "max"))
    if not any(value is not None for value in mean):
        return None
    rows = extremes([low, high], source.limit)
    picked = {
        key: short([column[row] for row in rows]) for key, column in (("low", low), ("values", mean), ("high", high))
    }
    one = {"name": "mean", "run": source.number, "colour": 0, "grid": grids.of(source, rows), **picked}
    return {"id": f"ranks-{quantity}", "title": title, "unit": unit, "kind": "band", "series": [one]}


def validation(grids: Grids, source: Source, several: bool) -> list[dict[str, Any]]:
    """The validations as dots, to be added to the chart of the loss; [] where there are none."""
    found = {line["step"]: line for line in source.run.validations if is_number(line.get("loss"))}
    if not found:
        return []
    rows = extremes([[line["loss"] for line in found.values()]], source.limit // 2)
    kept = [list(found.values())[row] for row in rows]
    grid = grids.points([line["step"] for line in kept], [source.since_start(line.get("wall_time")) for line in kept])
    name = f"{source.name}, validation" if several else "validation"
    one = {"name": name, "run": source.number, "colour": source.number if several else 1, "style": "dots"}
    return [{**one, "grid": grid, "values": short([line["loss"] for line in kept])}]


# ---------------------------------------------------------------- marks on the axis


def marks(source: Source) -> list[dict[str, Any]]:
    """What happened to the run as a whole: "kind", "step", "time", "text"."""
    found = [*_events(source), *_refused(source)]
    kept: list[dict[str, Any]] = []
    for kind in dict.fromkeys(mark["kind"] for mark in found):
        some = [mark for mark in found if mark["kind"] == kind]
        kept += [some[begin] for begin, _ in stretches(len(some), MARKS)]
    return kept


def _events(source: Source) -> Iterator[dict[str, Any]]:
    starts = 0
    kinds = {"start": "restart", "checkpoint": "checkpoint", "checkpoint_failed": "failed", "rollback": "rollback"}
    words = {"checkpoint": "checkpoint", "failed": "checkpoint failed", "rollback": "rollback"}
    for event in source.run.events:
        kind = kinds.get(str(event.get("event")))
        starts += kind == "restart"
        if kind is None or not is_number(event.get("step")) or (kind == "restart" and starts == 1):
            continue
        text = f"restart {starts - 1}" if kind == "restart" else words[kind]
        time = source.since_start(event.get("wall_time"))
        yield {"kind": kind, "run": source.number, "step": event["step"], "time": time, "text": text}


def _refused(source: Source) -> Iterator[dict[str, Any]]:
    for record, time in zip(source.records, source.times, strict=True):
        if record.get("skipped"):
            ranks = record.get("bad_ranks") or []
            blame = f" (rank {', '.join(map(str, ranks[:8]))})" if ranks else ""
            mark = {"kind": "refused", "run": source.number, "step": record["step"], "time": time}
            yield {**mark, "text": f"update refused, not finite{blame}"}
