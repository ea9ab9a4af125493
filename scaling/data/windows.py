"""Samples as windows of a long stream of tokens that lies in one or more memory-mapped files."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scaling.data.dataset import MicroBatch, from_windows
from scaling.errors import UserError


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens."""

    path: Path
    tokens: np.ndarray
    """Token ids of any integer type, [tokens], as a rule memory-mapped."""
    digest: str | None = None
    """A hash of what it was made from, where one is known."""

    def identity(self) -> str:
        """The digest; or else the length and a hash of 64 places of up to 4,096 tokens, the first and the last among
        them: reading all of a large file at each start would take minutes.
        """
        if self.digest is not None:
            return self.digest
        count, size = len(self.tokens), 4096
        starts = np.linspace(0, max(0, count - size), 64).astype(np.int64)
        content = hashlib.sha256(b"".join(self.tokens[start : start + size].tobytes() for start in starts))
        return f"{count} {self.tokens.dtype} {content.hexdigest()}"


class TokenStream:
    """Several files read as one stream, which is never put together in memory."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self._files = list(files)
        self._starts = np.cumsum([0] + [len(file.tokens) for file in files])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def identities(self) -> list[str]:
        """What identifies each file."""
        return [file.identity() for file in self._files]

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens at start .. stop-1, int64 [stop - start], from as many files as it takes."""
        pieces: list[np.ndarray] = []
        while start < stop:
            number, offset = self._locate(start)
            piece = self._files[number].tokens[offset : offset + stop - start]
            pieces.append(piece.astype(np.int64))  # each by itself: numpy joins uint64 and int64 to floats
            start += len(piece)
        return np.concatenate(pieces)

    def place(self, position: int) -> tuple[Path, int]:
        """The file that holds this token of the stream, and the token's position in that file."""
        number, offset = self._locate(position)
        return self._files[number].path, offset

    def _locate(self, position: int) -> tuple[int, int]:
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return number, position - int(self._starts[number])


@dataclass(frozen=True)
class WindowDataset:
    """Windows of sequence_length + 1 tokens, each beginning with the last token of the one before it.

    So each token of the stream is a target once, but the first; the tokens after the last whole window are dropped.
    """

    stream: TokenStream
    start: int
    """First token of the part of the stream that is cut into windows."""
    stop: int
    """The token after the last of that part."""
    sequence_length: int
    vocab_size: int
    ignore_token_id: int | None = None
    """Targets with this id are masked."""
    bytes_per_token: float | None = None

    @property
    def fingerprint(self) -> str:
        parts = (*self.stream.identities(), self.start, self.stop, self.ignore_token_id)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    @property
    def terms_per_sample(self) -> int | None:
        return self.sequence_length if self.ignore_token_id is None else None

    def __len__(self) -> int:
        return max(0, (self.stop - self.start - 1) // self.sequence_length)

    def read(self, indices: np.ndarray) -> MicroBatch:
        """The samples with these indices; see `Dataset.read`. UserError for an id outside the vocabulary."""
        assert indices.min() >= 0 and indices.max() < len(self), "index outside the dataset"
        length = self.sequence_length
        starts = [self.start + int(index) * length for index in indices]
        windows = np.stack([self.stream.read(start, start + length + 1) for start in starts])
        # Here it costs next to nothing, and on a GPU a bad id would be an assertion that names no file.
        if windows.min() < 0 or windows.max() >= self.vocab_size:
            self._refuse(windows, starts)
        return from_windows(windows, None if self.ignore_token_id is None else windows[:, 1:] == self.ignore_token_id)

    def _refuse(self, windows: np.ndarray, starts: list[int]) -> None:
        row, column = np.argwhere((windows < 0) | (windows >= self.vocab_size))[0]
        path, position = self.stream.place(starts[row] + int(column))
        raise UserError(
            f"token ids must be in 0 .. {self.vocab_size - 1} (`model.vocab_size` is {self.vocab_size}), "
            f"but token {position} of {path} is {windows[row, column]}; enlarge the vocabulary, "
            "or check that the file's element type is `data.dtype`"
        )


def refuse_too_small(dataset: WindowDataset, field: str) -> None:
    """UserError where there is not even one window."""
    if len(dataset) == 0:
        raise UserError(
            f"`{field}` must hold at least {dataset.sequence_length + 1} tokens (data.sequence_length and one more), "
            f"but holds {dataset.stop - dataset.start}; add data or shorten `data.sequence_length`"
        )


def hold_out_tail(dataset: WindowDataset, fraction: float) -> tuple[WindowDataset, WindowDataset]:
    """Training and validation part: the last `fraction` of the windows, at least one, is held out.

    The parts share no token, not even that between two windows. UserError where nothing would be left to train on.
    """
    held_out = max(1, int(len(dataset) * fraction))
    boundary = dataset.stop - (held_out * dataset.sequence_length + 1)
    train, validation = replace(dataset, stop=boundary), replace(dataset, start=boundary)
    if len(train) == 0:
        raise UserError(
            "`data.validation` must leave at least one sample to train on, "
            f"but holds out {held_out} of {len(dataset)}; "
            "add data, shorten `data.sequence_length`, or set `data.validation` to 0"
        )
    return train, validation
