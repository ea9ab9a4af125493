"""The live view as lines of text: what is on it, and what of it fits. Draws nothing, and knows no terminal."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaling.profile.sinks.series import ASCII_BLOCKS, BLOCKS, Series, chart
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.summarize import at, is_number
from scaling.units import format_bytes, format_count, format_seconds

LEAST_WIDTH, LEAST_HEIGHT = 40, 12
"""Columns and rows of the smallest terminal that a view is any use on."""
_LABEL = 12
"""Columns of the names on the left."""
_GAP = "  "

Line = list[tuple[str, str]]
"""Pieces of text, each with its style in rich's words."""

PHASES = {
    "data": ("d", "yellow", "data"),
    "forward": ("f", "cyan", "fwd"),
    "backward": ("b", "blue", "bwd"),
    "optimizer": ("o", "green", "opt"),
    "communication": ("c", "magenta", "comm"),
    "other": ("-", "white", "other"),
}
"""Letter and colour of each phase in the bar of a step, and a short name. Letters: not everyone tells colours apart."""


@dataclass(frozen=True)
class About:
    """What is known of a run before it begins."""

    name: str
    place: str
    """Backend, devices and precision, in words."""
    predicted: dict[str, Any]
    """Memory, as in plan.json."""
    capacity_bytes: int | None
    """Of the device; None where it is not known."""
    clip: float | None
    """The norm that gradients are clipped to."""
    checkpoint_interval: int | None
    """Steps between two; None: nothing is saved."""


class Story:
    """What a run has told so far."""

    def __init__(self, about: About) -> None:
        self.about = about
        self.first_step = self.last_step = 0
        self.began = 0.0
        """Seconds since 1970, as all times here."""
        self.losses = Series()
        self.best: tuple[float, int] | None = None
        self.record: StepRecord | None = None
        self.refused = self.records = self.clipped = 0
        self.speeds: deque[float] = deque(maxlen=200)
        self.step_seconds: deque[float] = deque(maxlen=200)
        self.validation: ValidationRecord | None = None
        self.best_validation: tuple[float, int] | None = None
        self.saved: Event | None = None
        self.failed: Event | None = None
        self.warnings: deque[str] = deque(maxlen=3)

    def step(self, record: StepRecord) -> None:
        """Take note of a step."""
        self.record = record
        self.records += 1
        self.refused += record.skipped
        self.clipped += self.about.clip is not None and record.grad_norm > self.about.clip
        self.loss(record.loss, record.step)
        if not record.warm_up or not self.speeds:
            self.speeds.append(record.tokens_per_second)
            self.step_seconds.append(record.step_seconds)

    def loss(self, value: float, step: int) -> None:
        """Take note of a loss, of an earlier start too."""
        self.losses.add(value)
        if is_number(value) and (self.best is None or value < self.best[0]):
            self.best = (value, step)

    def validate(self, record: ValidationRecord) -> None:
        """Take note of a validation."""
        self.validation = record
        if is_number(record.loss) and (self.best_validation is None or record.loss < self.best_validation[0]):
            self.best_validation = (record.loss, record.step)

    def event(self, event: Event) -> None:
        """Take note of an event."""
        if event.event == "checkpoint":
            self.saved, self.failed = event, None
        elif event.event == "checkpoint_failed":
            self.failed = event


def lines(story: Story, width: int, height: int, now: float, *, ascii_only: bool = False) -> list[Line]:
    """The view in at most `height` lines; names and warnings may be longer than `width`.

    Blocks go by their importance: the least important are left out where room is short, and shown larger where there is
    some to spare.
    """
    blocks = [(importance, sizes) for importance, sizes in _blocks(story, width, now, ascii_only) if sizes[0]]
    chosen: dict[int, list[Line]] = {}
    left = height
    for place, (_, sizes) in sorted(enumerate(blocks), key=lambda one: one[1][0]):
        if len(sizes[0]) <= left:
            chosen[place], left = sizes[0], left - len(sizes[0])
    for place in sorted(chosen, key=lambda place: blocks[place][0]):
        for larger in blocks[place][1][1:]:
            if len(larger) - len(chosen[place]) <= left:
                left -= len(larger) - len(chosen[place])
                chosen[place] = larger
    return [line for place in sorted(chosen) for line in chosen[place]]


def _blocks(story: Story, width: int, now: float, ascii_only: bool) -> list[tuple[int, list[list[Line]]]]:
    """(importance, its sizes from the smallest, each a list of lines) in their order on the screen."""
    record = story.record
    progress = [_title(story, width, ascii_only), _progress(story, width, now, ascii_only)]
    if record is None:
        waits = [_row(width, "", ("the first record comes after the first steps, which are the slowest", "dim"))]
        return [(0, [progress]), (1, [waits]), (2, [_warnings(story)]), (3, [[_checkpoint(story, width, now)]])]
    return [
        (0, [progress]),
        (1, _loss(story, width, ascii_only)),
        (6, [_validation(story, width)]),
        (7, [[_gradient(story, record, width)]]),
        (3, [[_speed(story, record, width)]]),
        (8, _time(record, width)),
        (4, _memory(story, record, width, ascii_only)),
        (9, [[_rates(record, width)]]),
        (10, [_device(record, width, ascii_only)]),
        (11, [_ranks(record, width)]),
        (5, [[_checkpoint(story, width, now)]]),
        (2, [_warnings(story)[-1:], _warnings(story)]),
    ]


def _row(width: int, label: str, *pieces: tuple[str, str] | None) -> Line:
    """A name and what is said of it, as many pieces as fit; the first in any case."""
    found: Line = [(label.ljust(_LABEL), "dim")]
    room = width - _LABEL
    for piece in pieces:
        if piece is None:
            continue
        room -= len(piece[0])
        if room < 0 and len(found) > 1:
            break
        found += [piece, (_GAP, "")]
        room -= len(_GAP)
    return found


# ---------------------------------------------------------------- blocks


def _title(story: Story, width: int, ascii_only: bool) -> Line:
    dash = "-" if ascii_only else "─"
    name, place = story.about.name, story.about.place
    rest = max(0, width - len(name) - len(place) - 6)
    return [(dash * 2 + " ", "dim"), (name, "bold"), (f"{_GAP}{place} ", ""), (dash * rest, "dim")]


def _progress(story: Story, width: int, now: float, ascii_only: bool) -> Line:
    step = story.record.step if story.record else story.first_step
    done = step / story.last_step if story.last_step else 0.0
    text = f"step {step:,}/{story.last_step:,}{_GAP}{done:.1%}"
    times = [f"{format_seconds(max(0, round(now - story.began)))} elapsed"]
    if story.step_seconds:
        left_s = (story.last_step - step) * statistics.median(story.step_seconds)
        times.append(f"{format_seconds(left_s if left_s < 1 else round(left_s))} left")
    room = width - len(text) - len(_GAP.join(times)) - 2 * len(_GAP)
    if room < 8 and len(times) > 1:
        room += len(times.pop(0)) + len(_GAP)
    return [(text + _GAP, ""), *_bar(done, max(0, room), "green", ascii_only), (_GAP + _GAP.join(times), "")]


def _bar(share: float, width: int, style: str, ascii_only: bool, mark: float | None = None) -> Line:
    """`width` cells of which a share is filled; `mark`: a line at this share, red what is filled beyond."""
    full, empty, line = ("#", ".", "|") if ascii_only else ("█", "·", "┃")
    filled = round(width * min(1.0, max(0.0, share)))
    if mark is None:
        return [(full * filled, style), (empty * (width - filled), "dim")]
    at_cell = min(width - 1, round(width * max(0.0, mark)))
    before, after = min(filled, at_cell), max(0, filled - at_cell - 1)
    return [
        (full * before, style),
        (empty * (at_cell - before), "dim"),
        (line, "bold"),
        (full * after, "red"),
        (empty * (width - at_cell - 1 - after), "dim"),
    ]


def _loss(story: Story, width: int, ascii_only: bool) -> list[list[Line]]:
    losses, blocks = story.losses, ASCII_BLOCKS if ascii_only else BLOCKS
    if losses.last is None or losses.first is None or story.best is None:
        return [[_row(width, "loss", ("not finite", "bold red"))]]
    assert story.record is not None
    now = (f"{story.record.loss:.4f}", "bold" if is_number(story.record.loss) else "bold red")
    best, step = story.best
    lowest, first = (f"best {best:.4f} at {step:,}", ""), (f"first {losses.first:.4f}", "")
    refused = (f"{story.refused} refused: not finite", "bold red") if story.refused else None
    head = _row(width, "loss", now, lowest, refused, first)
    room = width - sum(len(text) for text, _ in head)
    if room < 12:  # a short curve says more than its first value
        head = _row(width, "loss", now, lowest, refused)
        room = width - sum(len(text) for text, _ in head)
    small = [*head, (chart(losses.columns(room), 1, blocks)[0], "cyan")] if room >= 8 else head
    full, columns = _row(width, "loss", now, lowest, refused, first), losses.columns(max(8, width - _LABEL))
    larger = [[full, *([(" " * _LABEL + row, "cyan")] for row in chart(columns, high, blocks))] for high in (3, 4)]
    return [[small], *larger]


def _validation(story: Story, width: int) -> list[Line]:
    if story.validation is None or story.best_validation is None:
        return []
    last, (best, step) = story.validation, story.best_validation
    bits = None if last.bits_per_byte is None else (f"{last.bits_per_byte:.4f} bits per byte", "")
    return [
        _row(
            width,
            "validation",
            (f"{last.loss:.4f}", "bold"),
            (f"at {last.step:,}", ""),
            (f"best {best:.4f} at {step:,}", ""),
            bits,
        )
    ]


def _gradient(story: Story, record: StepRecord, width: int) -> Line:
    limit = story.about.clip
    norm = f"{record.grad_norm:.3f}"
    if limit is None:
        return _row(width, "grad norm", (norm, "bold"), ("not clipped", ""))
    share = story.clipped / story.records
    style = "yellow" if share > 0.9 and story.records >= 10 else ""
    return _row(
        width, "grad norm", (norm, "bold"), (f"limit {limit:g}", ""), (f"clipped in {share:.0%} of records", style)
    )


def _speed(story: Story, record: StepRecord, width: int) -> Line:
    mfu = None if record.mfu is None else (f"MFU {record.mfu:.1%}", "")
    mamf = None if record.mfu_of_mamf is None else (f"{record.mfu_of_mamf:.1%} of measured", "")
    return _row(
        width,
        "speed",
        (f"{format_count(record.tokens_per_second)} tokens/s", "bold"),
        ("warming up", "yellow") if record.warm_up else None,
        mfu,
        (f"median {format_count(statistics.median(story.speeds))}", ""),
        (f"{format_seconds(record.step_seconds)} a step", ""),
        mamf,
    )


def _time(record: StepRecord, width: int) -> list[list[Line]]:
    known = {name: seconds for name, seconds in record.time.items() if is_number(seconds) and seconds is not None}
    total = sum(known.values())
    if total <= 0:
        return [[]]
    long = [f"{name} {seconds / total:.1%}" for name, seconds in known.items()]
    short = [f"{_phase(name)[2]} {seconds / total:.0%}" for name, seconds in known.items()]
    texts = long if _LABEL + sum(len(text) + len(_GAP) for text in long) <= width else short
    colours = [_phase(name)[1] for name in known]
    legend = _row(width, "time", *zip(texts, colours, strict=True))
    room = max(10, min(60, width - _LABEL))
    bar: Line = [(" " * _LABEL, "")]
    end = drawn = 0.0
    for name, seconds in known.items():
        end += room * seconds / total
        letter, colour, _ = _phase(name)
        bar.append((letter * (round(end) - round(drawn)), f"black on {colour}"))
        drawn = end
    return [[legend], [legend, bar]]


def _phase(name: str) -> tuple[str, str, str]:
    return PHASES.get(name, ("?", "white", name))


def _memory(story: Story, record: StepRecord, width: int, ascii_only: bool) -> list[list[Line]]:
    """On a GPU what is held beside what was predicted; on a CPU the process, of which tensors are a part."""
    predicted = story.about.predicted
    kinds = (
        ("allocated", "allocated_peak_bytes", "peak_allocated_bytes"),
        ("reserved", "reserved_peak_bytes", "peak_reserved_bytes"),
        ("device", "device_used_bytes", "device_used_bytes"),
    )
    held = [(name, at(record.memory, key), at(predicted, other)) for name, key, other in kinds]
    held = [row for row in held if is_number(row[1])]
    host = at(record.memory, "host_rss_bytes")
    tensors = at(predicted, "peak_allocated_bytes")
    if not held:
        of = (f"predicted {format_bytes(tensors)} of tensors", "") if is_number(tensors) else None
        return (
            [[_row(width, "memory", (f"{format_bytes(host)} of the process", "bold"), of)]] if is_number(host) else [[]]
        )
    capacity = story.about.capacity_bytes
    scale = capacity or 1.1 * max(value for _, *values in held for value in values if is_number(value))
    rows = [
        _memory_row("" if place else "memory", row, (scale, capacity), width, ascii_only)
        for place, row in enumerate(held)
    ]
    last = [_row(width, "", (f"{'host':<9} {format_bytes(host):>8}", ""))] if is_number(host) else []
    return [rows[:1], rows, [*rows, *last]]


def _memory_row(
    label: str, row: tuple[str, Any, Any], scale: tuple[float, int | None], width: int, ascii_only: bool
) -> Line:
    name, value, predicted = row
    known = is_number(predicted)
    texts = [f"predicted {format_bytes(predicted)}"] if known else []
    texts += [f"of {format_bytes(scale[1])}"] if scale[1] else []
    text = f"{name:<9} {format_bytes(value):>8}"
    room = min(40, width - _LABEL - len(text) - sum(len(one) + len(_GAP) for one in texts) - 2 * len(_GAP))
    if room < 8 and len(texts) > 1:  # the size of the card can be looked up elsewhere
        room, texts = room + len(texts.pop()) + len(_GAP), texts
    bar = (
        _bar(value / scale[0], room, "green", ascii_only, predicted / scale[0] if known else None) if room >= 8 else []
    )
    gap = [(_GAP, "")] if bar else []
    return [*_row(width, label, (text, "bold")), *bar, *gap, *((one + _GAP, "") for one in texts)]


def _rates(record: StepRecord, width: int) -> Line:
    pieces = [f"{name} {value:.3g}" for name, value in record.lr.items()]
    shown, used = 0, _LABEL + 9
    while shown < len(pieces) and used + len(pieces[shown]) + len(_GAP) <= width:
        used += len(pieces[shown]) + len(_GAP)
        shown += 1
    more = (f"{len(pieces) - shown} more", "dim") if shown < len(pieces) else None
    return _row(width, "lr", *((piece, "") for piece in pieces[:shown]), more)


def _device(record: StepRecord, width: int, ascii_only: bool) -> list[Line]:
    device, degree = record.device, "" if ascii_only else "°"
    values = {name: device.get(name) for name in ("utilization", "power_watts", "temperature_c", "clock_mhz")}
    if not any(map(is_number, values.values())):
        return []
    throttle = device.get("throttle") or []
    formats = {
        "utilization": lambda value: f"{value:.0%} busy",
        "power_watts": lambda value: f"{value:.0f} W",
        "temperature_c": lambda value: f"{value:.0f} {degree}C",
        "clock_mhz": lambda value: f"{value:.0f} MHz",
    }
    pieces = [(formats[name](value), "") for name, value in values.items() if is_number(value)]
    slowed = ("slowed: " + ", ".join(map(str, throttle)), "yellow") if throttle else None
    errors = device.get("xid_errors")
    return [_row(width, "device", *pieces, slowed, (f"{errors} XID errors", "bold red") if errors else None)]


def _ranks(record: StepRecord, width: int) -> list[Line]:
    slowest, fastest = at(record.ranks, "slowest"), at(record.ranks, "fastest")
    if not slowest or not fastest:
        return []
    slow_s, fast_s = slowest["seconds"], fastest["seconds"]
    where = f"slowest {slowest['rank']}: {format_seconds(slow_s)} ({slowest['host']}, {slowest['device']})"
    late = "yellow" if fast_s > 0 and slow_s > 1.1 * fast_s else ""
    return [_row(width, "ranks", (where, late), (f"fastest {fastest['rank']}: {format_seconds(fast_s)}", ""))]


def _checkpoint(story: Story, width: int, now: float) -> Line:
    if story.about.checkpoint_interval is None:
        return _row(width, "checkpoint", ("none are kept", "dim"))
    if story.failed is not None:
        return _row(
            width, "checkpoint", (f"saving step {story.failed.step or 0:,} FAILED", "bold red"), _last_saved(story, now)
        )
    return _row(width, "checkpoint", _last_saved(story, now))


def _last_saved(story: Story, now: float) -> tuple[str, str]:
    saved = story.saved
    if saved is None:
        return (f"going on from step {story.first_step:,}" if story.first_step else "none yet", "")
    size, seconds = at(saved.details, "bytes"), at(saved.details, "seconds")
    cost = f", {format_bytes(size)}" if is_number(size) else ""
    cost += f" in {format_seconds(seconds)}" if is_number(seconds) else ""
    age = format_seconds(max(0, round(now - saved.wall_time)))
    return (f"step {saved.step or 0:,} saved {age} ago{cost}", "")


def _warnings(story: Story) -> list[Line]:
    return [[(warning, "yellow")] for warning in story.warnings]


def plain(view: Sequence[Line]) -> str:
    """The lines without styles."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in view)
