"""When a run saves, and what it keeps: the checkpoints of one run, as the loop sees them."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from scaling.checkpoint.format import FORMAT_VERSION, SPEC, STATE, Reader, unusable
from scaling.checkpoint.resume import newest_whole
from scaling.checkpoint.saver import Outcome, Saver
from scaling.checkpoint.store import BEST, Store, free_bytes, step_name
from scaling.engine.process import Process
from scaling.engine.protocol import Engine
from scaling.errors import StorageError
from scaling.records import Progress
from scaling.spec.sections import Checkpoint
from scaling.units import format_bytes, format_seconds

logger = logging.getLogger("scaling")

_SPREAD, _SPREAD_S = 0.8, 60.0
"""A checkpoint is whole after this part of the time between two, and after so many seconds at most."""


class Tell(Protocol):
    """What a keeper tells of its checkpoints: see `scaling.records.Event`."""

    def __call__(self, name: str, step: int, /, **details: Any) -> None: ...


def _tell_nobody(name: str, step: int, /, **details: Any) -> None:
    pass


class Keeper(Protocol):
    """What the loop may ask of the checkpoints of its run. Every rank calls it alike."""

    tell: Tell
    """Hears of each save that has ended."""
    failed: bool
    """A save failed on this rank for a reason that will not pass; `check` on every rank then raises it."""
    needs_s: float | None
    """How long the last save took on this rank; None where nothing is known, or nothing is saved."""

    def due(self, step: int) -> bool: ...
    def save(self, engine: Engine, progress: Progress) -> None: ...
    def poll(self) -> None: ...
    def check(self) -> None: ...
    def finish(self) -> None: ...


class NoCheckpoints:
    """Keeps nothing: for runs whose spec says so, and for comparisons."""

    tell: Tell = staticmethod(_tell_nobody)
    staging: Sequence[Tensor] = ()
    failed = False
    needs_s: float | None = None

    def due(self, step: int) -> bool:
        return False

    def save(self, engine: Engine, progress: Progress) -> None:
        pass

    def poll(self) -> None:
        pass

    def check(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def go_back(self, engine: Engine) -> Progress:
        raise AssertionError("the spec refuses to go back where nothing is saved")


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, store: Store, settings: Checkpoint, process: Process, identity: Mapping[str, Any]) -> None:
        self.tell: Tell = _tell_nobody
        self.failed = False
        self.needs_s: float | None = None
        self._store = store
        self._settings = settings
        self._process = process
        self._identity = dict(identity)
        self._saver = Saver(store, process, asynchronous=settings.asynchronous)
        self._saved: int | None = None
        """The last step that a save was begun for."""
        self._saved_at = time.monotonic()
        """When that was; before the first, when the run began."""
        self._problem: Outcome | None = None
        """How the last save failed, if it did."""
        self._stall_s = 0.0
        """How long training stood still for the save under way, or the last one."""

    @property
    def staging(self) -> Sequence[Tensor]:
        """The host memory that the state is copied to."""
        return self._saver.staging

    def reserve(self, engine: Engine) -> None:
        """Take the host memory that saves need, and say at once where the disk has no room for one."""
        if self._settings.asynchronous:
            size = self._saver.reserve(engine.state())
        else:
            size = sum(shard.own().values.nbytes for shard in engine.state())
        total = int(self._process.sum_over_ranks(torch.tensor(float(size), dtype=torch.float64)).item())
        if self._process.is_main and free_bytes(self._store.folder) < total:
            logger.warning(
                f"WARNING: a checkpoint takes {format_bytes(total)}, and {self._store.folder} has "
                f"{format_bytes(free_bytes(self._store.folder))} free: saving will fail until there is room"
            )

    def due(self, step: int) -> bool:
        """Whether the spec asks for a checkpoint after this step."""
        return step % self._settings.interval == 0 or step in self._settings.permanent

    def save(self, engine: Engine, progress: Progress) -> None:
        """Save, unless this step is saved already; in the background if the spec says so."""
        if self._saved == progress.step:
            return
        began = time.monotonic()
        self._take(self._saver.wait())
        self._saved = progress.step
        documents = self._documents(engine, progress) if self._process.is_main else {}
        spread_s = self._spread()
        self._saver.save(progress.step, engine.state(), documents, lambda: self._after(progress), spread_s)
        self._stall_s = time.monotonic() - began
        if not self._settings.asynchronous:
            self._take(self._saver.wait())

    def _spread(self) -> float:
        """Seconds over which the next save is to be written; most of what passed since the one before.

        On a CPU the steps beside it would pay for a burst of writing; on a GPU they would not, and sooner is safer.
        """
        now = time.monotonic()
        since, self._saved_at = now - self._saved_at, now
        return min(_SPREAD_S, _SPREAD * since) if self._process.device.type == "cpu" else 0.0

    def poll(self) -> None:
        """Take note of a save that has ended since."""
        self._take(self._saver.poll())

    def check(self) -> None:
        """Raise what made a save fail, if that was no lack of room. For all ranks at once, when one has `failed`."""
        self._take(self._saver.wait())
        if self._problem is not None and not self._problem.storage:
            raise RuntimeError(f"saving the checkpoint of step {self._problem.step} failed: {self._problem.problem}")

    def finish(self) -> None:
        """Wait for the save under way. StorageError where the last one failed: the end of the run would be lost."""
        self.check()
        if self._problem is not None:
            steps = self._store.steps()
            kept = f"the newest is {self._store.path(steps[-1])}" if steps else "there is no earlier one"
            error = StorageError(
                f"`--run-dir` must have room for the last checkpoint, but saving step {self._problem.step} failed "
                f"({self._problem.problem}); {kept}: make room and run the same command again"
            )
            error.shared = True
            raise error

    def go_back(self, engine: Engine) -> Progress:
        """Restore the newest whole checkpoint of this run."""
        self._take(self._saver.wait())
        folder = newest_whole(self._store, self._process)
        assert folder is not None, "there is one from the start on"
        progress = restore(engine, folder)
        self._saved = progress.step
        return progress

    def close(self) -> None:
        """Let the save under way end, whatever comes of it."""
        self._take(self._saver.wait())

    def _take(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        self._problem = outcome if outcome.problem else None
        self.needs_s = self.needs_s if outcome.problem else outcome.seconds - outcome.paused
        self.failed = outcome.problem is not None and not outcome.storage
        if not self._process.is_main:
            return
        if outcome.problem:
            logger.warning(
                f"WARNING: NO CHECKPOINT OF STEP {outcome.step}: {outcome.problem}. Earlier ones are untouched; "
                "training goes on and tries again at the next interval"
            )
            self.tell("checkpoint_failed", outcome.step, reason=outcome.problem)
        else:
            logger.info(
                f"checkpoint {step_name(outcome.step)}: {format_bytes(outcome.bytes)} "
                f"in {format_seconds(outcome.seconds)}"
            )
            figures = {"seconds": outcome.seconds, "bytes": outcome.bytes, "stall_seconds": self._stall_s}
            self.tell("checkpoint", outcome.step, **figures)

    def _documents(self, engine: Engine, progress: Progress) -> dict[str, str]:
        state = {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "samples_seen": progress.samples,
            "tokens_seen": progress.tokens,
            "skipped": list(progress.skipped),
            "best": None if progress.best is None else {"step": progress.best[0], "loss": progress.best[1]},
            "counters": engine.counters(),
            "time": time.time(),
            **{name: value for name, value in self._identity.items() if name != "spec"},
        }
        return {
            STATE: json.dumps(state, indent=1) + "\n",
            SPEC: json.dumps(self._identity["spec"], indent=2) + "\n",
        }

    def _after(self, progress: Progress) -> None:
        """On rank 0, once the checkpoint is whole."""
        if progress.best is not None and progress.best[0] == progress.step:
            self._store.point(BEST, progress.step)
        self._store.retire(self._settings.keep_last, self._settings.permanent)


def restore(engine: Engine, folder: Path) -> Progress:
    """Put the state in `folder`, verified before, into the engine; every rank reads the ranges it holds."""
    reader = Reader(folder)
    state = reader.state
    with engine.loading(state["counters"]):
        for shard in engine.state():
            key = f"{shard.kind}/{shard.name}"
            if reader.elements.get(key) != shard.elements:
                raise unusable(folder, f"{shard.elements} elements of {key}", f"it has {reader.elements.get(key)}")
            shard.values.copy_(reader.read(key, shard.start, shard.values.numel()))
    reader.close()
    best = state["best"]
    return Progress(
        step=state["step"],
        samples=state["samples_seen"],
        tokens=state["tokens_seen"],
        skipped=tuple(state["skipped"]),
        best=None if best is None else (best["step"], best["loss"]),
    )
