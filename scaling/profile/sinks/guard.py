"""Training goes on whatever becomes of a sink that is not the run's own record."""

import logging
import queue
import threading
from contextlib import suppress
from typing import Any

from scaling.profile.sinks.sink import Sink
from scaling.records import Event, StepRecord, ValidationRecord

logger = logging.getLogger("scaling")

_MOST_WAITING = 1000
"""Records that may wait for a sink in the background: a few MB."""


class Guarded:
    """A sink whose first exception is told, and ends it; whoever trains sees none."""

    def __init__(self, sink: Sink) -> None:
        self.name = type(sink).__name__
        self._sink: Sink | None = sink

    def begin(self, first_step: int, last_step: int) -> None:
        self.call("begin", first_step, last_step)

    def step(self, record: StepRecord) -> None:
        self.call("step", record)

    def validation(self, record: ValidationRecord) -> None:
        self.call("validation", record)

    def event(self, event: Event) -> None:
        self.call("event", event)

    def close(self) -> None:
        self.call("close")

    def call(self, method: str, *arguments: Any) -> None:
        """Call the sink's method of this name, unless it has failed before."""
        sink = self._sink
        if sink is None:
            return
        try:
            getattr(sink, method)(*arguments)
        except Exception as error:
            self._sink = None
            tell_failure(self.name, error)
            if method != "close":
                with suppress(Exception):  # what it holds it should still let go
                    sink.close()


class InBackground:
    """A guarded sink in a thread of its own: training waits neither for its disk nor for its network."""

    def __init__(self, sink: Sink, *, patience_s: float) -> None:
        """`patience_s`: how long the end of training waits for what is not written yet."""
        self._guarded = Guarded(sink)
        self.name = self._guarded.name
        self._patience_s = patience_s
        self._calls: queue.Queue[tuple[Any, ...]] = queue.Queue(_MOST_WAITING)
        self._stuck = False
        self._thread = threading.Thread(target=self._work, name=f"sink {self.name}", daemon=True)
        self._thread.start()

    def begin(self, first_step: int, last_step: int) -> None:
        self._send("begin", first_step, last_step)

    def step(self, record: StepRecord) -> None:
        self._send("step", record)

    def validation(self, record: ValidationRecord) -> None:
        self._send("validation", record)

    def event(self, event: Event) -> None:
        self._send("event", event)

    def close(self) -> None:
        self._send("close")
        if self._stuck:
            return
        self._thread.join(self._patience_s)
        if self._thread.is_alive():
            self._give_up(f"it was not done after {self._patience_s:.0f} s")

    def _send(self, *call: Any) -> None:
        if self._stuck:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._give_up(f"{_MOST_WAITING} records wait for it")

    def _give_up(self, reason: str) -> None:
        """Leave the thread to itself: it ends with the process."""
        self._stuck = True
        tell_failure(self.name, reason)

    def _work(self) -> None:
        method = ""
        while method != "close":
            method, *arguments = self._calls.get()
            self._guarded.call(method, *arguments)


def guarded(sink: Sink) -> Sink:
    """`sink`, whose exceptions are told once and end it, and nothing else."""
    return Guarded(sink)


def tell_failure(name: str, reason: object) -> None:
    """Warn that a sink is left out from now on."""
    first_line = (str(reason).strip() or type(reason).__name__).splitlines()[0].rstrip(".")
    logger.warning(f"WARNING: {name} is left out from now on: {first_line}; training goes on")
