"""What a trace of torch.profiler says of a device: computing, communicating, waiting. No torch.

A trace (Chrome's format, as Kineto writes it) holds every kernel of a few steps. On a GPU a moment counts once however
many kernels share it, by the first of these that holds: some kernel computes; data of other ranks moves, which is then
exposed communication; data is copied or cleared; nothing, the device idles. The four add up to the device's time. A
communication kernel runs while it waits for other ranks, so waiting for a slow one is communication too.
"""

import bisect
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

Span = tuple[float, float]
"""Begin and end."""

STEP = "step"
"""The region around a step (torch.profiler.record_function)."""

COMPUTE, COMMUNICATION, COPY = "compute", "communication", "copy"

SECONDS = (
    "device_seconds",
    "compute_seconds",
    "communication_seconds",
    "exposed_communication_seconds",
    "exposed_copy_seconds",
    "idle_seconds",
)

CHUNK = 2**20
LONGEST_EVENT = 16 * 2**20
"""Characters. An event has hundreds; with shapes and stacks, thousands."""


def analyse(path: Path | str) -> dict[str, Any]:
    """What `analyse_events` says of a trace file, packed by gzip or not.

    Raises OSError, and ValueError where the file is no trace or ends too early.
    """
    return analyse_events(read_events(path))


def analyse_events(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by what the device did: "steps", SECONDS, and the same of each step under "per_step".

    A step lasts from its first kernel to the next one's first; what was launched outside the regions called "step" is
    left out, unless there are none: then all counts, and "steps" is None. Several devices are added up. Without a GPU
    "device_seconds" is the host's time and "communication_seconds" what is spent in calls of c10d and gloo, of any
    thread; what else the processor did meanwhile, a trace does not say: the rest is None.
    """
    found = _collect(events)
    if found.activities:
        devices = [_of_device(found, activities) for activities in found.activities.values()]
        per_step = [_added(parts) for parts in zip(*devices, strict=True)]
    else:
        per_step = list(_of_host(found))
    return {
        "steps": len(found.steps) or None,
        **(_added(per_step) if per_step else dict.fromkeys(SECONDS)),
        "per_step": per_step if found.steps else [],
    }


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class _Activity:
    """Something that a device did."""

    span: Span
    kind: str
    correlation: int | None
    """Of the call that launched it."""


@dataclass
class _Found:
    """What matters of a trace; times are its own, microseconds."""

    steps: list[Span] = field(default_factory=list[Span])
    """On the host."""
    launches: dict[int, float] = field(default_factory=dict[int, float])
    """When a call with this correlation began."""
    activities: dict[Any, list[_Activity]] = field(default_factory=lambda: defaultdict(list))
    """By device."""
    calls: list[Span] = field(default_factory=list[Span])
    """Of c10d and gloo on the host."""


def _collect(events: Iterable[dict[str, Any]]) -> _Found:
    found = _Found()
    for event in events:
        if event.get("ph") != "X":
            continue
        category, name, arguments = event.get("cat"), str(event.get("name")), event.get("args") or {}
        begin = float(event.get("ts", 0))
        span = (begin, begin + max(0.0, float(event.get("dur", 0))))
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            device = arguments.get("device", event.get("pid"))
            found.activities[device].append(_Activity(span, _kind(category, name), arguments.get("correlation")))
        elif category in ("cuda_runtime", "cuda_driver"):
            if (correlation := arguments.get("correlation")) is not None:
                found.launches[correlation] = begin
        elif category == "user_annotation" and name == STEP:
            found.steps.append(span)
        elif name.startswith(("c10d::", "gloo:")):
            found.calls.append(span)
    found.steps.sort()
    return found


def _kind(category: str, name: str) -> str:
    if name.startswith(("nccl", "Memcpy PtoP")):  # NCCL's kernels, and copies from GPU to GPU
        return COMMUNICATION
    return COMPUTE if category == "kernel" else COPY


def _of_device(found: _Found, activities: Sequence[_Activity]) -> list[dict[str, float | None]]:
    """SECONDS of each step on one device; of all as one where there are no steps."""
    kept, windows = _windows(found, activities)
    computing, communicating, copying = (
        union(one.span for one in kept if one.kind == kind) for kind in (COMPUTE, COMMUNICATION, COPY)
    )
    exposed = subtract(communicating, computing)
    copied = subtract(subtract(copying, computing), communicating)
    return [
        _seconds(
            end - begin,
            *(length(clip(spans, begin, end)) for spans in (computing, communicating, exposed, copied)),
        )
        for begin, end in windows
    ]


def _windows(found: _Found, activities: Sequence[_Activity]) -> tuple[Sequence[_Activity], list[Span]]:
    """What belongs to the steps, and the device's time of each; a step that launched nothing has none."""
    if not found.steps:
        return activities, [(min(one.span[0] for one in activities), max(one.span[1] for one in activities))]
    starts = [begin for begin, _ in found.steps]
    first: list[float | None] = [None] * len(starts)
    kept: list[_Activity] = []
    for one in activities:
        begin = one.span[0]
        launched = begin if one.correlation is None else found.launches.get(one.correlation, begin)
        step = bisect.bisect_right(starts, launched) - 1
        if step < 0 or launched > found.steps[-1][1]:
            continue
        kept.append(one)
        earliest = first[step]
        first[step] = begin if earliest is None else min(earliest, begin)
    bound = max((one.span[1] for one in kept), default=0.0)
    windows: list[Span] = []
    for begin in reversed(first):
        windows.append((bound if begin is None else min(begin, bound), bound))
        bound = windows[-1][0]
    return kept, windows[::-1]


def _of_host(found: _Found) -> Iterator[dict[str, float | None]]:
    calls = union(found.calls)
    ends = [begin for begin, _ in found.steps[1:]] + [end for _, end in found.steps[-1:]]
    for (begin, _), end in zip(found.steps, ends, strict=True):
        spent = length(clip(calls, begin, end))
        yield {**dict.fromkeys(SECONDS), "device_seconds": (end - begin) / 1e6, "communication_seconds": spent / 1e6}


def _seconds(
    device: float, compute: float, communication: float, exposed: float, copied: float
) -> dict[str, float | None]:
    """By SECONDS, from microseconds."""
    idle = max(0.0, device - compute - exposed - copied)
    values = (device, compute, communication, exposed, copied, idle)
    return {name: value / 1e6 for name, value in zip(SECONDS, values, strict=True)}


def _added(parts: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    sums: dict[str, float | None] = {}
    for name in SECONDS:
        values = [value for part in parts if (value := part[name]) is not None]
        sums[name] = sum(values) if values else None
    return sums


# ---------------------------------------------------------------- intervals


def union(spans: Iterable[Span]) -> list[Span]:
    """The same times, each once: sorted, without overlaps and without gaps of no length."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if begin >= end:
            continue
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def subtract(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """`spans` without `others`; both as `union` gives them, as is the result."""
    found: list[Span] = []
    i = 0
    for begin, end in spans:
        while i < len(others) and others[i][1] <= begin:
            i += 1
        k = i
        while k < len(others) and others[k][0] < end:
            if begin < others[k][0]:
                found.append((begin, others[k][0]))
            begin = max(begin, others[k][1])
            k += 1
        if begin < end:
            found.append((begin, end))
    return found


def clip(spans: Sequence[Span], begin: float, end: float) -> list[Span]:
    """What lies between `begin` and `end` of `spans` as `union` gives them."""
    low = bisect.bisect_right(spans, begin, key=lambda span: span[1])
    high = bisect.bisect_left(spans, end, key=lambda span: span[0])
    return [(max(begin, one), min(end, other)) for one, other in spans[low:high]]


def length(spans: Iterable[Span]) -> float:
    """Of all together, which do not overlap."""
    return sum(end - begin for begin, end in spans)


# ---------------------------------------------------------------- files


def read_events(path: Path | str) -> Iterator[dict[str, Any]]:
    """The events of a trace file one by one, so that a large file takes little memory."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    opened = gzip.open if packed else open
    with opened(path, "rt", encoding="utf-8", errors="replace") as file:
        try:
            yield from _objects(file)
        except (json.JSONDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is no whole trace of torch.profiler: {error}") from None


def _objects(file: TextIO) -> Iterator[dict[str, Any]]:
    """The objects in the list under "traceEvents", or in a file that is a list."""
    decoder = json.JSONDecoder(strict=False)  # names may hold control characters
    separators, opening = re.compile(r"[\s,]*"), re.compile(r'\s*\[|.*?"traceEvents"\s*:\s*\[', re.DOTALL)
    text = _more(file, "")
    while (begin := opening.match(text)) is None:
        text = _more(file, text)
    place = begin.end()
    while True:
        place = _end(separators, text, place)
        if text[place : place + 1] == "]":
            return
        try:
            event, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError:
            text, place = _more(file, text[place:]), 0
            continue
        if isinstance(event, dict):
            yield event


def _more(file: TextIO, text: str) -> str:
    """`text` and what follows it in the file."""
    chunk = file.read(CHUNK)
    if not chunk or len(text) > LONGEST_EVENT:
        raise json.JSONDecodeError("it ends too early" if not chunk else "an event has no end", text[:100], 0)
    return text + chunk


def _end(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    return place if found is None else found.end()
