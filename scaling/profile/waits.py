"""How long a rank waits for others, told apart from its own work.

Every collective that is called from Python, by FSDP2, DeepSpeed or this project, ends in
`torch.distributed.Work.wait` (torch/distributed/distributed_c10d.py), which is watched here. On a CPU the thread stands
still in it. On a GPU it is the stream of the computation that stands still, there or in `torch.cuda.Stream.wait_event`,
while others bring what it needs: two events around each such point say for how long. With offloading to the host those
are waits for copies too.

DDP waits below Python, at the very end of its backward pass (`Reducer::finalize_backward` in
torch/csrc/distributed/c10d/reducer.cpp): from when the last gradient is computed to when `backward` returns.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

Moment = float | torch.cuda.Event
Wait = tuple[Moment, Moment]
"""Begin and end."""


def now_on(device: torch.device, stream: "torch.cuda.Stream | None" = None) -> Moment:
    """This moment: of the host's clock, or an event in the midst of a GPU's work, on `stream` or on the current one."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Of two moments of one clock. On a GPU it must have come past both."""
    if isinstance(start, torch.cuda.Event):
        assert isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000  # milliseconds
    assert not isinstance(end, torch.cuda.Event)
    return end - start


class NullWaits:
    """Where nobody is waited for, or nobody looks."""

    watching = False
    """Whether waits are counted now; on a GPU only those of steps that are told of, since each takes two events."""

    def __init__(self) -> None:
        self.seen: list[Wait] = []
        """Since `take` was called last, oldest first."""

    def take(self) -> list[Wait] | None:
        """What was seen since the last call; None where waits were not counted."""
        seen, self.seen = self.seen, []
        return seen if self.watching else None

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """What is waited for inside is of no step."""
        before = len(self.seen)
        yield
        del self.seen[before:]

    def backward(self, loss: Tensor) -> contextlib.AbstractContextManager[None]:
        """Goes around the backward pass of `loss`."""
        return contextlib.nullcontext()

    def close(self) -> None:
        """Leave torch as it was."""


class Waits(NullWaits):
    """Counts while it is open, for the thread that has made it: a checkpoint's writer has collectives of its own."""

    def __init__(self, device: torch.device, *, below_python: bool) -> None:
        """`below_python`: at the end of a backward pass, as DDP does."""
        super().__init__()
        self.watching = True
        self._device, self._below_python = device, below_python
        self._thread = threading.get_ident()
        self._wait, self._wait_event = dist.Work.wait, torch.cuda.Stream.wait_event
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self._stream is None:
            dist.Work.wait = self._watched(self._wait, lambda _: threading.get_ident() == self._thread)
        else:
            dist.Work.wait = self._watched(self._wait, lambda _: self._holds_computation())
            torch.cuda.Stream.wait_event = self._watched(self._wait_event, lambda stream: stream == self._stream)

    @contextlib.contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        if not self._below_python or not self.watching:
            yield
            return
        computed: list[Moment] = []

        def ask(_: Tensor) -> None:
            # Callbacks run in the order in which they were asked for, once all gradients are there. This is the first;
            # DDP asks for its own with its last bucket.
            Variable._execution_engine.queue_callback(lambda: computed.append(self._now()))

        hook = loss.register_hook(ask)
        yield
        hook.remove()
        self.seen += [(began, self._now()) for began in computed]

    def close(self) -> None:
        dist.Work.wait, torch.cuda.Stream.wait_event = self._wait, self._wait_event

    def _now(self) -> Moment:
        return now_on(self._device, self._stream)  # which may be told to wait while another stream is the current one

    def _holds_computation(self) -> bool:
        # Autograd's own thread computes too, and is none of Python's; the writer of a checkpoint is.
        known = threading.get_ident() == self._thread or isinstance(threading.current_thread(), threading._DummyThread)
        return known and torch.cuda.current_stream(self._device) == self._stream

    def _watched(self, real: Callable[..., Any], counts: Callable[[Any], bool]) -> Any:
        def watched(one: Any, *arguments: Any, **more: Any) -> Any:
            if not self.watching or not counts(one):
                return real(one, *arguments, **more)
            began = self._now()
            try:
                return real(one, *arguments, **more)
            finally:
                self.seen.append((began, self._now()))

        return watched
