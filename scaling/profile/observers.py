"""What looks at single steps when it is asked to: traces, snapshots of the allocator, tensors by category."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch

from scaling.profile.clock import Clock
from scaling.profile.meter import MemoryMeter, build_meter
from scaling.profile.trace import STEP, analyse
from scaling.redact import redacted
from scaling.run_folder import SNAPSHOTS
from scaling.units import format_bytes

logger = logging.getLogger("scaling")

TRACES = "traces"
_MOST_EVENTS = 200_000
"""Allocations that a snapshot remembers."""


class Observer(Protocol):
    """Is told of each step."""

    def begin(self, step: int, clock: Clock) -> bool:
        """Returns whether it looks at this one so closely that its time does not count."""
        ...

    def end(self, step: int) -> None: ...
    def close(self) -> None: ...


class Tracer:
    """Writes a trace of some steps by torch.profiler: FOLDER/traces/rank0-steps-10-12.json.gz, for Perfetto."""

    def __init__(self, folder: Path, rank: int, device: torch.device, first: int, last: int) -> None:
        self._path = folder / TRACES / f"rank{rank}-steps-{first}-{last}.json.gz"
        self._device = device
        self._first, self._last = first, last
        self._profiler: Any = None
        self._step: Any = None

    def begin(self, step: int, clock: Clock) -> bool:
        """Start at the first step, or the first that is left of them after a resume; name each."""
        if self._profiler is None and self._first <= step <= self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        if self._profiler is not None:
            clock.around = _beside(clock.around, torch.profiler.record_function)
            self._step = torch.profiler.record_function(STEP, str(step))
            self._step.__enter__()
        return self._profiler is not None

    def end(self, step: int) -> None:
        """Stop and write after the last step."""
        if self._profiler is None:
            return
        self._step.__exit__(None, None, None)
        if step >= self._last:
            self._write()

    def close(self) -> None:
        """Write what there is of a trace that was cut short."""
        if self._profiler is not None:
            self._write()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            profiler.stop()
            self._path.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self._path))
        except (OSError, RuntimeError) as error:  # a full disk: a trace is not worth a run
            logger.warning(f"WARNING: no trace: {redacted(str(error))}")
            return
        logger.info(f"trace of steps {self._first} to {self._last}: {self._path}")
        self._sum_up()

    def _sum_up(self) -> None:
        """Beside the trace, what it says of the device: TRACE.summary.json."""
        path = self._path.with_name(self._path.name.replace(".json.gz", ".summary.json"))
        try:
            path.write_text(json.dumps(analyse(self._path), indent=1) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:
            logger.warning(f"WARNING: the trace is not summed up: {redacted(str(error))}")


class SnapshotWriter:
    """Has torch note every allocation, and writes its snapshot after a record: FOLDER/memory/rank0-step-10.pickle."""

    def __init__(self, folder: Path, rank: int, step: int) -> None:
        """`step`: after which the snapshot is written."""
        self._path = folder / SNAPSHOTS / f"rank{rank}-step-{step}.pickle"
        self._at = step
        torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)

    def begin(self, step: int, clock: Clock) -> bool:
        """Nothing: noting an allocation takes microseconds."""
        return False

    def end(self, step: int) -> None:
        """Write, at its step."""
        if step != self._at:
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))
        except (OSError, RuntimeError) as error:
            logger.warning(f"WARNING: no snapshot of memory: {redacted(str(error))}")
            return
        logger.info(f"snapshot of memory, for https://pytorch.org/memory_viz: {self._path}")

    def close(self) -> None:
        """Nothing: where memory has run out, the snapshot of that moment is still to be taken."""


class Attribution:
    """Counts the tensors of one step by what they are, into a JSON file. That step is slow, on all ranks."""

    def __init__(
        self,
        path: Path | None,
        device: torch.device,
        at: int,
        labelled: Callable[[MemoryMeter], AbstractContextManager[None]],
    ) -> None:
        """`labelled`: goes around the step, and says what the tensors of the engine are. `path`: of rank 0 alone."""
        self._path, self._device, self._at, self._labelled = path, device, at, labelled
        self._entered = contextlib.ExitStack()
        self._meter: MemoryMeter | None = None

    def begin(self, step: int, clock: Clock) -> bool:
        """Start to count, at its step."""
        if step == self._at:
            meter = self._meter = build_meter(self._device, by_category=True)
            self._entered.enter_context(meter)
            self._entered.enter_context(self._labelled(meter))
            clock.around = _beside(clock.around, meter.phase)
        return self._meter is not None

    def end(self, step: int) -> None:
        """Write what was found."""
        if self._meter is None:
            return
        self._entered.close()
        report, self._meter = {"step": step, **self._meter.report()}, None
        if self._path is None:
            return
        try:
            self._path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            logger.warning(f"WARNING: no {self._path.name}: {error.strerror}")
        peak = format_bytes(report["peak_allocated_bytes"])
        logger.info(f"tensors of step {step}: {peak} at the peak, in {report['peak_phase']}")

    def close(self) -> None:
        """Stop counting."""
        self._entered.close()


_Around = Callable[[str], AbstractContextManager[object]]


def _beside(first: _Around | None, second: _Around) -> _Around:
    """Both around a phase."""
    if first is None:
        return second

    @contextlib.contextmanager
    def both(name: str) -> Iterator[None]:
        with first(name), second(name):
            yield

    return both
