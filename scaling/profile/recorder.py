"""Turns the results of steps into records, without making the device wait.

A step's results are copied to the host behind it and read after the next step has been launched, so a GPU never idles
for them; what a step found is therefore known one step late on a GPU, and at once on a CPU. A step that was not finite
has changed nothing meanwhile (see Engine.step).
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from scaling.profile.clock import Clock, Lap, Timings
from scaling.profile.gradients import GradientNorms
from scaling.profile.memory import MemoryMonitor
from scaling.profile.nvml import DeviceMonitor
from scaling.profile.observers import Observer
from scaling.profile.ranks import own_name, own_numbers, told, total_energy
from scaling.profile.sinks import Sink
from scaling.profile.waits import NullWaits
from scaling.records import BatchPlan, Event, Progress, StepRecord, ValidationRecord
from scaling.watch.heartbeat import Heartbeat, NullHeartbeat

T = TypeVar("T")
WARM_UP = 2
"""Steps of a start whose times do not count: they compile, and fill caches (ZeRO-3 notes the order of parameters)."""
PAUSES = ("validation", "checkpoint", "profiling")


class Ranks(Protocol):
    """What the recorder needs of the process group."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def sum_over_ranks(self, value: Tensor) -> Tensor: ...
    def gather_objects(self, value: T) -> list[T]: ...


@dataclass(frozen=True)
class StepResult:
    """What a step leaves on the device."""

    row: Tensor
    """How many ranks were asked to stop, how many cannot save, and the summed loss of each rank; [2 + world_size]."""
    terms: Tensor | float
    """What the losses are divided by: the target tokens of all ranks; scalar."""
    grad_norm: Tensor
    """Global 2-norm before clipping; scalar."""
    gradient_norms: Tensor | None = None
    """Of layers and groups before clipping (`GradientNorms.over_ranks`); None where nobody asks."""

    @property
    def loss(self) -> Tensor:
        """The mean over the terms of all ranks; scalar."""
        return self.row[2:].sum() / self.terms


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
class _Reading:
    """What is known beside a step's results, when it is to be recorded."""

    memory: dict[str, Any]
    device: dict[str, Any]
    numbers: Tensor
    """What every rank has sent (scaling/profile/ranks.py), on its way to the host; [world_size, numbers]."""


@dataclass(frozen=True)
class _Flight:
    """A step whose results are under way to the host."""

    progress: Progress
    first_sample: int
    lr: dict[str, float]
    loss_scale: float
    lap: Lap
    terms: float | None
    """As of `StepResult`; None where they are among the values."""
    values: Tensor
    """The row of `StepResult`, the norm of the gradient, its terms and the norms of its parts."""
    arrived: "torch.cuda.Event | None"
    reading: _Reading | None
    observed: bool
    """Something looked at the step so closely that its time does not count."""


@dataclass(frozen=True)
class Yardsticks:
    """What speed is told against."""

    flops_per_token: float | None
    """None where it is not known."""
    peak_flops: float | None = None
    """Dense peak of the card, FLOP/s; None where it is not known."""
    gemm_flops: float | None = None
    """The fastest matrix product that was measured on it, FLOP/s; None where none was."""
    by_length: Mapping[int, float | None] = field(default_factory=dict[int, float | None])
    """FLOPs per token by the tokens in a sequence, where that grows."""

    def flops(self, length: int | None) -> float | None:
        """FLOPs per token of sequences of this length; of None the usual one."""
        return self.flops_per_token if length is None else self.by_length[length]


class Recorder:
    """Knows which steps are recorded, how long they took and what they used.

    Every rank has one, and calls it alike: at recorded steps ranks tell each other what they have found.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        plan: BatchPlan,
        process: Ranks,
        yardsticks: Yardsticks,
        *,
        interval: int,
        first_step: int,
        last_step: int,
        heartbeat: Heartbeat | None = None,
        waits: NullWaits | None = None,
        device_interval_s: float = 1.0,
        observers: Sequence[Observer] = (),
        gradient_norms: GradientNorms | None = None,
        length: Callable[[int], int] | None = None,
    ) -> None:
        """`process` is `scaling.engine.process.Process`, of which the rank, the device and the collectives are used.

        `length` says how many tokens the sequences of a step (0-based) have, where that changes.
        """
        self.heartbeat = heartbeat or NullHeartbeat()
        self._waits = waits or NullWaits()
        self._counts_waits, self._host = self._waits.watching, process.device.type != "cuda"
        self.clock = Clock(process.device, self.heartbeat, self._waits)
        self._sinks = sinks
        self._plan = plan
        self._process = process
        self._yardsticks = yardsticks
        self._interval = interval
        self._warm_from = first_step + WARM_UP
        self._last_step = last_step
        self._observers = observers
        self._norms = gradient_norms
        self._length_at = length
        self._memory = MemoryMonitor(process.device)
        self._monitor = DeviceMonitor(process.device, interval_s=device_interval_s)
        self._names = process.gather_objects(own_name(str(process.device)))
        self._flights: deque[_Flight] = deque()
        self._window = _Window()
        self._began, self._observed = time.perf_counter(), False
        for sink in sinks:
            sink.begin(first_step, last_step)

    def begin(self, step: int) -> None:
        """`step` begins."""
        self.heartbeat.beat("step", step)
        self.clock.around = None if self._host or not self._is_due(step) else self._memory.phase
        # On a GPU ranks tell each other of the last step that has landed, two before the one that is recorded.
        self._waits.watching = self._counts_waits and (self._host or self._is_due(step) or self._is_due(step + 2))
        self._began = time.perf_counter()
        self._observed = any([observer.begin(step, self.clock) for observer in self._observers])

    def norms_of(self, step: int) -> GradientNorms | None:
        """What is to be told of the parts of the gradient of `step`; None for nothing."""
        return self._norms if self._is_due(step) else None

    def step(
        self, progress: Progress, first_sample: int, result: StepResult, *, lr: dict[str, float], loss_scale: float
    ) -> list[Landed]:
        """Take note of the step that led to `progress`; returns the steps whose results have arrived since."""
        for observer in self._observers:
            observer.end(progress.step)
        lap, observed = self.clock.lap(), self._observed
        if observed:
            self._window.pauses["profiling"] += time.perf_counter() - self._began
        elif not lap.needs_device:
            self._window.timings.add(lap)
        reading = self._read() if self._is_due(progress.step) else None
        values, arrived = self._send(_as_one(result))
        terms = None if isinstance(result.terms, Tensor) else result.terms
        self._flights.append(
            _Flight(progress, first_sample, lr, loss_scale, lap, terms, values, arrived, reading, observed)
        )
        wait = progress.step == self._last_step or arrived is None
        return [self._land(self._flights.popleft()) for _ in range(len(self._flights) - (0 if wait else 1))]

    def drain(self) -> list[Landed]:
        """The steps whose results are still under way; waits for the device."""
        return [self._land(self._flights.popleft()) for _ in range(len(self._flights))]

    def forget(self) -> None:
        """Drop what is under way: the run goes back to an earlier step."""
        self._flights.clear()
        self._window = _Window()

    def validation(self, record: ValidationRecord) -> None:
        """Write the result of a validation."""
        for sink in self._sinks:
            sink.validation(record)

    def event(self, name: str, step: int | None, /, **details: Any) -> None:
        """Write that something happened to the run; see `Event`."""
        for sink in self._sinks:
            sink.event(Event(name, time.time(), step, details))

    @contextlib.contextmanager
    def pause(self, reason: str) -> Iterator[None]:
        """Leave what is inside out of the speed and energy of training, and tell it as `reason`, one of PAUSES."""
        began = time.perf_counter()
        self._window.add_energy(self._monitor.read())
        with self._waits.unseen():
            yield
        self._monitor.read()
        self._window.pauses[reason] += time.perf_counter() - began

    def close(self) -> None:
        """Close all sinks, whatever one of them raises."""
        with contextlib.ExitStack() as stack:
            for one in (*self._sinks, *self._observers, self._monitor, self._waits):
                stack.callback(one.close)

    def _is_due(self, step: int) -> bool:
        return step % self._interval == 0 or step == self._last_step

    def _length(self, step: int) -> int | None:
        """Tokens in each sequence of `step`, the first being 1; None where they are as many in every step."""
        return None if self._length_at is None else self._length_at(step - 1)

    def _send(self, values: Tensor) -> tuple[Tensor, "torch.cuda.Event | None"]:
        if values.device.type != "cuda":
            return values, None
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return host, arrived

    def _read(self) -> _Reading:
        """Look at this rank's memory, device and times, and send them to all; a collective call.

        On a GPU the times are of a step that has landed: the one that is under way cannot be read yet.
        """
        memory, device = self._memory.read(), self._look_at_device()
        own = own_numbers({**self._window.timings.mean(), **memory, **device})
        numbers = torch.zeros((self._process.world_size, len(own)), dtype=torch.float64)
        numbers[self._process.rank] = torch.tensor(own, dtype=torch.float64)
        with self._waits.unseen():  # the next step's lap would have it, and it is not of its time
            numbers = self._process.sum_over_ranks(numbers.to(self._process.device, non_blocking=True))
        return _Reading(memory, device, self._send(numbers)[0])

    def _look_at_device(self) -> dict[str, Any]:
        device = self._monitor.read()
        self._window.add_energy(device)
        return {**device, "energy_joules": self._window.joules}

    def _land(self, flight: _Flight) -> Landed:
        if flight.arrived is not None:
            flight.arrived.synchronize()  # of an earlier step: the device has the next one to work on
        stop, save_failed, *rest = flight.values.tolist()
        losses, (norm, *parts) = rest[: self._plan.world_size], rest[self._plan.world_size :]
        terms = parts.pop(0) if flight.terms is None else flight.terms
        step = flight.progress.step
        landed = Landed(
            step,
            flight.first_sample,
            sum(losses) / terms,
            norm,
            [rank for rank, own in enumerate(losses) if not math.isfinite(own)],
            not math.isfinite(norm),
            flight.loss_scale,
            stop > 0,
            save_failed > 0,
        )
        if not flight.observed:
            self._window.add(self._yardsticks.flops(self._length(step)))
            if flight.lap.needs_device:
                self._window.timings.add(flight.lap)
        if flight.reading is not None or landed.refused:
            # From now on: writing the record is a part of the next step.
            following = _Window(self._window.timings.following())
            record = self._record(flight, landed, parts)
            self._window = following
            for sink in self._sinks:
                sink.step(record)
        elif step == self._warm_from:
            self._monitor.read()
            self._window = _Window()
        return landed

    def _record(self, flight: _Flight, landed: Landed, norms: list[float]) -> StepRecord:
        window, plan, sticks = self._window, self._plan, self._yardsticks
        slowed = window.steps == 0
        length = self._length(landed.step)
        if slowed:  # there is no other step to tell of
            window.add(sticks.flops(length))
            window.pauses["profiling"] = 0.0
            window.timings.add(flight.lap)
        seconds = window.seconds()
        speed = plan.global_tokens / seconds
        per_device = speed / plan.world_size
        reading = flight.reading
        memory = self._memory.read() if reading is None else reading.memory
        device = dict(self._look_at_device() if reading is None else reading.device)
        numbers: list[list[float]] = [] if reading is None else reading.numbers.tolist()
        phases = window.timings.mean()
        joules = total_energy(numbers) if numbers else None
        per_step = None if joules is None else joules / window.steps
        device.pop("energy_joules")
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
            samples_per_second=plan.global_batch / seconds,
            mfu=window.share(per_device, sticks.peak_flops),
            mfu_of_mamf=window.share(per_device, sticks.gemm_flops),
            memory={
                **memory,
                "device_used_bytes": device.pop("used_bytes"),
                "process_used_bytes": device.pop("process_bytes"),
            },
            time={**phases, "other": max(0.0, seconds - sum(value or 0.0 for value in phases.values()))},
            pauses=window.pauses,
            device=device,
            energy={
                "joules_per_step": per_step,
                "joules_per_million_tokens": None if per_step is None else per_step / plan.global_tokens * 1e6,
            },
            ranks=told(numbers, self._names),
            window_steps=window.steps,
            warm_up=slowed or landed.step <= self._warm_from,
            wall_time=time.time(),
            skipped=landed.refused,
            first_sample=landed.first_sample,
            bad_ranks=landed.bad_ranks,
            sequence_length=length,
            gradient_norms=self._norms.told(norms) if self._norms is not None and norms else None,
        )


class _Window:
    """The steps that the next record tells of."""

    def __init__(self, timings: Timings | None = None) -> None:
        self.steps = 0
        self.timings = timings or Timings()
        self.pauses: dict[str, float] = dict.fromkeys(PAUSES, 0.0)
        self.joules: float | None = 0.0
        """Of this rank's GPU, pauses left out; None where it does not say."""
        self._flops: float | None = 0.0
        self._began = time.perf_counter()

    def add(self, flops_per_token: float | None) -> None:
        """Take in a step, all of which have as many tokens."""
        self.steps += 1
        self._flops = None if self._flops is None or flops_per_token is None else self._flops + flops_per_token

    def share(self, tokens_per_second: float, of: float | None) -> float | None:
        """What share of so many FLOP/s a device uses; None where one of the numbers is not known."""
        return None if of is None or self._flops is None else tokens_per_second * self._flops / self.steps / of

    def add_energy(self, reading: dict[str, Any]) -> None:
        """Take in what the device has used since it was last looked at."""
        more = reading["energy_joules"]
        self.joules = None if more is None or self.joules is None else self.joules + more

    def seconds(self) -> float:
        """Of a step, the mean up to now without pauses."""
        return (time.perf_counter() - self._began - sum(self.pauses.values())) / self.steps


def _as_one(result: StepResult) -> Tensor:
    """All numbers of a step, which then come to the host together."""
    parts = [result.row, result.grad_norm.view(1)]
    if isinstance(result.terms, Tensor):
        parts.append(result.terms.view(1))
    if result.gradient_norms is not None:
        parts.append(result.gradient_norms)
    return torch.cat(parts)
