"""Prompts that a model is to answer: conversations up to the assistant's last words, and those as what is expected."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from scaling.data.chat import Conversations, tokenizer_of, train_and_validation
from scaling.data.conversations import Said, messages_of
from scaling.data.dataset import MicroBatch
from scaling.data.template import FolderTemplate
from scaling.data.tokenizer import Tokenizer
from scaling.errors import UserError
from scaling.spec.sections import ChatData

logger = logging.getLogger(__name__)

CHATML_END = "<|im_end|>"


@dataclass(frozen=True)
class PromptDataset:
    """Samples of a prompt each."""

    conversations: Conversations
    numbers: np.ndarray
    """The conversation of each sample, int64 [samples]."""
    starts: np.ndarray
    """Where in it the assistant's last words begin, int64 [samples]."""
    tokenizer: Tokenizer
    stop: np.ndarray
    """Ids with which a response ends, int64."""
    bytes_per_token: float | None = None
    terms_per_sample = None

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.conversations.key.encode())
        digest.update(self.numbers.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.numbers)

    def prompt(self, index: int) -> np.ndarray:
        """Ids of all before the response, int64."""
        return self.conversations.ids(int(self.numbers[index]), int(self.starts[index]))[0]

    def expected(self, index: int) -> str:
        """What the assistant says in the data."""
        ids, _ = self.conversations.ids(int(self.numbers[index]), 1 << 30)
        return self.told(ids[self.starts[index] :])

    def told(self, ids: np.ndarray) -> str:
        """The text of a response's ids, without what ends it."""
        text = self.tokenizer.text(np.asarray(ids))
        return text.removesuffix(CHATML_END).strip("\0").strip()

    def read(self, indices: np.ndarray) -> MicroBatch:
        """Nothing is read in this way: what is trained on are the responses (scaling/rollouts.py)."""
        raise AssertionError("prompts are answered before they are trained on")


def open_prompt_data(
    data: ChatData, vocab_size: int, max_new_tokens: int
) -> tuple[PromptDataset, PromptDataset | None]:
    """The training and the validation prompts, tokenised now if they are not in the cache.

    Errors: UserError for files, lines or a tokenizer that cannot be used, StorageError for the cache folder.
    """
    tokenizer = tokenizer_of(data, vocab_size)
    room = data.sequence_length - max_new_tokens
    if data.template == "chatml":
        stop = tokenizer.pieces([CHATML_END])[0].astype(np.int64)
    elif data.template == "tokenizer":
        stop = np.array([FolderTemplate(data.tokenizer).end], np.int64)
    else:
        assert tokenizer.end is not None, "`tokenizer_of` refuses others"
        stop = np.array([tokenizer.end], np.int64)

    def dataset(store: Conversations, chosen: np.ndarray, field: str) -> PromptDataset:
        starts = np.array([_response_start(*store.ids(int(number), 1 << 30)) for number in chosen], np.int64)
        fits = (starts > 0) & (starts <= room)
        if not fits.all():
            logger.warning(
                f"WARNING: {np.count_nonzero(~fits):,} of {len(fits):,} prompts of `{field}` are longer than {room:,} "
                "tokens (data.sequence_length less objective.max_new_tokens) and are left out"
            )
        if not fits.any():
            raise UserError(
                f"`{field}` must hold prompts of at most {room:,} tokens (data.sequence_length less "
                "objective.max_new_tokens), but holds none; lengthen `data.sequence_length`"
            )
        return PromptDataset(store, chosen[fits], starts[fits], tokenizer, stop)

    return train_and_validation(data, tokenizer, _said_in, dataset, "conversations")


def _said_in(record: Any) -> list[Said]:
    return [Said(messages_of(record))]


def _response_start(_: np.ndarray, spoken: np.ndarray) -> int:
    """Where the last stretch begins that the assistant says; 0 where there is none."""
    edges = np.flatnonzero(spoken[1:] & ~spoken[:-1])
    return int(edges[-1]) + 1 if len(edges) else 0
