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

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from scaling.checkpoint.files import HashingFile
from scaling.checkpoint.store import FileRecord, write_synced
from scaling.errors import CheckpointError

FORMAT_VERSION = 1
STATE, SPEC, METADATA = "state.json", "spec.json", ".metadata"
FILE_BYTES = 4 << 30
"""Size at which a rank begins another file: small enough to be hashed and copied side by side."""
CHUNK_BYTES = 1 << 28
"""Longest range stored in one piece, so that a reader never holds much more than it asked for."""


@dataclass
class Pieces:
    """The ranges of one flat tensor that this rank writes."""

    elements: int
    """Of the whole tensor."""
    ranges: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    """Start -> values [range], on the host."""


@dataclass(frozen=True)
class Written:
    """What a rank has written, to be known to all."""

    chunks: list[tuple[str, int, "_Chunk"]]
    """Tensor, its elements, and one of its ranges."""
    files: dict[str, FileRecord]
    """Each file by name."""


def write_tensors(
    folder: Path,
    pieces: Mapping[str, Pieces],
    rank: int,
    wrote: Callable[[int], None],
    begin_thread: Callable[[], None],
) -> Written:
    """Write the ranges of this rank, each file synced; the last two are HashingFile's. Raises OSError."""
    written = Written([], {})
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # nobody would look at them: the manifest has better ones
    try:
        for number, part in enumerate(_by_size(pieces)):
            name = f"__{rank}_{number}.distcp"
            with HashingFile(folder / name, wrote, begin_thread) as file:
                for key, elements, start, values in part:
                    offset = file.bytes
                    _save(values, file)
                    chunk = _Chunk(start, values.numel(), values.dtype, name, offset, file.bytes - offset)
                    written.chunks.append((key, elements, chunk))
            written.files[name] = file.record
    finally:
        torch.serialization.set_crc32_options(before)
    return written


def write_index(folder: Path, written: Sequence[Written]) -> FileRecord:
    """Write the index of what all ranks have written, as DCP's FileSystemWriter does in its `finish`."""
    tensors: dict[str, Any] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for key, elements, chunk in (found for part in written for found in part.chunks):
        properties = TensorProperties(dtype=chunk.dtype)
        entry = tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size([elements]), []))
        entry.chunks.append(ChunkStorageMetadata(torch.Size([chunk.start]), torch.Size([chunk.count])))
        index = MetadataIndex(key, (chunk.start,), len(entry.chunks) - 1)
        places[index] = _StorageInfo(chunk.file, chunk.offset, chunk.length)
    index = Metadata(tensors, storage_data=places, storage_meta=StorageMeta())
    return write_synced(folder / METADATA, pickle.dumps(index))


def _save(values: Tensor, file: HashingFile) -> None:
    try:
        torch.save(values, file)  # pyright: ignore[reportArgumentType]
    except Exception:
        if file.error is not None:  # torch speaks of its archive that broke off
            raise file.error from None
        raise


def _by_size(pieces: Mapping[str, Pieces]) -> Iterator[list[tuple[str, int, int, Tensor]]]:
    """(tensor, its elements, start, values) of each range, in files of at most FILE_BYTES, or of one range."""
    part: list[tuple[str, int, int, Tensor]] = []
    room = FILE_BYTES
    for key, found in pieces.items():
        for start, values in found.ranges.items():
            if part and values.nbytes > room:
                yield part
                part, room = [], FILE_BYTES
            part.append((key, found.elements, start, values))
            room -= values.nbytes
    if part:
        yield part


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
