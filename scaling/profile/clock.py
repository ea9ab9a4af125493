"""Where a step's time goes, by phase. On a GPU by events, read when the step's results are, never waited for."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from scaling.profile.waits import Moment, NullWaits, Wait, now_on, seconds_between
from scaling.watch.heartbeat import Heartbeat, NullHeartbeat

PHASES = ("data", "forward", "backward", "optimizer")
COMMUNICATION = "communication"

_HOST = torch.device("cpu")
_Span = tuple[str, Moment, Moment, list[Wait]]
"""Phase, start, end, and when in between this rank waited for others."""


class Clock:
    """Times the phases of one step after another; phases of the same name add up."""

    def __init__(
        self, device: torch.device, heartbeat: Heartbeat | None = None, waits: NullWaits | None = None
    ) -> None:
        """`heartbeat` hears of each phase; `waits` knows how long this rank has waited for others."""
        self.around: Callable[[str], AbstractContextManager[object]] | None = None
        """What else is to go around each phase; None for most steps."""
        self._heartbeat = heartbeat or NullHeartbeat()
        self._waits = waits or NullWaits()
        self._device = device
        self._spans: list[_Span] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside as `name`. Waiting for data is the host's time, on a GPU too."""
        device = _HOST if name == "data" else self._device
        self._heartbeat.part(name)
        with contextlib.nullcontext() if self.around is None else self.around(name):
            waited, start = len(self._waits.seen), now_on(device)
            yield
            end = now_on(device)
        self._heartbeat.part("other")
        self._spans.append((name, start, end, self._waits.seen[waited:]))

    @contextlib.contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """Time the backward pass of `loss`."""
        with self.phase("backward"), self._waits.backward(loss):
            yield

    def lap(self) -> "Lap":
        """End the step: its spans, to be read once the device has finished it."""
        spans, self._spans = self._spans, []
        return Lap(spans, self._waits.take())


class Lap:
    """The spans of one step."""

    def __init__(self, spans: list[_Span], waits: list[Wait] | None) -> None:
        """`waits`: when this rank waited for others in the whole step; None where that is not known."""
        self._spans = spans
        self._waits = waits

    @property
    def needs_device(self) -> bool:
        """Whether the device must have finished the step before it can be read."""
        return any(not isinstance(start, float) for _, start, _, _ in self._spans)

    def seconds(self) -> dict[str, float | None]:
        """Phase -> seconds, and "communication": what was waited for others, which is taken out of the phases; None
        where that is not known. On a GPU the device must have finished the step.
        """
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for name, start, end, waits in self._spans:
            found[name] += seconds_between(start, end) - _total(waits)
        return {**found, COMMUNICATION: None if self._waits is None else _total(self._waits)}


def _total(waits: list[Wait]) -> float:
    return sum(seconds_between(began, ended) for began, ended in waits)


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

    def following(self) -> "Timings":
        """What the next record begins with: nothing, or the newest lap until a newer one can be read."""
        timings = Timings()
        timings._newest = self._newest
        return timings
