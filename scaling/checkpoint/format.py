"""What is inside a checkpoint, and how it is written and read.

A checkpoint is a folder:

    __0_0.distcp, __1_0.distcp, …   tensors, as torch's Distributed Checkpoint (DCP) writes them
    .metadata                       DCP's index: which range of which tensor lies where
    state.json                      step, samples seen, counters of the optimizer, shapes, best validation, versions, …
    spec.json                       the resolved spec of the run
    MANIFEST.json                   size and SHA-256 of each of the files above; written last (see store.py)

Every tensor is flat, whatever its shape in the model, and is named KIND/PARAMETER: `master/head.weight` holds the fp32
weights, `exp_avg/head.weight` and `exp_avg_sq/head.weight` Adam's moments (trainable parameters only). Each rank writes
the ranges it owns, so nothing in the files depends on the backend but where the cuts are, and any other backend and
number of ranks reads the ranges it needs. Tied parameters are stored once, under their first name.

With torch alone, and for a checkpoint you trust:

    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    dcp_to_torch_save("runs/NAME/checkpoints/step-00001000", "state.pt")   # {"master/head.weight": tensor[n], …}

and `state.json` has the `shapes` to reshape them to. `Reader` below reads the same files without running what a pickle
asks for.
"""

import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import pickle
import queue
import zipfile
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from scaling.checkpoint.store import FileRecord
from scaling.errors import CheckpointError

FORMAT_VERSION = 1
STATE, SPEC, METADATA = "state.json", "spec.json", ".metadata"
FILE_BYTES = 4 << 30
"""Size at which a rank begins another file: small enough to be hashed and copied side by side."""
CHUNK_BYTES = 1 << 28
"""Longest range stored in one piece, so that a reader never holds much more than it asked for."""


class Pieces:
    """The ranges of one flat tensor that this rank writes. DCP asks it as it asks a DTensor (its `_Checkpointable`)."""

    def __init__(self, elements: int) -> None:
        self.elements = elements
        self.ranges: dict[int, Tensor] = {}
        """Start -> values [range], on the host."""

    def __create_write_items__(self, name: str, _pieces: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, (start,)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk,
                    properties=TensorProperties(dtype=self.ranges[start].dtype),
                    size=torch.Size([self.elements]),
                ),
            )
            for start, chunk in zip(self.ranges, self.__create_chunk_list__(), strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size([start]), torch.Size([values.numel()]))
            for start, values in self.ranges.items()
        ]


def write_tensors(
    folder: Path, pieces: Mapping[str, Pieces], files: "HashingFiles", group: dist.ProcessGroup | None
) -> None:
    """Write what this rank owns, each file synced, and note it in `files`; a collective call over `group`.

    Raises torch's CheckpointException, a BaseException, on all ranks where one of them fails.
    """
    planner = _Planner(flatten_state_dict=False)
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # nobody would look at them: the manifest has better ones
    try:
        save(dict(pieces), storage_writer=_Writer(folder, files), planner=planner, process_group=group)
    finally:
        torch.serialization.set_crc32_options(before)


class _Planner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.state_dict[index.fqn].ranges[index.offset[0]]


class _Writer(FileSystemWriter):
    """DCP's writer, with a checksum taken of every byte on its way, and a limit to the size of files."""

    def __init__(self, folder: Path, files: "HashingFiles") -> None:
        # One thread: DCP 2.13 loses the exceptions of further ones, a full disk among them, and publishes anyway.
        # `files` syncs what it writes.
        super().__init__(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=0, overwrite=False)
        self.fs = files

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # DCP's own records the path of the folder, which is about to change

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[Any]:
        results: list[Any] = []
        for number, items in enumerate(_by_size(plan.items)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            file: queue.Queue[Any] = queue.Queue()
            file.put((self.fs.concat_path(self.path, name), name, items))
            results += self._write_data(planner, file).wait()
        done: torch.futures.Future[Any] = torch.futures.Future()
        done.set_result(results)
        return done


_BLOCK_BYTES = 4 << 20
"""Written at once, past the page cache."""
_PART_BYTES = 1 << 18
"""Still in the core's cache when it is copied after it was hashed."""


class HashingFiles(FileSystem):
    """Files that are written once, front to back, with their checksums, and are on the disk when they are closed."""

    def __init__(self, wrote: Callable[[int], None] = lambda count: None) -> None:
        self.wrote = wrote
        """Called with the number of bytes after each block of them."""
        self.records: dict[str, FileRecord] = {}
        """Each file that was written, by name."""
        self.error: OSError | None = None
        """What went wrong with one of them."""

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[Any, None, None]:
        assert mode == "wb", mode
        try:
            with open(path, "xb", buffering=0) as raw:
                stream = _HashingStream(raw, self)
                try:
                    yield stream
                    stream.finish()
                finally:
                    stream.stop()
        except OSError as error:
            self.error = error
            raise
        self.records[Path(path).name.removesuffix(".tmp")] = FileRecord(stream.bytes, stream.digest.hexdigest())


class _HashingStream(io.RawIOBase):
    """Hashes what passes, and writes it in blocks straight to the disk (O_DIRECT) where the file system can.

    The page cache would cost a second copy of the state in memory, and its kernel time comes at training's expense. A
    thread writes one block while the next is hashed.
    """

    def __init__(self, raw: io.FileIO, files: HashingFiles) -> None:
        self._raw = raw
        self._files = files
        self._block, self._other = _new_block(), None
        self._held = 0
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None
        self.bytes = 0
        self.digest = hashlib.sha256()
        self._pass_cache(True)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        size = view.nbytes
        try:
            while len(view):
                part = view[: min(_PART_BYTES, _BLOCK_BYTES - self._held)]
                self.digest.update(part)
                self._block[self._held : self._held + len(part)] = part
                self._held += len(part)
                view = view[len(part) :]
                if self._held == _BLOCK_BYTES:
                    self._write_behind()
                    self._files.wrote(_BLOCK_BYTES)
        except OSError as error:
            self._files.error = error  # torch, which calls this, turns it into something else
            raise
        self.bytes += size
        return size

    def finish(self) -> None:
        """Bring the rest to the disk."""
        self._join()
        self._pass_cache(False)  # its length is no multiple of what the disk writes
        self._write_block(self._block, self._held)
        os.fsync(self._raw.fileno())

    def stop(self) -> None:
        """End the thread, whatever became of its block."""
        if self._thread is not None:
            self._thread.shutdown()

    def _write_behind(self) -> None:
        self._join()
        if self._thread is None or self._other is None:
            self._thread, self._other = ThreadPoolExecutor(1, "checkpoint"), _new_block()
        self._writing = self._thread.submit(self._write_block, self._block, self._held)
        self._block, self._other, self._held = self._other, self._block, 0

    def _join(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_block(self, block: mmap.mmap, count: int) -> None:
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

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes


def _new_block() -> mmap.mmap:
    return mmap.mmap(-1, _BLOCK_BYTES)  # begins on a page, as O_DIRECT demands


def _by_size(items: Sequence[WriteItem]) -> list[list[WriteItem]]:
    """The items in files of at most FILE_BYTES, or one item."""
    files: list[list[WriteItem]] = []
    room = 0
    for item in items:
        assert item.tensor_data is not None
        size = item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        if not files or size > room:
            files.append([])
            room = FILE_BYTES
        files[-1].append(item)
        room -= size
    return files


class Reader:
    """The tensors of one checkpoint. Raises CheckpointError for files that are not what the index says.

    Nothing that is read can run code: the index goes through an unpickler that knows its few classes and no other, the
    tensors through torch's `weights_only` one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = read_state(folder)
        index = _read_index(folder)
        self._chunks: dict[str, list[_Chunk]] = {}
        self.elements: dict[str, int] = {}
        """Elements of each tensor, by its name KIND/PARAMETER."""
        for key, entry in index.state_dict_metadata.items():
            self.elements[key], self._chunks[key] = _chunks_of(folder, key, entry, index.storage_data)
        self._files: dict[str, IO[bytes]] = {}

    def read(self, key: str, start: int, count: int) -> Tensor:
        """Elements start .. start+count-1 of a tensor, [count], on the host, in the type they are stored in."""
        assert 0 <= start <= start + count <= self.elements[key], (key, start, count)
        chunks = self._chunks[key]
        found = torch.empty(count, dtype=chunks[0].dtype)
        for chunk in chunks:
            first, last = max(start, chunk.start), min(start + count, chunk.start + chunk.count)
            if first < last:
                values = self._load(key, chunk)
                found[first - start : last - start] = values[first - chunk.start : last - chunk.start]
        return found

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _load(self, key: str, chunk: "_Chunk") -> Tensor:
        if chunk.file not in self._files:
            self._files[chunk.file] = open(self.folder / chunk.file, "rb")  # noqa: SIM115 - closed by `close`
        file = self._files[chunk.file]
        file.seek(chunk.offset)
        blob = io.BytesIO(file.read(chunk.length))
        problem = _blob_problem(blob, chunk)
        if problem is None:
            try:
                values = torch.load(blob, map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
                problem = str(error).partition("\n")[0]
            else:
                if isinstance(values, Tensor) and values.shape == (chunk.count,) and values.dtype == chunk.dtype:
                    return values
                problem = "it holds something else"
        raise unusable(self.folder / chunk.file, f"{chunk.count} values of {key} at byte {chunk.offset}", problem)


@dataclass(frozen=True)
class _Chunk:
    start: int
    count: int
    dtype: torch.dtype
    file: str
    offset: int
    length: int


_KNOWN = {
    "torch": {"Size", "float32", "float64", "float16", "bfloat16"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
}
"""All that DCP's index is made of. None of them does anything when called but hold values."""


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _KNOWN.get(module_name, ()):
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no index needs")
        return super().find_class(module_name, global_name)


def _read_index(folder: Path) -> Metadata:
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
    except Exception as error:  # an unpickler fed with garbage raises anything
        raise unusable(path, "the index of a checkpoint", str(error) or type(error).__name__) from None
    if not (isinstance(index, Metadata) and isinstance(index.state_dict_metadata, dict)):
        raise unusable(path, "the index of a checkpoint", f"it is a {type(index).__name__}")
    if not isinstance(index.storage_data, dict):
        raise unusable(path, "the index of a checkpoint", "it does not say where anything lies")
    return index


def _chunks_of(folder: Path, key: str, entry: Any, places: dict[Any, Any]) -> tuple[int, list[_Chunk]]:
    """The length of a tensor and its stored ranges in order; they must cover it exactly."""
    path = folder / METADATA
    if not (isinstance(key, str) and isinstance(entry, TensorStorageMetadata) and len(entry.size) == 1):
        raise unusable(path, "flat tensors", f"{str(key)[:80]!r} is none")
    chunks: list[_Chunk] = []
    for chunk in entry.chunks:
        place = places.get(MetadataIndex(key, chunk.offsets))
        file = getattr(place, "relative_path", None)
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise unusable(path, "names of files in its own folder", f"{key} lies in {str(file)[:80]!r}")
        if (folder / file).is_symlink():
            raise unusable(folder / file, "a file", "it is a link")
        offset, length = getattr(place, "offset", None), getattr(place, "length", None)
        if not (isinstance(offset, int) and isinstance(length, int) and offset >= 0 and length >= 0):
            raise unusable(path, f"where {key} lies", f"it says {offset!r}, {length!r}")
        chunks.append(_Chunk(chunk.offsets[0], chunk.sizes[0], entry.properties.dtype, file, offset, length))
    chunks.sort(key=lambda chunk: chunk.start)
    end = 0
    for chunk in chunks:
        if chunk.start != end or chunk.count < 0:
            raise unusable(path, f"each element of {key} once", f"elements {end} to {chunk.start} are not")
        end += chunk.count
    if end != entry.size[0] or not chunks:
        raise unusable(path, f"all {entry.size[0]} elements of {key}", f"it ends at {end}")
    return end, chunks


def _blob_problem(blob: io.BytesIO, chunk: _Chunk) -> str | None:
    """What is wrong with a stored range before torch looks at it: a few bytes can unpack to more than the memory."""
    if blob.getbuffer().nbytes != chunk.length:
        return f"the file ends {chunk.length - blob.getbuffer().nbytes} bytes early"
    try:
        entries = zipfile.ZipFile(blob).infolist()
    except zipfile.BadZipFile as error:
        return str(error)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "it is compressed, which no checkpoint is"
    if sum(entry.file_size for entry in entries) > chunk.length:
        return "it claims to hold more than it has bytes"
    blob.seek(0)
    return None


_STATE_TYPES: dict[str, Any] = {
    **dict.fromkeys(("step", "samples_seen", "tokens_seen", "global_batch", "sequence_length", "seed"), int),
    **dict.fromkeys(("skipped", "trainable"), list),
    **dict.fromkeys(("counters", "shapes"), dict),
    "best": dict | None,
    "data": str,
    "origin": str | None,
}


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with spec.json as its "spec". CheckpointError where it is not one of ours."""
    path = folder / STATE
    state = _read_json(path)
    if (version := state.get("format_version")) != FORMAT_VERSION:
        raise unusable(path, f"the format version {FORMAT_VERSION}", f"it has {version!r}")
    for name, kind in _STATE_TYPES.items():
        if name not in state or not isinstance(state[name], kind):
            raise unusable(path, f"`{name}` of a kind that fits", f"it is {str(state.get(name))[:80]!r}")
    return {**state, "spec": _read_json(folder / SPEC)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            value = json.loads(file.read(1 << 28))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(path, "a JSON object", str(error)[:200]) from None
    if not isinstance(value, dict):
        raise unusable(path, "a JSON object", f"it is a {type(value).__name__}")
    return value


def unusable(path: Path, wanted: str, problem: str | None) -> CheckpointError:
    """The error for a file of a checkpoint that cannot be used."""
    return CheckpointError(
        f"`{path}` must hold {wanted}, but does not ({problem}); use another checkpoint: `--resume` takes its path"
    )
