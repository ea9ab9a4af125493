"""Ranks on this machine, for as long as measuring takes."""

import contextlib
import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from scaling.calibrate.result import Found, Sizes
from scaling.errors import RankDied, UserError

TIMEOUT_S = 120.0
"""A collective that takes longer has lost a rank."""
Tell = Callable[[str, int], None]


def measure_here(seconds: float, sizes: Sizes | None, tell: Tell) -> Found:
    """As the rank that the environment says this process is; with the same result on all."""
    from scaling.calibrate.measure import measure
    from scaling.engine.process import process_from_environment

    with process_from_environment(TIMEOUT_S) as process:
        return measure(process, seconds, sizes, tell if process.is_main else lambda name, total: None)


def measure_on(ranks: int, seconds: float, sizes: Sizes | None, tell: Tell) -> Found:
    """In as many processes of their own; none is left when this returns or raises.

    Raises the UserError of a rank, and RankDied where one ends without a result.
    """
    context = multiprocessing.get_context("spawn")  # a fork would share CUDA's state, and torch's threads
    receiver, sender = context.Pipe(duplex=False)
    port = _free_port()
    processes = [
        context.Process(target=_rank, args=(rank, ranks, port, seconds, sizes, sender), daemon=True)
        for rank in range(ranks)
    ]
    with _interrupted_alone():
        for process in processes:
            process.start()
    sender.close()
    try:
        return _listen(receiver, processes, tell)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _listen(receiver: Connection, processes: Sequence[BaseProcess], tell: Tell) -> Found:
    """What the ranks say, until one has the result."""
    while True:
        wait([receiver, *(process.sentinel for process in processes if process.exitcode is None)])
        while receiver.poll():
            said = _received(receiver)
            if isinstance(said, UserError):
                raise said
            if isinstance(said, Found):
                return said
            if said is None:
                break
            tell(*said)
        for rank, process in enumerate(processes):
            if process.exitcode:  # 0 is a rank that has done its part
                raise RankDied(
                    f"rank {rank} must live until all is measured, but ended with exit code {process.exitcode}; start "
                    "fewer `--ranks` if memory was short"
                )


def _received(receiver: Connection) -> Any:
    """The next message; None where all that could send one are gone."""
    try:
        return receiver.recv()
    except EOFError:
        return None


def _rank(rank: int, ranks: int, port: int, seconds: float, sizes: Sizes | None, sender: Connection) -> None:
    """One of the processes. Rank 0 sends progress and the result, each its own UserError."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    try:
        found = measure_here(seconds, sizes, lambda name, total: sender.send((name, total)))
        if rank == 0:
            sender.send(found)
    except UserError as error:
        sender.send(error)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


@contextlib.contextmanager
def _interrupted_alone() -> Iterator[None]:
    """Processes that are started in it inherit that Ctrl-C, which reaches all at a terminal, is not for them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]
