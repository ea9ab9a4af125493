"""Samples of two responses to one prompt, of which one is preferred."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from scaling.data.chat import Conversations, tokenizer_of, train_and_validation, usable
from scaling.data.conversations import Message, Said, checked, listed_messages
from scaling.data.dataset import PairBatch
from scaling.data.lines import Malformed, kind_of
from scaling.records import IGNORED
from scaling.spec.sections import PreferenceData


@dataclass(frozen=True)
class PreferenceDataset:
    """Samples of a chosen and a rejected sequence each."""

    conversations: Conversations
    """Chosen and rejected in turn."""
    pairs: np.ndarray
    """The number of each sample's pair, int64 [samples]."""
    sequence_length: int
    pad: int
    """Id of the tokens that fill a sequence up; nothing sees them, and they are no targets."""
    reference: torch.Tensor | None = None
    """Log-probabilities by the model that training starts from, fp32 [samples, 2]; until it has been asked, zeros."""
    bytes_per_token: float | None = None
    terms_per_sample = None

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.conversations.key.encode())
        digest.update(self.pairs.astype("<i8").tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pairs)

    def with_reference(self, reference: torch.Tensor) -> "PreferenceDataset":
        """The same, with what the model that training starts from makes of each sample (fp32 [samples, 2])."""
        assert reference.shape == (len(self), 2)
        return replace(self, reference=reference)

    def read(self, indices: np.ndarray) -> PairBatch:
        """The samples with these indices; see `Dataset.read`."""
        shape = (len(indices), 2, self.sequence_length)
        inputs, targets = np.full(shape, self.pad, np.int64), np.full(shape, IGNORED, np.int64)
        for row, pair in enumerate(self.pairs[indices].tolist()):
            for side in range(2):
                ids, spoken = self.conversations.ids(2 * pair + side, self.sequence_length + 1)
                inputs[row, side, : len(ids) - 1] = ids[:-1]
                targets[row, side, : len(ids) - 1] = np.where(spoken[1:], ids[1:], IGNORED)
        known = torch.zeros(len(indices), 2) if self.reference is None else self.reference[torch.from_numpy(indices)]
        return PairBatch(torch.from_numpy(inputs), torch.from_numpy(targets), known)


def open_preference_data(data: PreferenceData, vocab_size: int) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """The training and the validation pairs, tokenised now if they are not in the cache.

    Errors: UserError for files, lines or a tokenizer that cannot be used, StorageError for the cache folder.
    """
    tokenizer = tokenizer_of(data, vocab_size)

    def dataset(store: Conversations, chosen: np.ndarray, field: str) -> PreferenceDataset:
        longest = store.lengths().reshape(-1, 2).max(axis=1)[chosen]
        targets = store.spoken_at(data.sequence_length + 1).reshape(-1, 2)
        spoken = (targets > 0)[:, 0] & (targets > 0)[:, 1]
        kept = chosen[usable(longest, spoken[chosen], data, field, "pairs")]
        return PreferenceDataset(store, kept, data.sequence_length, tokenizer.end or 0)

    return train_and_validation(data, tokenizer, pair_of, dataset, "pairs", each=2)


def pair_of(record: Any) -> list[Said]:
    """The chosen and the rejected conversation that a line's object holds. Raises Malformed."""
    if isinstance(record, Malformed):
        raise record
    if not isinstance(record, dict):
        raise Malformed(f"the line must be a JSON object, but is {kind_of(record)}")
    prompt = listed_messages(record["prompt"], "prompt") if "prompt" in record else []
    sides = [_response(record, side, prompt) for side in ("chosen", "rejected")]
    shared = 0
    while shared < min(map(len, sides)) and sides[0][shared] == sides[1][shared]:
        shared += 1
    for side, messages in zip(("chosen", "rejected"), sides, strict=True):
        if not any(message.role == "assistant" for message in messages[shared:]):
            raise Malformed(f"`{side}` must differ from the other in what the assistant says, but does not")
    return [Said(messages, shared) for messages in sides]


def _response(record: dict[str, Any], side: str, prompt: list[Message]) -> list[Message]:
    if side not in record:
        raise Malformed(f"the line must have `chosen` and `rejected`, but has no `{side}`")
    value = record[side]
    if isinstance(value, str):
        if not prompt:
            raise Malformed(f"`{side}` must be a list of messages where there is no `prompt`, but is text")
        if not value.strip():
            raise Malformed(f"`{side}` must be text, but is empty")
        return [*prompt, Message("assistant", value)]
    messages = listed_messages(value, side)
    # Many data sets of the hub have the prompt and, in both conversations, the prompt again.
    return checked(messages if messages[: len(prompt)] == prompt else [*prompt, *messages], side)
