"""Where a step's time goes, by phase. On a GPU by events, read when the step's results are, never waited for."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch

from scaling.profile.waits import NullWaits, Waits
from scaling.watch.heartbeat import Heartbeat, NullHeartbeat

PHASES = ("data", "forward", "backward", "optimizer")
COMMUNICATION = "communication"

_Span = tuple[str, "float | torch.cuda.Event", "float | torch.cuda.Event", float]
"""Phase, start, end, and the seconds in between that this rank waited for others."""


class Clock:
    """Times the phases of one step after another; phases of the same name add up."""

    def __init__(
        self, device: torch.device, heartbeat: Heartbeat | None = None, waits: Waits | NullWaits | None = None
    ) -> None:
        """`heartbeat` hears of each phase; `waits` knows how long this rank has waited for others."""
        self.around: Callable[[str], AbstractContextManager[object]] | None = None
        """What else is to go around each phase; None for most steps."""
        self._heartbeat = heartbeat or NullHeartbeat()
        self._waits = waits or NullWaits()
        self._on_gpu = device.type == "cuda"
        self._spans: list[_Span] = []
        self._waited = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside as `name`. Waiting for data is the host's time, on a GPU too."""
        self._heartbeat.part(name)
        with contextlib.nullcontext() if self.around is None else self.around(name):
            waited, start = self._waits.seconds or 0.0, self._now(name)
            yield
            end = self._now(name)
        self._heartbeat.part("other")
        self._spans.append((name, start, end, (self._waits.seconds or 0.0) - waited))

    def lap(self) -> "Lap":
        """End the step: its spans, to be read once the device has finished it."""
        spans, self._spans = self._spans, []
        waited = self._waits.seconds
        since, self._waited = None if waited is None else waited - self._waited, waited or 0.0
        return Lap(spans, since)

    def _now(self, name: str) -> "float | torch.cuda.Event":
        if not self._on_gpu or name == "data":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Lap:
    """The spans of one step."""

    def __init__(self, spans: list[_Span], waited_s: float | None) -> None:
        """`waited_s`: what this rank waited for others in the whole step; None where that is not known."""
        self._spans = spans
        self._waited_s = waited_s

    @property
    def needs_device(self) -> bool:
        """Whether the device must have finished the step before it can be read."""
        return any(not isinstance(start, float) for _, start, _, _ in self._spans)

    def seconds(self) -> dict[str, float | None]:
        """Phase -> seconds, and "communication": what was waited for others, which is taken out of the phases; None
        where that is not known. On a GPU the device must have finished the step.
        """
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for name, start, end, waited in self._spans:
            if isinstance(start, torch.cuda.Event):
                assert isinstance(end, torch.cuda.Event)
                found[name] += start.elapsed_time(end) / 1000  # milliseconds
            else:
                assert isinstance(end, float)
                found[name] += end - start - (0.0 if self._waited_s is None else waited)
        return {**found, COMMUNICATION: self._waited_s}


class Timings:
    """The laps of the steps since the last record: all of them, or the newest alone where reading one asks the GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, float | None] = {}
        self._laps = 0
        self._newest: Lap | None = None

    def add(self, lap: Lap) -> None:
        """Take in a step that is finished."""
        if lap.needs_device:
            self._newest = lap
            return
        for name, seconds in lap.seconds().items():
            before = self._sums.get(name, 0.0)
            self._sums[name] = None if seconds is None or before is None else before + seconds
        self._laps += 1

    def mean(self) -> dict[str, float | None]:
        """Seconds of a step by phase, as `Lap.seconds`."""
        if self._newest is not None:
            return self._newest.seconds()
        laps = max(1, self._laps)
        nothing = Lap([], None).seconds()
        return {name: None if total is None else total / laps for name, total in {**nothing, **self._sums}.items()}
