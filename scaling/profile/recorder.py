"""Turns the results of steps into records, without making the device wait.

A step's results are copied to the host behind it and read after the next step has been launched, so a GPU never idles
for them; what a step found is therefore known one step late on a GPU, and at once on a CPU. A step that was not finite
has changed nothing meanwhile (see Engine.step).
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.profile.clock import Clock, Lap
from scaling.profile.memory import MemoryMonitor
from scaling.profile.nvml import DeviceMonitor
from scaling.profile.sinks import Sink
from scaling.records import BatchPlan, Progress, StepRecord, ValidationRecord
from scaling.watch.heartbeat import Heartbeat, NullHeartbeat


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device."""

    loss: Tensor
    """Mean over the target tokens of all ranks; scalar."""
    grad_norm: Tensor
    """Global 2-norm before clipping; scalar."""
    bad_ranks: Tensor
    """1 where that rank's own loss was not finite; [world_size]."""
    requests: Tensor
    """How many ranks were asked to stop, and how many cannot save; [2]."""


@dataclass(frozen=True)
class Landed:
    """A step whose results have arrived on the host; the same on every rank."""

    step: int
    first_sample: int
    loss: float
    grad_norm: float
    bad_ranks: list[int]
    refused: bool
    """The update was not applied on any rank, since the gradient was not finite."""
    loss_scale: float
    stop: bool
    """Some rank was asked to stop."""
    save_failed: bool
    """Some rank cannot save, for a reason that will not pass."""

    @property
    def scaled_too_far(self) -> bool:
        """Refused as fp16's loss scale is found: the loss was finite, and the scale goes down."""
        return self.refused and math.isfinite(self.loss) and self.loss_scale > 1


@dataclass(frozen=True)
class _Flight:
    """A step whose results are under way to the host."""

    progress: Progress
    first_sample: int
    lr: dict[str, float]
    loss_scale: float
    lap: Lap
    values: Tensor
    arrived: "torch.cuda.Event | None"


class Recorder:
    """Knows which steps are recorded, how long they took and what they used."""

    def __init__(
        self,
        sinks: Sequence[Sink],
        plan: BatchPlan,
        device: torch.device,
        *,
        interval: int,
        first_step: int,
        last_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        heartbeat: Heartbeat | None = None,
    ) -> None:
        self.heartbeat = heartbeat or NullHeartbeat()
        self.clock = Clock(device, self.heartbeat)
        self._sinks = sinks
        self._plan = plan
        self._device = device
        self._interval = interval
        self._last_step = last_step
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._memory = MemoryMonitor(device)
        self._monitor = DeviceMonitor(device)
        self._flights: deque[_Flight] = deque()
        self._window_began = time.perf_counter()
        self._window_steps = 0
        self._paused_s = 0.0
        for sink in sinks:
            sink.begin(first_step, last_step)

    def step(
        self, progress: Progress, first_sample: int, result: StepResult, *, lr: dict[str, float], loss_scale: float
    ) -> list[Landed]:
        """Take note of the step that led to `progress`; returns the steps whose results have arrived since."""
        both = torch.stack((result.loss, result.grad_norm))
        values, arrived = self._send(torch.cat((both, result.requests, result.bad_ranks)))
        self._flights.append(_Flight(progress, first_sample, lr, loss_scale, self.clock.lap(), values, arrived))
        wait = progress.step == self._last_step or arrived is None
        return [self._land(self._flights.popleft()) for _ in range(len(self._flights) - (0 if wait else 1))]

    def drain(self) -> list[Landed]:
        """The steps whose results are still under way; waits for the device."""
        return [self._land(self._flights.popleft()) for _ in range(len(self._flights))]

    def forget(self) -> None:
        """Drop what is under way: the run goes back to an earlier step."""
        self._flights.clear()

    def validation(self, record: ValidationRecord) -> None:
        """Write the result of a validation."""
        for sink in self._sinks:
            sink.validation(record)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is inside out of the speed of training."""
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            sink.close()

    def _send(self, values: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        if values.device.type != "cuda":
            return values, None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host, arrived

    def _land(self, flight: _Flight) -> Landed:
        if flight.arrived is not None:
            flight.arrived.synchronize()  # of an earlier step: the device has the next one to work on
        loss, norm, stop, save_failed, *bad = flight.values.tolist()
        step = flight.progress.step
        landed = Landed(
            step,
            flight.first_sample,
            loss,
            norm,
            [rank for rank, flag in enumerate(bad) if flag],
            not math.isfinite(norm),
            flight.loss_scale,
            stop > 0,
            save_failed > 0,
        )
        self._window_steps += 1
        if step % self._interval == 0 or step == self._last_step or landed.refused:
            record = self._record(flight, landed)
            for sink in self._sinks:
                sink.step(record)
        return landed

    def _record(self, flight: _Flight, landed: Landed) -> StepRecord:
        now = time.perf_counter()
        seconds = (now - self._window_began - self._paused_s) / self._window_steps
        self._window_began, self._window_steps, self._paused_s = now, 0, 0.0
        plan = self._plan
        speed = plan.global_tokens / seconds
        per_device = speed / plan.world_size
        device = self._monitor.read()
        memory = self._memory.read()
        phases = flight.lap.seconds()
        return StepRecord(
            step=landed.step,
            loss=landed.loss,
            grad_norm=landed.grad_norm,
            lr=flight.lr,
            tokens=flight.progress.tokens,
            samples_seen=flight.progress.samples,
            step_seconds=seconds,
            tokens_per_second=speed,
            tokens_per_second_per_device=per_device,
            mfu=None if self._peak_flops is None else per_device * self._flops_per_token / self._peak_flops,
            memory={**memory, "device_used_bytes": _whole(device.pop("used_bytes"))},
            time={**phases, "communication": None, "other": max(0.0, seconds - sum(phases.values()))},
            device=device,
            skipped=landed.refused,
            first_sample=landed.first_sample,
            bad_ranks=landed.bad_ranks,
        )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
