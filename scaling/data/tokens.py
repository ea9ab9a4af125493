"""Files that hold token ids already: .npy, and .bin as the nano-gpt family writes them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scaling.data.files import matching_files, refuse_shared_files, unreadable
from scaling.data.windows import TokenFile, TokenStream, WindowDataset, hold_out_tail, refuse_too_small
from scaling.errors import UserError
from scaling.spec.sections import TokenData

_MAGIC, _HEADER_BYTES = 20240520, 1024
"""llm.c and modded-nanogpt begin their .bin files with 256 int32: the magic number, a version and the number of tokens
(https://github.com/karpathy/llm.c/blob/master/dev/data/data_common.py); nanoGPT's have no header."""


def open_token_data(data: TokenData, vocab_size: int) -> tuple[WindowDataset, WindowDataset | None]:
    """The training and the validation samples; UserError for files that cannot be used or are too small."""
    train_paths = matching_files(data.train, "data.train", with_stdlib=False)
    train = _open_stream(train_paths, data, vocab_size)
    refuse_too_small(train, "data.train")
    if not isinstance(data.validation, list):
        return hold_out_tail(train, data.validation) if data.validation else (train, None)

    validation_paths = matching_files(data.validation, "data.validation", with_stdlib=False)
    refuse_shared_files(train_paths, validation_paths)
    validation = _open_stream(validation_paths, data, vocab_size)
    refuse_too_small(validation, "data.validation")
    return train, validation


def _open_stream(paths: Sequence[Path], data: TokenData, vocab_size: int) -> WindowDataset:
    stream = TokenStream([TokenFile(path, _open(path, np.dtype(data.dtype))) for path in paths])
    return WindowDataset(stream, 0, len(stream), data.sequence_length, vocab_size, data.ignore_token_id)


def _open(path: Path, dtype: np.dtype) -> np.ndarray:
    """The tokens of one file, memory-mapped, in the file's own integer type."""
    try:
        if path.suffix == ".npy":
            return _open_npy(path)
        if path.suffix == ".bin":
            return _open_bin(path, dtype.newbyteorder("<"))
    except OSError as error:
        raise unreadable(path, error) from error
    raise UserError(f"token files must end in .npy or .bin, but {path} does not; rename it or narrow the glob")


def _open_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # what numpy raises for a file that is cut short or is something else
        raise UserError(f"{path} must be a whole .npy file, but is not: {error}; write it again") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(
            f"{path} must hold one dimension of whole numbers, but holds {tokens.dtype} of shape {tokens.shape}; "
            "flatten and convert it"
        )
    return tokens


def _open_bin(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size
    header = _header_bytes(path, size, dtype)
    if size % dtype.itemsize:
        raise UserError(
            f"{path} must be a whole number of {dtype.name} values, but has {size} bytes; "
            "set `data.dtype` to the type it was written with, or write it again"
        )
    if size == header:  # a mapping cannot be empty
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=header)


def _header_bytes(path: Path, size: int, dtype: np.dtype) -> int:
    """How many bytes to skip; tokens are taken for a header only where the count in it is that of the file too."""
    words = np.fromfile(path, "<i4", count=3)
    if len(words) == 3 and words[0] == _MAGIC and size == _HEADER_BYTES + int(words[2]) * dtype.itemsize:
        return _HEADER_BYTES
    return 0
