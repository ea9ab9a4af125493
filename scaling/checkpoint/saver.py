"""Writing checkpoints while training goes on.

`save` copies the state to host memory and returns; a thread writes the copy. The ranks agree over a process group of
their own, since the collectives of two threads on one group would meet each other, and never is more than one save
under way. What the thread finds comes out of `poll` and `wait`, on every rank alike: it raises nothing itself.
"""

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scaling.checkpoint.format import CHUNK_BYTES, METADATA, Pieces, Written, write_index, write_tensors
from scaling.checkpoint.store import Store, free_bytes, write_synced
from scaling.engine.process import Process
from scaling.engine.protocol import FlatShard
from scaling.units import format_bytes

T = TypeVar("T")

_SLACK_BYTES = 4 << 20
"""Room wanted beyond the tensors: the index, the JSON files and the blocks of the file system."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    step: int
    bytes: int
    """Of the tensors, over all ranks."""
    seconds: float
    problem: str | None
    """None: the checkpoint is whole."""
    storage: bool = False
    """The problem is one of storage (full, read-only, gone), which may pass."""
    paused: float = 0.0
    """Of the seconds, those in which this rank held back."""


class Saver:
    """Writes the checkpoints of a run, one at a time. Every rank calls it alike."""

    def __init__(self, store: Store, process: Process, *, asynchronous: bool) -> None:
        self._store = store
        self._process = process
        self._place = store.place() if process.is_main and store.folder.is_dir() else None
        """Which folder the run began with."""
        self._asynchronous = asynchronous
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup), "all ranks are in it"
        self._group = group
        self._staging = _Staging(pinned=process.device.type == "cuda")
        self._thread: threading.Thread | None = None
        self._hurry = threading.Event()
        """Somebody waits for the save under way."""
        self._paused = 0.0
        self._outcome: Outcome | None = None

    @property
    def staging(self) -> list[Tensor]:
        """The host memory that the state is copied to."""
        return self._staging.segments

    def reserve(self, state: Iterable[FlatShard]) -> int:
        """Take the host memory that saves will need, now rather than at the first; returns the bytes of this rank."""
        return self._staging.copy(state)[1]

    def save(
        self,
        step: int,
        state: Iterable[FlatShard],
        documents: Mapping[str, str],
        after: Callable[[], None],
        spread_s: float = 0.0,
    ) -> None:
        """Write `state` and the `documents` (file name -> text) as the checkpoint of `step`.

        Returns as soon as the state is copied. `after` runs on rank 0 once the checkpoint is whole. In the background
        the writing is spread over `spread_s` seconds, until somebody waits for its end. The outcome of the save before
        must have been taken.
        """
        assert self._thread is None and self._outcome is None, "the outcome of the last save was not looked at"
        pieces, size = self._staging.copy(state)
        self._hurry.clear()

        def work() -> None:
            wrote = self._pace(size, spread_s if self._asynchronous else 0.0)
            self._outcome = self._write(step, pieces, size, wrote, documents, after)

        if self._asynchronous:
            self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            work()

    def poll(self) -> Outcome | None:
        """The outcome of the last save, once, if it has ended."""
        return None if self._thread is not None and self._thread.is_alive() else self.wait()

    def wait(self) -> Outcome | None:
        """The outcome of the last save, once; waits for its end."""
        if self._thread is not None:
            self._hurry.set()
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        return outcome

    def _pace(self, size: int, seconds: float) -> Callable[[int], None]:
        """What holds a writer back, called after each block, so that `size` bytes take `seconds`."""
        began, done, self._paused = time.monotonic(), 0, 0.0

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            now = time.monotonic()
            if (ahead := began + seconds * done / size - now) > 0:
                self._hurry.wait(ahead)
                self._paused += time.monotonic() - now

        return wrote

    def _write(
        self,
        step: int,
        pieces: dict[str, Pieces],
        size: int,
        wrote: Callable[[int], None],
        documents: Mapping[str, str],
        after: Callable[[], None],
    ) -> Outcome:
        began = time.monotonic()
        total, folder, problem, storage = size, None, None, False
        try:
            total = sum(self._everyone(size))
            folder = self._begin(step, total)
            written = self._write_files(folder, pieces, wrote)
            self._publish(step, folder, documents, written, after)
        except Exception as error:  # a thread has nobody above it: the outcome carries what happened
            storage = isinstance(error, OSError)
            problem = _sentence(error)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                problem += f": {format_bytes(total)} are needed, {_free(self._store.folder)} are free"
            if folder is not None and self._process.is_main:
                self._store.discard(folder)
        return Outcome(step, total, time.monotonic() - began, problem, storage, self._paused)

    def _begin(self, step: int, total: int) -> Path:
        """Rank 0 looks for room and makes the folder; all raise where it cannot."""

        def begin() -> Path:
            if self._place is None:
                os.makedirs(self._store.folder, exist_ok=True)
                self._place = self._store.place()
            if self._store.place() != self._place:
                # A mount is gone, say: nobody would look for what is written to the empty folder below it.
                raise OSError(errno.ESTALE, "the folder is not the one that the run began with", self._store.folder)
            if free_bytes(self._store.folder) < total + _SLACK_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._store.begin(step)

        return self._on_main(begin)

    def _write_files(self, folder: Path, pieces: dict[str, Pieces], wrote: Callable[[int], None]) -> list[Written]:
        """What every rank has written; all raise where one of them could not write."""
        written, problem = Written([], {}), None
        begin_thread = _yield_cores if self._asynchronous else _as_it_is
        try:
            written = write_tensors(folder, pieces, self._process.rank, wrote, begin_thread)
        except OSError as error:
            problem = OSError(error.errno, f"{error.strerror} on rank {self._process.rank}", str(folder))
        except Exception as error:  # of a type that may not travel between processes
            problem = RuntimeError(f"{type(error).__name__} on rank {self._process.rank}: {error}")
        found = self._everyone((written, problem))
        for _, problem in found:
            if problem is not None:
                raise problem
        return [written for written, _ in found]

    def _publish(
        self,
        step: int,
        folder: Path,
        documents: Mapping[str, str],
        written: list[Written],
        after: Callable[[], None],
    ) -> None:
        def publish() -> None:
            records = {name: record for part in written for name, record in part.files.items()}
            records[METADATA] = write_index(folder, written)
            for name, text in documents.items():
                records[name] = write_synced(folder / name, text)
            self._store.commit(folder, step, records)
            after()

        self._on_main(publish)

    def _on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, or what it raises there (an OSError as such), on every rank."""
        result: T | None = None
        problem: Exception | None = None
        if self._process.is_main:
            try:
                result = work()
            except OSError as error:
                problem = error
            except Exception as error:  # of a type that may not travel between processes
                problem = RuntimeError(f"{type(error).__name__}: {error}")
        result, problem = self._everyone((result, problem))[0]
        if problem is not None:
            raise problem
        return result  # pyright: ignore[reportReturnType]

    def _everyone(self, value: T) -> list[T]:
        values: list[T] = [value] * self._process.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


class _Staging:
    """Host memory that the state is copied into, kept from one save to the next."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self.segments: list[Tensor] = []

    def copy(self, state: Iterable[FlatShard]) -> tuple[dict[str, Pieces], int]:
        """The parts of `state` that this rank writes, copied; and their bytes."""
        pieces: dict[str, Pieces] = {}
        number, room, total = -1, 0, 0
        for shard in state:
            own = shard.own()
            key = f"{own.kind}/{own.name}"
            found = pieces.setdefault(key, Pieces(own.elements))
            done, width = 0, own.values.element_size()
            while done < own.values.numel():
                if room < width:
                    number, room = number + 1, CHUNK_BYTES
                count = min(own.values.numel() - done, room // width)
                place = CHUNK_BYTES - room
                memory = self._segment(number).numpy()[place : place + count * width]
                # Not a view of the segment: torch.save writes all of the storage that a tensor is a part of.
                copy = torch.frombuffer(memory, dtype=own.values.dtype)
                copy.copy_(own.values[done : done + count], non_blocking=True)
                found.ranges[own.start + done] = copy
                done += count
                room -= -(-count * width // 8) * 8  # the next begins where any type may
                total += count * width
        if self._pinned:
            torch.cuda.synchronize()
        return {key: found for key, found in pieces.items() if found.ranges}, total

    def _segment(self, number: int) -> Tensor:
        # Of one size, a power of two: pinned memory comes in powers of two, and more would be wasted.
        if number == len(self.segments):
            self.segments.append(torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=self._pinned))
        return self.segments[number]


def _yield_cores() -> None:
    """Let this thread run where training leaves a core idle: what it does can wait, a step cannot.

    Only for what needs the GIL for moments: a thread that held it while it waits for a core would stop training.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _as_it_is() -> None:
    pass


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"


def _free(folder: Path) -> str:
    try:
        return format_bytes(free_bytes(folder))
    except OSError:
        return "no bytes"
