"""Independent work over the cores of this machine, where that is safe."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Shared = TypeVar("Shared")
Result = TypeVar("Result")

MOST_WORKERS = 8
"""More would take longer to start than they save."""

_shared: Any = None
"""In a worker: what all items have in common, inherited and not sent."""


def mapped(work: Callable[[Item, Shared], Result], items: Sequence[Item], shared: Shared) -> Iterator[Result]:
    """`work(item, shared)` of each item, in their order; `work` is a module's function, results can be pickled.

    Workers are forked: on Linux alone, and not where torch is loaded, whose threads would be missing in them.
    """
    workers = min(_cores(), len(items), MOST_WORKERS)
    if workers < 2 or sys.platform != "linux" or "torch" in sys.modules:
        yield from (work(item, shared) for item in items)
        return
    from concurrent.futures import ProcessPoolExecutor  # takes 20 ms, which the smallest answers do without
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_begin, initargs=(shared,))
    try:
        yield from pool.map(_apply, [work] * len(items), items)
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that waits tells of it


def _apply(work: Callable[[Any, Any], Any], item: Any) -> Any:
    return work(item, _shared)
