"""What is made of data, on disk: written once, by one process, and either whole or absent."""

import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from scaling.errors import StorageError


@dataclass
class TokenCounts:
    """What the sidecar of a cached token file says of it."""

    tokens: int = 0
    """Among them the one that ends each document, where the tokenizer has such a token."""
    bytes: int = 0
    """UTF-8 bytes of the text that the tokens stand for."""
    documents: int = 0
    """Files, or conversations, that were tokenised."""
    left_out: int = 0
    """Lines that were no conversation."""


@dataclass(frozen=True)
class CachedTokens:
    """A cached token file, open."""

    path: Path
    tokens: np.ndarray
    """Token ids, [counts.tokens], memory-mapped."""
    counts: TokenCounts


Write = Callable[[TokenCounts], Iterable[np.ndarray]]
"""Yields the ids of one document after the other and keeps the counts of bytes and documents up to date."""


def cached_tokens(folder: Path, key: str, dtype: np.dtype, write: Write) -> CachedTokens:
    """The cached token file of this key, made by `write` if it is absent or not whole.

    Any number of processes may call this at a time, on one host or on several: one of each host works, behind a lock
    that the kernel releases even if it dies, and the others wait. StorageError where the folder cannot be used.
    """
    try:
        entry = _open_entry(folder, key, dtype)  # first without the lock: a folder may be readable only
        if entry is not None:
            return entry
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{key}.lock") as alone:
            entry = _open_entry(folder, key, dtype)  # another process may have made it meanwhile
            if entry is None:
                if alone:
                    remove_remains(folder, key)
                _write_entry(folder, key, dtype, write)
                entry = _open_entry(folder, key, dtype)
    except OSError as error:
        raise StorageError(
            f"`data.cache` must be a folder with room for the tokenised text, but {folder.absolute()} fails: "
            f"{error.strerror or error}; free space or choose another folder"
        ) from error
    assert entry is not None, f"{key} was written and cannot be opened"
    return entry


def made_folder(cache: Path, name: str, make: Callable[[Path], None], title: str) -> Path:
    """The folder `name` of the cache, filled by `make` if it is absent; `title` is what the log calls that.

    Any number of processes may call this at a time, as `cached_tokens`. StorageError where the cache cannot be used.
    """
    path = cache / name
    try:
        if path.is_dir():
            return path
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / f"{name}.lock"):
            if not path.is_dir():
                with tempfile.TemporaryDirectory(dir=cache, prefix=f"{name}.") as folder:
                    logging.getLogger(__name__).info(title)
                    made = Path(folder, name)
                    make(made)
                    made.rename(path)
    except OSError as error:
        raise StorageError(
            f"`data.cache` must be a folder with room for what is made, but {cache.absolute()} fails: "
            f"{error.strerror or error}; free space or choose another folder"
        ) from error
    return path


def _open_entry(folder: Path, key: str, dtype: np.dtype) -> CachedTokens | None:
    """None where the entry is absent or its size is not what the sidecar says."""
    path = folder / f"{key}.bin"
    try:
        counts = TokenCounts(**json.loads((folder / f"{key}.json").read_bytes()))
        if path.stat().st_size != counts.tokens * dtype.itemsize:
            return None
    except (FileNotFoundError, ValueError, TypeError):
        return None
    # A mapping cannot be empty.
    tokens = np.memmap(path, dtype, mode="r") if counts.tokens else np.empty(0, dtype)
    return CachedTokens(path, tokens, counts)


def _write_entry(folder: Path, key: str, dtype: np.dtype, write: Write) -> None:
    counts = TokenCounts()
    with replacing(folder, f"{key}.bin") as file:
        for ids in write(counts):
            file.write(ids.astype(dtype).tobytes())
            counts.tokens += len(ids)
    with replacing(folder, f"{key}.json") as file:  # last, because with it the entry counts as whole
        file.write(json.dumps(asdict(counts)).encode())


@contextmanager
def replacing(folder: Path, name: str) -> Iterator[IO[bytes]]:
    """A new file that takes its name only once all of it is on the disk."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=f"{name}.", suffix=".tmp", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # temporary files are the owner's alone, but a cache may be shared
            os.replace(file.name, folder / name)
        except BaseException:
            os.unlink(file.name)
            raise


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Waits for the lock; false where the file system has none, and then several processes do the same work in vain."""
    logger = logging.getLogger(__name__)
    with open(path, "ab") as file:
        alone = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process to prepare the data")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("no lock on %s (%s): other processes may prepare the same data", path, error.strerror)
            alone = False
        yield alone


def remove_remains(folder: Path, key: str) -> None:
    """What a process that was killed at work has left; nobody else is at work on this key while we hold its lock."""
    for path in folder.glob(f"{key}.*.tmp"):
        path.unlink(missing_ok=True)
