"""This process among its peers: rank, device, process group. Read from the environment that any launcher sets."""

import contextlib
import ctypes
import datetime
import gc
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from scaling.engine.collectives import record_collectives
from scaling.errors import UserError

T = TypeVar("T")

TIMEOUT_S = 600.0
"""A collective that takes longer has lost a rank. torch's own 30 minutes hide a hang for half an hour."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h: how much free memory is kept at the heap's end, and from which size on a request gets pages of its
own, which go back as soon as they are freed; 32 MiB is the most."""


@dataclass(frozen=True)
class Process:
    """One rank."""

    rank: int
    world_size: int
    local_rank: int
    """Rank within the node: also the index of its device."""
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder and speaks to the user."""
        return self.rank == 0

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks, in place; a collective call."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def begin_sum(self, value: Tensor) -> Callable[[], Tensor]:
        """As `sum_over_ranks`, while other work goes on: what is returned waits for the sum and returns it."""
        if self.world_size == 1:
            return lambda: value
        work = dist.all_reduce(value, async_op=True)
        assert work is not None

        def end() -> Tensor:
            work.wait()
            return value

        return end

    def gather_objects(self, value: T) -> list[T]:
        """`value` of every rank, in the order of ranks; a collective call through the host."""
        if self.world_size == 1 or dist.get_backend() == "fake":  # a rehearsal: every rank is this one
            return [value] * self.world_size
        everyone = [value] * self.world_size
        dist.all_gather_object(everyone, value)
        return everyone

    def on_main(self, work: Callable[[], T]) -> T | None:
        """What `work` returns on rank 0, there; None elsewhere. Its UserError is raised on all; a collective call."""
        result, problem = None, None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                error.shared = True
                problem = error
        problem = self.gather_objects(problem)[0]
        if problem is not None:
            assert isinstance(problem, UserError)
            problem.shared = True
            raise problem
        return result


@contextlib.contextmanager
def process_from_environment(timeout_s: float = TIMEOUT_S) -> Iterator[Process]:
    """Join the process group that torchrun or deepspeed announced in the environment, or be alone in one.

    A collective that waits for longer than `timeout_s` raises.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    rank, world_size = _integer("RANK", 0), _integer("WORLD_SIZE", 1)
    local_rank, local_world_size = _integer("LOCAL_RANK", 0), _integer("LOCAL_WORLD_SIZE", _integer("LOCAL_SIZE", 0))
    process = Process(rank, world_size, local_rank, local_world_size or world_size, _device(local_rank))
    _share_cores(process)
    if process.device.type == "cpu":
        _keep_freed_memory()
    record_collectives()
    if world_size in (1, local_world_size):
        _stay_on_this_machine()
    # Objects travel over gloo so that gathering a name does not touch the GPU.
    backend = "cpu:gloo,cuda:nccl" if process.device.type == "cuda" else "gloo"
    if world_size == 1:
        # torch documents dist.HashStore, but its stubs do not export it.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        device_id = process.device if process.device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    try:
        yield process
    finally:
        # A model that is still alive, in a reference cycle or in the frames of a failure, holds communicators whose
        # threads would abort the process at its exit, and with it the exit code.
        traceback.clear_frames(sys.exc_info()[2])
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def rehearsed_process(world_size: int, device: torch.device | None = None) -> Iterator[Process]:
    """Be rank 0 of as many ranks, the others of which do not exist: collectives return at once, with own values.

    On `device`, which is a GPU if there is one.
    """
    # Importing it makes the backend "fake" known.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    process = Process(0, world_size, 0, world_size, device or _device(0))
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield process
    finally:
        gc.collect()
        dist.destroy_process_group()


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise UserError(f"the environment's {name} must be a whole number, but is {text!r}; start with a launcher")
    return int(text)


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"the number of ranks on this machine must be at most its GPUs ({torch.cuda.device_count()}), "
            f"but a local rank is {local_rank}; start fewer, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _share_cores(process: Process) -> None:
    """Without this each CPU rank starts as many threads as there are cores, and they fight.

    Of a process that is alone OMP_NUM_THREADS says it, where it is set; of several torchrun sets that to 1 unasked.
    """
    alone = process.local_world_size == 1 and "OMP_NUM_THREADS" in os.environ
    if process.device.type == "cpu" and not alone:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // process.local_world_size))


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, which wants as much, unless the user has told it something.

    It gives memory back to the system as soon as it can, and gets it again page by page, each filled with zeros.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        adjust(M_TRIM_THRESHOLD, 2**31 - 1)
        adjust(M_MMAP_THRESHOLD, 32 * 2**20)


def _stay_on_this_machine() -> None:
    """Let gloo listen on the loopback address, unless the user chose an interface.

    Its own choice is the address of the host's name, where anybody in the network could connect, unauthenticated.
    """
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
