"""Text files, tokenised once and then read as a stream of tokens."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scaling.data.cache import TokenCounts, cached_tokens
from scaling.data.files import (
    changed,
    digest_of,
    is_standard_library,
    matching_files,
    refuse_shared_files,
    unreadable,
)
from scaling.data.lines import read_each, read_lines, tell_left_out, text_of
from scaling.data.progress import progress_in_bytes
from scaling.data.tables import TABLES
from scaling.data.tokenizer import Tokenizer, open_tokenizer
from scaling.data.windows import TokenFile, TokenStream, WindowDataset, hold_out_tail, refuse_too_small
from scaling.errors import UserError
from scaling.spec.sections import TextData

_FORMAT = "scaling text cache 1"
"""Part of every key: to be raised when the same files come to be tokenised otherwise."""
_BATCH_BYTES = 4 << 20
"""Text tokenised at a time: enough to occupy all threads of the tokenizers library, little beside a host's memory."""


@dataclass(frozen=True)
class _Document:
    """A text file and what was in it when we looked."""

    path: Path
    digest: str
    """SHA-256 of the content, hexadecimal."""
    size_bytes: int

    @property
    def holds_lines(self) -> bool:
        """Whether each of its lines is an object with a text of its own."""
        return self.path.suffix in (".jsonl", *TABLES)


def open_text_data(data: TextData, vocab_size: int) -> tuple[WindowDataset, WindowDataset | None]:
    """The training and the validation samples, tokenised now if they are not in the cache.

    The files are hashed each time: that is quick beside training, and neither dates nor paths tell what is in a file.
    Errors: UserError for files or tokenizers that cannot be used, StorageError for the cache folder.
    """
    tokenizer = open_tokenizer(data.tokenizer, vocab_size)
    train = _look_at(matching_files(data.train, "data.train", with_stdlib=True, with_saved=True))
    if isinstance(data.validation, list):
        validation = _look_at(matching_files(data.validation, "data.validation", with_stdlib=True, with_saved=True))
        refuse_shared_files([document.path for document in train], [document.path for document in validation])
    elif data.validation == 0:
        validation = []
    elif len(train) == 1:
        # A share of one file would be all of it or nothing: the end of its text is held out instead.
        whole = _open_windows(train, "data.train", data, tokenizer, vocab_size)
        return hold_out_tail(whole, data.validation)
    else:
        train, validation = _split(train, data.validation)

    return (
        _open_windows(train, "data.train", data, tokenizer, vocab_size),
        _open_windows(validation, "data.validation", data, tokenizer, vocab_size) if validation else None,
    )


def _look_at(paths: Sequence[Path]) -> list[_Document]:
    return [_Document(path, *digest_of(path)) for path in paths]


def _split(documents: Sequence[_Document], fraction: float) -> tuple[list[_Document], list[_Document]]:
    """Training and validation files. What is in a file decides, so that neither paths nor copies of a file matter."""
    digests = {document.digest for document in documents}
    held_out = {digest for digest in digests if int(digest[:16], 16) < fraction * 2**64} or {min(digests)}
    train = [document for document in documents if document.digest not in held_out]
    if not train:
        raise UserError(
            f"`data.validation` must leave files to train on, but {fraction} holds out all {len(documents)} of them "
            "(copies of a file count as one); add files, lower it, or set it to globs"
        )
    return train, [document for document in documents if document.digest in held_out]


def _open_windows(
    documents: Sequence[_Document], field: str, data: TextData, tokenizer: Tokenizer, vocab_size: int
) -> WindowDataset:
    # Which files are held out shows in the list of digests, so the split needs no place of its own in the key.
    # Names do not matter but for their end, which says how a file is read.
    kinds = [f" {document.path.suffix[1:]} {data.malformed}" if document.holds_lines else "" for document in documents]
    texts = [document.digest + kind for document, kind in zip(documents, kinds, strict=True)]
    parts = [_FORMAT, tokenizer.identity, *texts]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    dtype = np.dtype("<u2" if tokenizer.vocabulary <= 2**16 else "<u4")

    def write(counts: TokenCounts) -> Iterator[np.ndarray]:
        return _tokenise(documents, field, data, tokenizer, counts)

    entry = cached_tokens(Path(data.cache), key, dtype, write)
    tell_left_out(entry.counts.left_out, field)
    ratio = entry.counts.bytes / entry.counts.tokens if entry.counts.tokens else None
    stream = TokenStream([TokenFile(entry.path, entry.tokens, key)])
    dataset = WindowDataset(stream, 0, len(stream), data.sequence_length, vocab_size, bytes_per_token=ratio)
    refuse_too_small(dataset, field)
    return dataset


def _tokenise(
    documents: Sequence[_Document], field: str, data: TextData, tokenizer: Tokenizer, counts: TokenCounts
) -> Iterator[np.ndarray]:
    total_bytes = sum(document.size_bytes for document in documents)
    with progress_in_bytes(f"tokenising {field} ({len(documents)} files)", total_bytes) as advance:
        for batch in _batches(documents, data, counts):
            yield from tokenizer.encode(batch)
            size_bytes = sum(len(text.encode()) for text in batch)
            counts.bytes += size_bytes
            counts.documents += len(batch)
            advance(size_bytes)


def _batches(documents: Sequence[_Document], data: TextData, counts: TokenCounts) -> Iterator[list[str]]:
    """The texts, some MB at a time; one larger file makes a batch of its own."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        for text in _lines_of(document, data, counts) if document.holds_lines else _read(document):
            batch.append(text)
            characters += len(text)
            if characters >= _BATCH_BYTES:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _lines_of(document: _Document, data: TextData, counts: TokenCounts) -> Iterator[str]:
    """The `text` of each line of a .jsonl file, as MiniMind's pretraining data have it, or of each row of a table."""
    lines = read_lines(document.path, document.digest)
    return read_each(lines, lambda record: text_of(record, "text"), data.malformed, counts)


def _read(document: _Document) -> list[str]:
    """The text; none for a file of the standard library that is not UTF-8 (its tests hold some on purpose)."""
    path = document.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if hashlib.sha256(content).hexdigest() != document.digest:
        raise changed(path)
    try:
        return [content.decode("utf-8")]
    except UnicodeDecodeError as error:
        if is_standard_library(path):
            logging.getLogger(__name__).debug("left out %s: %s", path, error)
            return []
        raise UserError(
            f"data file {path} must be UTF-8, but is not at byte {error.start}; "
            "convert it (`iconv -t utf-8`) or leave it out"
        ) from error
