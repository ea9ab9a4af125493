"""Files of a checkpoint: written once, front to back, hashed on the way, and on the disk when they are closed."""

import errno
import fcntl
import hashlib
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from scaling.checkpoint.store import FileRecord

_BLOCK_BYTES = 4 << 20
"""Written at once."""


class HashingFile:
    """A new file, for one `with` block; no file may be there. What it wants of the disk it raises as OSError.

    Blocks go straight to the disk (O_DIRECT) where the file system can: the page cache would cost a second copy of the
    state in memory, and kernel time at training's expense. Two threads hash and write one block while the next is
    filled; what they do to a block needs no GIL.
    """

    def __init__(
        self,
        path: Path,
        wrote: Callable[[int], None] = lambda count: None,
        begin_thread: Callable[[], None] = lambda: None,
    ) -> None:
        """`wrote(bytes)` is called after each whole block, `begin_thread` in each of the two threads."""
        self.bytes = 0
        self.error: OSError | None = None
        """What went wrong, for those to whom somebody in between tells something else."""
        self._wrote = wrote
        self._begin_thread = begin_thread
        self._raw = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._digest = hashlib.sha256()
        self._block, self._other = _new_block(), None
        self._held = 0
        self._thread: ThreadPoolExecutor | None = None
        self._working: list[Future[None]] = []
        self._pass_cache(True)

    @property
    def record(self) -> FileRecord:
        """Size and checksum of what was written."""
        return FileRecord(self.bytes, self._digest.hexdigest())

    def __enter__(self) -> "HashingFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._raw.close()

    def write(self, data: Any) -> int:
        """Add bytes at the end."""
        rest = np.frombuffer(data, np.uint8)
        size = rest.size
        try:
            while rest.size:
                part = rest[: _BLOCK_BYTES - self._held]
                self._block[self._held : self._held + part.size] = part
                self._held += part.size
                rest = rest[part.size :]
                if self._held == _BLOCK_BYTES:
                    self._write_behind()
                    self._wrote(_BLOCK_BYTES)
        except OSError as error:
            self.error = error
            raise
        self.bytes += size
        return size

    def flush(self) -> None:
        """Nothing: `torch.save` asks for it after each tensor."""

    def _write_behind(self) -> None:
        self._join()
        if self._thread is None or self._other is None:
            self._thread = ThreadPoolExecutor(2, "checkpoint", self._begin_thread)
            self._other = _new_block()
        # The digest's work is in order: one block is done with before the next begins.
        self._working = [
            self._thread.submit(self._digest.update, self._block),
            self._thread.submit(self._write_block, self._block, self._held),
        ]
        self._block, self._other, self._held = self._other, self._block, 0

    def _join(self) -> None:
        working, self._working = self._working, []
        for work in working:
            work.result()

    def _finish(self) -> None:
        self._join()
        self._pass_cache(False)  # the rest is no multiple of what the disk writes
        self._digest.update(self._block[: self._held])
        self._write_block(self._block, self._held)
        os.fsync(self._raw.fileno())

    def _write_block(self, block: Any, count: int) -> None:
        with memoryview(block) as view:
            done = 0
            while done < count:  # a raw file may take less than it is given
                try:
                    done += self._raw.write(view[done:count])
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._pass_cache(False):
                        raise

    def _pass_cache(self, wanted: bool) -> bool:
        """Write past the page cache from now on, or not; whether that changed anything."""
        direct = getattr(os, "O_DIRECT", 0)
        flags = fcntl.fcntl(self._raw, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._raw, fcntl.F_SETFL, flags | direct if wanted else flags & ~direct)
        except OSError:  # a file system that knows nothing of it
            return False
        return bool(flags & direct) != wanted


def _new_block() -> Any:
    return np.frombuffer(mmap.mmap(-1, _BLOCK_BYTES), np.uint8)  # begins on a page, as O_DIRECT demands
