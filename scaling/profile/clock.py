"""Where a step's time goes, by phase. On a GPU by events, read when the step's results are, never waited for."""

import contextlib
import time
from collections.abc import Iterator

import torch

from scaling.watch.heartbeat import Heartbeat, NullHeartbeat

PHASES = ("data", "forward", "backward", "optimizer")


class Clock:
    """Times the phases of one step after another; phases of the same name add up."""

    def __init__(self, device: torch.device, heartbeat: Heartbeat | None = None) -> None:
        """`heartbeat` hears of each phase."""
        self._heartbeat = heartbeat or NullHeartbeat()
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what is inside as `name`. Waiting for data is the host's time, on a GPU too."""
        self._heartbeat.part(name)
        start = self._now(name)
        yield
        self._heartbeat.part("other")
        self._spans.append((name, start, self._now(name)))

    def lap(self) -> "Lap":
        """End the step: its spans, to be read once the device has finished it."""
        spans, self._spans = self._spans, []
        return Lap(spans)

    def _now(self, name: str) -> "float | torch.cuda.Event":
        if not self._on_gpu or name == "data":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Lap:
    """The spans of one step."""

    def __init__(self, spans: list[tuple[str, "float | torch.cuda.Event", "float | torch.cuda.Event"]]) -> None:
        self._spans = spans

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds. On a GPU the device must have finished the step."""
        found: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        for name, start, end in self._spans:
            if isinstance(start, torch.cuda.Event):
                assert isinstance(end, torch.cuda.Event)
                found[name] += start.elapsed_time(end) / 1000  # milliseconds
            else:
                assert isinstance(end, float)
                found[name] += end - start
        return found
