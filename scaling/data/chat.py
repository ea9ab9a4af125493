"""Samples of conversations: tokenised once into a cached file, packed, the assistant's words marked as targets."""

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from scaling.data.cache import TokenCounts, cached_tokens
from scaling.data.conversations import Said, messages_of, pieces
from scaling.data.dataset import MicroBatch, PackedBatch
from scaling.data.docstrings import docstring_lines
from scaling.data.files import digest_of, is_standard_library, matching_files, refuse_shared_files
from scaling.data.hashing import derive, derive_each
from scaling.data.lines import Line, read_each, read_lines, tell_left_out
from scaling.data.packing import pack
from scaling.data.progress import progress_in_bytes
from scaling.data.tables import TABLES
from scaling.data.template import FolderTemplate
from scaling.data.tokenizer import Tokenizer, open_tokenizer
from scaling.errors import UserError
from scaling.records import IGNORED
from scaling.spec.sections import ChatData, PreferenceData

SPOKEN, FIRST = np.uint32(1 << 31), np.uint32(1 << 30)
"""Bits of a cached token: the assistant says it; a conversation begins with it."""
_ID = np.uint32((1 << 30) - 1)
_FORMAT = "scaling conversations 2"
"""Part of every key: to be raised when the same lines come to be tokenised otherwise."""
_AT_A_TIME = 1024
"""Conversations tokenised at a time: enough to occupy all threads of the tokenizers library."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conversations:
    """Tokenised conversations in a cached file."""

    key: str
    tokens: np.ndarray
    """uint32, memory-mapped: ids with the bits SPOKEN and FIRST."""
    starts: np.ndarray
    """Where each conversation begins, and the end of the last one: int64 [conversations + 1]."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [conversations]."""
        return np.diff(self.starts)

    def ids(self, number: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of up to `most` first tokens of a conversation, int64, and which of them the assistant says."""
        start = int(self.starts[number])
        found = np.asarray(self.tokens[start : min(start + most, int(self.starts[number + 1]))])
        return (found & _ID).astype(np.int64), (found & SPOKEN) != 0

    def spoken_at(self, most: int) -> np.ndarray:
        """Targets among the first `most` tokens of each that the assistant says, int64 [conversations]."""
        if not len(self):
            return np.zeros(0, np.int64)
        spoken = (np.asarray(self.tokens) & SPOKEN) != 0
        spoken[self.starts[:-1]] = False  # the first token of a text is no target
        sums = np.concatenate([[0], np.cumsum(spoken)])
        ends = np.minimum(self.starts[:-1] + most, self.starts[1:])
        return sums[ends] - sums[self.starts[:-1]]

    def hashes(self) -> np.ndarray:
        """One number for what each says, uint64 [conversations]."""
        bounds = self.starts.tolist()
        parts = (np.asarray(self.tokens[a:b]).tobytes() for a, b in itertools.pairwise(bounds))
        digests = b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in parts)
        return np.frombuffer(digests, dtype="<u8")


@dataclass(frozen=True)
class ChatDataset:
    """Samples of one conversation each, or of several that do not see each other."""

    conversations: Conversations
    rows: Sequence[Sequence[int]]
    """The conversations of each sample."""
    sequence_length: int
    spoken_only: bool
    """Targets are the assistant's words; else everybody's."""
    packed: bool
    pad: int
    """Id of the tokens that fill a sample up; nothing sees them, and they are no targets."""
    bytes_per_token: float | None = None
    terms_per_sample = None

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.conversations.key.encode())
        for row in self.rows:
            digest.update(np.array([*row, -1], dtype="<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: np.ndarray) -> MicroBatch:
        """The samples with these indices; see `Dataset.read`."""
        shape = (len(indices), self.sequence_length)
        inputs, targets = np.full(shape, self.pad, np.int64), np.full(shape, IGNORED, np.int64)
        starts = np.zeros(shape, np.int64)
        for row, index in enumerate(indices.tolist()):
            place = 0
            for number in self.rows[index]:
                ids, spoken = self.conversations.ids(number, self.sequence_length + 1)
                end = place + len(ids) - 1
                inputs[row, place:end] = ids[:-1]
                targets[row, place:end] = np.where(spoken[1:], ids[1:], IGNORED) if self.spoken_only else ids[1:]
                starts[row, place:end] = place
                place = end
            starts[row, place:] = place
        tensors = torch.from_numpy(inputs), torch.from_numpy(targets)
        return PackedBatch(*tensors, torch.from_numpy(starts)) if self.packed else MicroBatch(*tensors)


def open_chat_data(data: ChatData, vocab_size: int, *, spoken_only: bool) -> tuple[ChatDataset, ChatDataset | None]:
    """The training and the validation samples, tokenised now if they are not in the cache.

    Errors: UserError for files, lines or a tokenizer that cannot be used, StorageError for the cache folder.
    """
    tokenizer = tokenizer_of(data, vocab_size)

    def dataset(store: Conversations, chosen: np.ndarray, field: str) -> ChatDataset:
        rows = _rows(store, chosen, data, field, spoken_only=spoken_only)
        return ChatDataset(store, rows, data.sequence_length, spoken_only, data.packing, tokenizer.end or 0)

    return train_and_validation(data, tokenizer, _said_in, dataset, "conversations")


def train_and_validation(
    data: ChatData | PreferenceData,
    tokenizer: Tokenizer,
    said_in: Callable[[Any], Sequence[Said]],
    dataset: Callable[[Conversations, np.ndarray, str], T],
    what: str,
    *,
    each: int = 1,
) -> tuple[T, T | None]:
    """`dataset(conversations, numbers of the samples, field)` of both parts; a sample is `each` conversations in turn,
    and is held out by the first of them."""
    paths = files_of_objects(data.train, "data.train")
    train = open_conversations(paths, "data.train", data, tokenizer, said_in)
    if isinstance(data.validation, list):
        others = files_of_objects(data.validation, "data.validation")
        refuse_shared_files(paths, others)
        held_out = open_conversations(others, "data.validation", data, tokenizer, said_in)
        chosen = np.arange(len(held_out) // each)
        return dataset(train, np.arange(len(train) // each), "data.train"), dataset(held_out, chosen, "data.validation")
    stays, held = split_by_hash(train.hashes()[::each], data.validation, what)
    return dataset(train, stays, "data.train"), dataset(train, held, "data.validation") if len(held) else None


def tokenizer_of(data: ChatData | PreferenceData, vocab_size: int) -> Tokenizer:
    """The tokenizer, checked against the model's vocab_size and the template."""
    tokenizer = open_tokenizer(data.tokenizer, vocab_size)
    if data.template == "instruction" and tokenizer.end is None:
        raise UserError(
            f'`data.template` must be "chatml" for a tokenizer without an end-of-text token, as {data.tokenizer}, but '
            'is "instruction", whose responses would never end; add the token, or change the template'
        )
    return tokenizer


def _said_in(record: Any) -> list[Said]:
    return [Said(messages_of(record))]


def split_by_hash(hashes: np.ndarray, fraction: float, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of those to train on and of those held out; what they say decides, so that copies stay together."""
    everything = np.arange(len(hashes))
    if fraction == 0 or len(hashes) == 0:
        return everything, everything[:0]
    held = (hashes < np.uint64(min(int(fraction * 2**64), 2**64 - 1))) | (hashes == hashes.min())
    if held.all():
        raise UserError(
            f"`data.validation` must leave {what} to train on, but {fraction} holds out all {len(hashes)} of them "
            "(copies count as one); add data, lower it, or set it to globs"
        )
    return everything[~held], everything[held]


def _paired(lines: Iterator[Line]) -> Iterator[Line]:
    """Of explained code what its explanation is preferred to: the same words in another order."""
    for line in lines:
        answer = line.value["response"]
        words = answer.split()
        order = np.argsort(derive_each(derive(line.number), np.arange(len(words), dtype=np.uint64)))
        other = " ".join(words[place] for place in order.tolist())
        if other != answer:
            asked = f"{line.value['instruction']}\n\n{line.value['context']}"
            yield replace(line, value={"prompt": asked, "chosen": answer, "rejected": other})


def open_conversations(
    paths: Sequence[Path],
    field: str,
    data: ChatData | PreferenceData,
    tokenizer: Tokenizer,
    said_in: Callable[[Any], Sequence[Said]],
) -> Conversations:
    """What the lines of these files say, in their order; `said_in` gives the conversations of a line's object."""
    files = [(path, *digest_of(path)) for path in paths]
    own = FolderTemplate(data.tokenizer) if data.template == "tokenizer" else None
    template = data.template if own is None else f"{data.template} {own.identity}"
    parts = [_FORMAT, data.kind, tokenizer.identity, template, data.malformed, *(digest for _, digest, _ in files)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    def write(counts: TokenCounts) -> Iterator[np.ndarray]:
        total = sum(size for _, _, size in files)
        with progress_in_bytes(f"tokenising {field} ({len(files)} files)", total) as advance:
            lines = _lines(files, pairs=isinstance(data, PreferenceData))
            if own is None:
                said = _each(lines, data, said_in, counts, advance)
                yield from _in_parts(said, counts, lambda some: _tokenised(some, data.template, tokenizer))
            else:
                render, tokens = own.rendered, own.tokens
                rendered = _each(lines, data, lambda value: map(render, said_in(value)), counts, advance)
                yield from _in_parts(rendered, counts, lambda some: starmap(_marked, tokens(some)))

    entry = cached_tokens(Path(data.cache), key, np.dtype("<u4"), write)
    tell_left_out(entry.counts.left_out, field)
    starts = np.flatnonzero(np.asarray(entry.tokens) & FIRST)
    return Conversations(key, entry.tokens, np.append(starts, len(entry.tokens)).astype(np.int64))


def _in_parts(
    found: Iterator[T], counts: TokenCounts, tokenised: Callable[[list[T]], Iterable[np.ndarray]]
) -> Iterator[np.ndarray]:
    while some := list(itertools.islice(found, _AT_A_TIME)):
        counts.documents += len(some)
        yield from tokenised(some)


def _each(
    lines: Iterator[Line],
    data: ChatData | PreferenceData,
    read: Callable[[Any], Iterable[T]],
    counts: TokenCounts,
    advance: Callable[[int], None],
) -> Iterator[T]:
    """What `read` makes of the objects of all lines, one after the other."""

    def seen() -> Iterator[Line]:
        for line in lines:
            advance(line.size_bytes)
            counts.bytes += line.size_bytes
            yield line

    for found in read_each(seen(), lambda value: list(read(value)), data.malformed, counts):
        yield from found


def _lines(files: Sequence[tuple[Path, str, int]], *, pairs: bool) -> Iterator[Line]:
    for path, digest, _ in files:
        if is_standard_library(path):
            yield from _paired(docstring_lines(path)) if pairs else docstring_lines(path)
        else:
            yield from read_lines(path, digest)


def _tokenised(said: Sequence[Said], template: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """For each conversation its ids with the bits SPOKEN and FIRST."""
    parts = [pieces(one, template) for one in said]
    ids = iter(tokenizer.pieces([piece.text for conversation in parts for piece in conversation]))
    end = [] if tokenizer.end is None else [tokenizer.end]
    for conversation in parts:
        found = [
            np.append(next(ids).astype(np.uint32), np.array(end if piece.ends else [], np.uint32))
            | (SPOKEN if piece.spoken else np.uint32(0))
            for piece in conversation
        ]
        tokens = np.concatenate(found)
        tokens[0] |= FIRST
        yield tokens


def _marked(ids: np.ndarray, spoken: np.ndarray) -> np.ndarray:
    tokens = ids | np.where(spoken, SPOKEN, np.uint32(0))
    tokens[:1] |= FIRST
    return tokens


def _rows(
    store: Conversations, chosen: np.ndarray, data: ChatData, field: str, *, spoken_only: bool
) -> Sequence[Sequence[int]]:
    """The conversations of each sample. UserError where there is not even one."""
    most = data.sequence_length + 1
    lengths = store.lengths()[chosen]
    wanted = store.spoken_at(most)[chosen] if spoken_only else np.minimum(lengths, most) - 1
    kept = usable(lengths, wanted > 0, data, field, "conversations")
    chosen, lengths = chosen[kept], np.minimum(lengths[kept], most) - 1
    if not data.packing:
        return chosen[:, None].tolist()
    return [[int(chosen[number]) for number in row] for row in pack(lengths, data.sequence_length)]


def usable(
    lengths: np.ndarray, has_target: np.ndarray, data: ChatData | PreferenceData, field: str, what: str
) -> np.ndarray:
    """Which of so many conversations, or pairs, can be trained on, bool; what is lost is logged.

    `has_target`: among the first sequence_length + 1 tokens. UserError where none is left, or one is too long and that
    is to be refused.
    """
    most = data.sequence_length + 1
    long = lengths > most
    if long.any() and data.too_long == "refuse":
        raise UserError(
            f"`{field}` must hold {what} of at most {most:,} tokens (data.sequence_length and one more), but "
            f"{np.count_nonzero(long):,} of {len(lengths):,} are longer, the longest {lengths.max():,}; lengthen "
            '`data.sequence_length`, or set `data.too_long` to "truncate" or "skip"'
        )
    kept = ~long if data.too_long == "skip" else np.ones_like(long)
    empty = kept & ~has_target
    done = "left out" if data.too_long == "skip" else "cut off at the end"
    long_ones = long, f"are longer than {most:,} tokens and {done}"
    for which, how in (long_ones, (empty, "have no target and are left out")):
        if which.any():
            logger.warning(f"WARNING: {np.count_nonzero(which):,} of {len(which):,} {what} of `{field}` {how}")
    if not (kept & has_target).any():
        raise UserError(
            f"`{field}` must hold {what} with a target among the first {most:,} tokens, but holds none; add data or "
            "lengthen `data.sequence_length`"
        )
    return kept & has_target


def files_of_objects(patterns: Sequence[str], field: str) -> list[Path]:
    """The files that the globs match; UserError for one that does not hold one object after the other."""
    paths = matching_files(patterns, field, with_stdlib=True, with_saved=True)
    for path in paths:
        if path.suffix not in (".jsonl", *TABLES) and not is_standard_library(path):
            raise UserError(
                f"`{field}` must match .jsonl files (one JSON object a line), .parquet or .arrow files, or folders "
                f"that `datasets` has saved, but matches {path}; convert it, or narrow the glob"
            )
    return paths
