"""How far a long preparation is: a bar on a terminal, two lines of log elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_in_bytes(title: str, total_bytes: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the number of bytes dealt with since its last call.

    Unless `shown` nothing is told: of ranks that do the same together one tells.
    """
    with _progress(title, total_bytes, f"{total_bytes / 1e6:.1f} MB", counted=False, shown=shown) as advance:
        yield advance


@contextmanager
def progress_in_items(title: str, total: int, unit: str, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """The same of items; `unit` is their plural."""
    with _progress(title, total, f"{total:,} {unit}", counted=True, shown=shown) as advance:
        yield advance


@contextmanager
def _progress(title: str, total: int, told: str, *, counted: bool, shown: bool) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda count: None
        return
    logger, started = logging.getLogger(__name__), time.monotonic()
    if sys.stderr.isatty():
        with _bar(title, total, counted=counted) as advance:
            yield advance
    else:
        logger.info("%s: %s", title, told)
        yield lambda count: None
    logger.info("%s: done in %.1f s", title, time.monotonic() - started)


@contextmanager
def _bar(title: str, total: int, *, counted: bool) -> Iterator[Callable[[int], None]]:
    # Here and not above: only a terminal needs it.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    amount = MofNCompleteColumn() if counted else DownloadColumn()
    columns = TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
