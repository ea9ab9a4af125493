"""Faults inside a training process, brought about as its environment says; see `install` for the variables."""

import builtins
import contextlib
import importlib
import io
import math
import os
import resource
import signal
from collections.abc import Callable
from typing import Any

from scaling.run_folder import CHECKPOINTS

CRASH = 9
"""Exit code of a process that a hook has ended."""


def install() -> None:
    """Bring about, in this rank:

    FAULT_POINTS=FILE        append to FILE.RANK a line for each moment at which a crash could come within a save
    FAULT_CRASH=RANK:N       end rank RANK at the N-th of these moments, the first being 0
    FAULT_FILE_SIZE=RANK:BYTES:FIRST:LAST   let no file grow beyond BYTES while rank RANK writes data files FIRST to
                             LAST, counted from 1: a disk that is full for one rank
    FAULT_SMALL_FILES=BYTES  begin another data file after so many bytes
    FAULT_NAN=RANK:N         make the N-th loss of rank RANK in training NaN, the first being 1
    FAULT_MEMORY=RANK:PLACE:BYTES   let the tensors of rank RANK, on a CPU, take no more than BYTES while it is at
                             PLACE: "build", "restore", "save", a phase of the heartbeat, "trial" (of an open
                             micro-batch), or "run" for all of training; more fails as torch's allocator fails
    FAULT_ADDRESS_SPACE=BYTES   let the address space of the process grow by no more than BYTES in training
    """
    rank = os.environ.get("RANK", "0")
    if any(name in os.environ for name in ("FAULT_POINTS", "FAULT_CRASH", "FAULT_FILE_SIZE")):
        _watch_files(_on_point(rank), _on_data_file(rank))
    if small := os.environ.get("FAULT_SMALL_FILES"):
        from scaling.checkpoint import format as checkpoint_format

        checkpoint_format.FILE_BYTES = int(small)
    if fault := os.environ.get("FAULT_MEMORY"):
        who, place, size = fault.split(":")
        if who == rank:
            limit_tensors(place, int(size))
    if more := os.environ.get("FAULT_ADDRESS_SPACE"):
        _limit_address_space(int(more))
    if fault := os.environ.get("FAULT_NAN"):
        who, number = fault.split(":")
        if who == rank:
            _spoil_loss(int(number))


def _on_point(rank: str) -> Callable[[str], None]:
    log, crash = os.environ.get("FAULT_POINTS"), os.environ.get("FAULT_CRASH", ":").split(":")
    record = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600) if log else None
    count = 0

    def point(name: str) -> None:
        nonlocal count
        if record is not None:
            os.write(record, f"{name}\n".encode())
        if crash[0] == rank and int(crash[1]) == count:
            os._exit(CRASH)
        count += 1

    return point


def _on_data_file(rank: str) -> Callable[[], None]:
    fault = os.environ.get("FAULT_FILE_SIZE", "")
    if not fault or fault.split(":")[0] != rank:
        return lambda: None
    size, first, last = map(int, fault.split(":")[1:])
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    count = 0

    def begun() -> None:
        nonlocal count
        count += 1
        limit = size if first <= count <= last else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return begun


def _watch_files(point: Callable[[str], None], data_file: Callable[[], None]) -> None:
    """Call `point` before and after whatever changes something within the folder of checkpoints."""
    opened, real = builtins.open, {name: getattr(os, name) for name in _CHANGES}

    class Watched(io.FileIO):
        def write(self, data: Any) -> int:
            with _around(point, f"write {_short(self.name)}"):
                half = len(memoryview(data).cast("B")) // 2
                if half:
                    super().write(memoryview(data).cast("B")[:half])
                    point(f"within write {_short(self.name)}")
                return half + super().write(memoryview(data).cast("B")[half:])

    def open_(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
        if not (set(mode) & set("wxa") and "b" in mode and _concerns(file)):
            return opened(file, mode, buffering, *rest, **more)
        if str(file).endswith(".distcp"):
            data_file()
        with _around(point, f"open {_short(file)}"):
            raw = Watched(file, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedWriter(raw)

    def watched(name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if not _concerns(path, more.get("dir_fd")):
                return real[name](path, *rest, **more)
            with _around(point, f"{name} {_short(path)}"):
                return real[name](path, *rest, **more)

        return call

    builtins.open = open_
    for name in _CHANGES:
        setattr(os, name, watched(name))


_CHANGES = ("fsync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir")


@contextlib.contextmanager
def _around(point: Callable[[str], None], what: str) -> Any:
    point(f"before {what}")
    yield
    point(f"after {what}")


def _concerns(path: Any, folder: int | None = None) -> bool:
    if isinstance(path, int) or folder is not None:
        path = os.readlink(f"/proc/self/fd/{path if folder is None else folder}")
    return f"/{CHECKPOINTS}" in str(path)


def _short(path: Any) -> str:
    if isinstance(path, int):
        path = os.readlink(f"/proc/self/fd/{path}")
    return str(path).rpartition(f"/{CHECKPOINTS}")[2].lstrip("/") or str(path).rpartition("/")[2]


def limit_tensors(place: str, size: int, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Count live tensors all through training, or a trial, and refuse what goes beyond `size` at `place`.

    `put` replaces what it takes to do so.
    """
    import torch

    from scaling import fit, run, train
    from scaling.checkpoint import saver
    from scaling.profile.live import LiveBytes
    from scaling.watch.heartbeat import Heartbeat

    at, beat = "startup", Heartbeat.beat

    class Limited(LiveBytes):
        def _note(self, more: int) -> None:
            if (place == "run" or at in (place, "trial")) and more > 0 and self._total + more > size:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:128] data. DefaultCPUAllocator: can't allocate memory: you tried "
                    f"to allocate {more} bytes. Error code 12 (Cannot allocate memory)"
                )
            super()._note(more)

    def limited(owner: Any, name: str, stage: str) -> None:
        """Count within the function `name`."""
        real = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal at
            at = stage
            with Limited(torch.device("cpu")):
                return real(*arguments, **more)

        put(owner, name, call)

    def staged(name: str, stage: str) -> None:
        """Be at `stage` within a function of `run`."""
        real = getattr(run, name)

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal at
            at = "restore" if name == "_first_state" and arguments[1] is not None else stage
            try:
                return real(*arguments, **more)
            finally:
                at = "startup"

        put(run, name, call)

    def beating(self: Heartbeat, phase: str, step: int | None = None) -> None:
        nonlocal at
        beat(self, phase, step)
        at = "first_step" if phase == "step" and step == self._first_step else phase

    put(saver, "CHUNK_BYTES", 1 << 20)  # of the copy that is saved little more than is written to counts
    put(Heartbeat, "beat", beating)
    staged("_first_state", "build")
    staged("_keeper", "save")
    if place == "trial":
        limited(fit, "take_steps", "trial")
    else:
        limited(train, "run_job", "build")


def _limit_address_space(more: int) -> None:
    from scaling import train

    real = train.run_job

    def call(*arguments: Any, **settings: Any) -> Any:
        for name in ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "scaling.loop"):
            importlib.import_module(name)  # as training does by and by, with addresses that tensors are to have

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, resource.RLIM_INFINITY))
        return real(*arguments, **settings)

    train.run_job = call


def _spoil_loss(number: int) -> None:
    from scaling import objectives

    build, count = objectives.build_objective, 0

    def building(*arguments: Any, **options: Any) -> Any:
        objective = build(*arguments, **options)

        def spoilt(module: Any, batch: Any) -> Any:
            nonlocal count
            loss = objective(module, batch)
            count += module.training
            return loss * math.nan if module.training and count == number else loss

        return spoilt

    objectives.build_objective = building
