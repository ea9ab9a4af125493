"""Tensors in safetensors files, read and written a range at a time.

A file is the length of its header in 8 bytes (little-endian), the header, and then the values of all tensors without a
gap. The header is JSON: {name: {"dtype": …, "shape": […], "data_offsets": [begin, end]}}, with offsets from its own
end, and under "__metadata__" a few strings (https://github.com/huggingface/safetensors#format). The library of that
name maps files into memory, which counts as the process's own, and has no flat ranges: hence these few functions.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from scaling.errors import CheckpointError

SUFFIX = ".safetensors"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_HEADER_BYTES = 100_000_000
"""Longest header, as the library has it."""
_JSON_BYTES = 1 << 27
_PIECE = 1 << 24
"""Elements converted at a time."""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WIDTHS = {name: dtype.itemsize for name, dtype in _FLOATS.items()}
_WIDTHS |= {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8}
_WIDTHS |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
"""Bytes of an element."""
NAMES = {dtype: name for name, dtype in _FLOATS.items()}
"""What the format calls the types that weights have."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    path: Path
    dtype: str
    """As the format calls it."""
    shape: tuple[int, ...]
    offset: int
    """First byte within the file."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TensorFiles:
    """The tensors of one or more files, by name. CheckpointError for what is not as the format wants it."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        for path in paths:
            for name, entry in read_header(path).items():
                if name in self.entries:
                    raise refused(path, "tensors that no other file has", f"{name} is in {self.entries[name].path} too")
                self.entries[name] = entry
        self._files: dict[Path, IO[bytes]] = {}

    def check_types(self, names: Iterable[str]) -> None:
        """CheckpointError where one of these tensors is of a type that no weights have."""
        for name in names:
            entry = self.entries[name]
            if entry.dtype not in _FLOATS:
                types = f"weights as {', '.join(_FLOATS)}"
                raise refused(entry.path, types, f"{name} is {entry.dtype}", "convert them, unquantized")

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Elements start .. start+count-1 of a flattened tensor of floats, [count], in the type they are stored in."""
        entry = self.entries[name]
        assert 0 <= start <= start + count <= entry.elements, (name, start, count)
        values = torch.empty(count, dtype=_FLOATS[entry.dtype])
        rest = values.view(torch.uint8).numpy().data
        with reading(entry.path):
            if entry.path not in self._files:
                self._files[entry.path] = open(entry.path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
            file = self._files[entry.path]
            file.seek(entry.offset + start * _WIDTHS[entry.dtype])
            while len(rest):
                done = file.readinto(rest)  # pyright: ignore[reportAttributeAccessIssue] - a raw file
                if not done:
                    raise refused(entry.path, f"the values of {name}", f"it ends {len(rest)} bytes early")
                rest = rest[done:]
        return values

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def read_header(path: Path) -> dict[str, Entry]:
    """What is in a file. The tensors must fill it from the header to its end, each byte once."""
    wanted = "safetensors"
    if not path.is_file():  # a FIFO would be waited for
        raise refused(path, wanted, "is no file" if path.exists() else "does not exist", "correct the path")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _HEADER_BYTES):
            raise refused(path, wanted, f"its header would be {length} bytes of {size}: it is no such file, or a part")
        text = file.read(length)
    document = _parse(path, text)
    document.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in document.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].elements)):
        if entry.offset != end:
            raise refused(path, "each byte of its values once", f"{name} begins at byte {entry.offset}, not at {end}")
        end += entry.elements * _WIDTHS[entry.dtype]
    if end != size:
        raise refused(path, "its tensors and nothing else", f"they end at byte {end} of {size}")
    return entries


def _entry(path: Path, name: str, value: Any, begin: int) -> Entry:
    problem = f"the entry of {name[:80]!r} is {str(value)[:120]!r}"
    if not (isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}):
        raise refused(path, "dtype, shape and data_offsets of each tensor", problem)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and dtype in _WIDTHS):
        raise refused(path, "tensors of a known dtype", problem)
    if not (_sizes(shape) and _sizes(offsets) and len(offsets) == 2):
        raise refused(path, "whole numbers as shapes and offsets", problem)
    if offsets[1] - offsets[0] != math.prod(shape) * _WIDTHS[dtype]:
        raise refused(path, "as many bytes of each tensor as its shape says", problem)
    return Entry(path, dtype, tuple(shape), begin + offsets[0])


def _sizes(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 16 and all(type(size) is int and 0 <= size < 2**63 for size in value)
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file that anyone may have written: no pipe is waited for, no name may stand twice."""
    if not path.is_file():
        raise refused(path, "a JSON object", "is no file" if path.exists() else "does not exist")
    with open(path, "rb") as file:
        return _parse(path, file.read(_JSON_BYTES))


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise refused(path, "a JSON object", f"is not one ({str(error)[:120]})") from None
    if not isinstance(value, dict):
        raise refused(path, "a JSON object", f"has a {type(value).__name__}")
    return value


def files_of(path: Path) -> list[Path]:
    """The safetensors files that `path` names: one of them, the index of several, or a folder of either."""
    if path.name.endswith(SUFFIX):
        return [path]
    if path.name.endswith(".json"):
        return _indexed(path)
    if not path.is_dir():
        raise refused(
            path, "weights", "is no folder, .safetensors file or its index" if path.exists() else "does not exist"
        )
    folder = path.resolve()
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [_within(folder, SINGLE, folder / SINGLE)]
    if (folder / INDEX).exists():
        return _indexed(folder / INDEX)
    names = sorted(os.listdir(folder))
    found = [name for name in names if name.endswith(SUFFIX)]
    if len(found) == 1:
        return [_within(folder, found[0], folder / found[0])]
    if found:
        raise refused(path, f"{SINGLE} or {INDEX}", f"has {len(found)} files and no index", "name one of them")
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise refused(
            path,
            "safetensors",
            f"has {pickles[0]}, a pickle, which can run any code when it is read",
            "where you trust it, load it with transformers and `save_pretrained` it again: that writes safetensors",
        )
    raise refused(path, "weights", "has neither safetensors nor a checkpoint")


def _indexed(path: Path) -> list[Path]:
    places = read_json(path).get("weight_map")
    if not (isinstance(places, dict) and places and all(isinstance(file, str) for file in places.values())):
        raise refused(path, "a `weight_map` from names to files", "has none")
    folder = path.parent.resolve()
    return [_within(folder, file, path) for file in sorted(set(places.values()))]


def _within(folder: Path, name: str, source: Path) -> Path:
    """The file of that name in `folder`. A link may only lead to where Hugging Face's cache keeps its files."""
    plain = Path(name).name == name and "\0" not in name and name.endswith(SUFFIX)
    if not plain:
        raise refused(source, "names of .safetensors files in its own folder", f"has {name[:120]!r}")
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    if (folder / name).resolve().parent not in homes:
        raise refused(
            folder / name, "its values itself", "is a link that leads out of its folder", "copy the file here"
        )
    return folder / name


def write_file(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    dtype: torch.dtype,
    values: Callable[[str], Iterable[Callable[[], Tensor]]],
    advance: Callable[[int], None],
) -> None:
    """Write a new file and wait until the disk has it. OSError where that fails.

    `tensors`: names and shapes, in order. `values(name)` gives functions whose results, one after another, are the
    flattened tensor; each is called only when the one before is written and gone. `advance` hears of bytes written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that do not say this
    end = 0
    for name, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values then lie where any type may
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            written = sum(_write(file, read(), dtype, advance) for read in values(name))
            assert written == math.prod(shape), (name, written, shape)
        file.flush()
        os.fsync(file.fileno())


def _write(file: IO[bytes], values: Tensor, dtype: torch.dtype, advance: Callable[[int], None]) -> int:
    for piece in values.view(-1).split(_PIECE):  # converted whole, it would be there twice
        data = piece.to(dtype).view(torch.uint8)
        file.write(data.numpy().data)
        advance(data.numel())
    return values.numel()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What cannot be read in its body becomes a CheckpointError that names `path`."""
    try:
        yield
    except OSError as error:
        raise refused(path, "what can be read", f"cannot be ({error.strerror or error})", "correct that") from None


def refused(path: Path, wanted: str, problem: str, remedy: str = "download or export it again") -> CheckpointError:
    """The error for weights that cannot be used."""
    return CheckpointError(f"`{path}` must hold {wanted}, but {problem}; {remedy}")
