"""Turns the results of steps into records, without making the device wait.

A step's results are copied to the host behind it and read after the next step has been launched, so a GPU never idles
for them; a step that was not finite is therefore reported one step late. It has changed nothing (see Engine.step).
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scaling.errors import NonFinite
from scaling.profile.clock import Clock, Lap
from scaling.profile.memory import MemoryMonitor
from scaling.profile.nvml import DeviceMonitor
from scaling.profile.sinks import Sink
from scaling.records import BatchPlan, StepRecord, ValidationRecord


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device."""

    loss: Tensor
    """Mean over the target tokens of all ranks; scalar."""
    grad_norm: Tensor
    """Global 2-norm before clipping; scalar."""
    bad_ranks: Tensor
    """1 where that rank's own loss was not finite; [world_size]."""


@dataclass(frozen=True)
class _Flight:
    """A step whose results are under way to the host."""

    step: int
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
        last_step: int,
        flops_per_token: float,
        peak_flops: float | None,
    ) -> None:
        self.clock = Clock(device)
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
            sink.begin(last_step)

    def step(self, step: int, result: StepResult, *, lr: dict[str, float], loss_scale: float) -> None:
        """Take note of step `step` (the first is 1). Raises NonFinite, on all ranks alike, for it or the one before."""
        values, arrived = self._send(torch.cat((torch.stack((result.loss, result.grad_norm)), result.bad_ranks)))
        self._flights.append(_Flight(step, lr, loss_scale, self.clock.lap(), values, arrived))
        last = step == self._last_step
        while self._flights and (last or arrived is None or len(self._flights) > 1):
            self._land(self._flights.popleft())

    def validation(self, record: ValidationRecord) -> None:
        """Write the result of a validation."""
        for sink in self._sinks:
            sink.validation(record)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what is inside out of the speed of training."""
        while self._flights:
            self._land(self._flights.popleft())
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

    def _land(self, flight: _Flight) -> None:
        if flight.arrived is not None:
            flight.arrived.synchronize()  # of an earlier step: the device has the next one to work on
        loss, norm, *bad = flight.values.tolist()
        finite = math.isfinite(loss) and math.isfinite(norm)
        skipped = not finite and math.isfinite(loss) and flight.loss_scale > 1
        if not finite and not skipped:
            ranks = [rank for rank, flag in enumerate(bad) if flag]
            raise NonFinite(_blame(flight.step, loss, norm, ranks), step=flight.step, rank=ranks[0] if ranks else None)
        self._window_steps += 1
        if flight.step % self._interval == 0 or flight.step == self._last_step or skipped:
            record = self._record(flight, loss, norm, skipped)
            for sink in self._sinks:
                sink.step(record)

    def _record(self, flight: _Flight, loss: float, norm: float, skipped: bool) -> StepRecord:
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
            step=flight.step,
            loss=loss,
            grad_norm=norm,
            lr=flight.lr,
            tokens=flight.step * plan.global_tokens,
            samples_seen=flight.step * plan.global_batch,
            step_seconds=seconds,
            tokens_per_second=speed,
            tokens_per_second_per_device=per_device,
            mfu=None if self._peak_flops is None else per_device * self._flops_per_token / self._peak_flops,
            memory={**memory, "device_used_bytes": _whole(device.pop("used_bytes"))},
            time={**phases, "communication": None, "other": max(0.0, seconds - sum(phases.values()))},
            device=device,
            skipped=skipped,
        )


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _blame(step: int, loss: float, norm: float, bad: list[int]) -> str:
    if bad:
        ranks = f"rank{'s' if len(bad) > 1 else ''} {', '.join(map(str, bad))}"
        found = f"the loss of {ranks} is not finite (over all ranks it is {loss})"
    else:
        found = f"the gradient is not finite (norm {norm}) although the loss of every rank is ({loss:.6g})"
    return (
        f"`loss` and gradient must be finite, but at step {step} {found}; the update was not applied. "
        "Lower `optimizer.lr`, lengthen `schedule.warmup_steps`, or look at the samples of that step"
    )
