"""What the loop knows of data: micro-batches of token ids, and datasets that read them by index."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scaling.records import IGNORED


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass on one rank."""

    inputs: Tensor
    """Token ids, int64 [micro_batch, sequence]."""
    targets: Tensor
    """The token that follows each input, int64 [micro_batch, sequence]; IGNORED where masked."""


class Dataset(Protocol):
    """Samples of one length, read by index, in any order and as often as one likes."""

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, for bits per byte; None where unknown."""
        ...

    @property
    def fingerprint(self) -> str:
        """Says what these samples are made of: of another content it is another. Of their length and the seed, which
        resuming compares by themselves, it says nothing.
        """
        ...

    def __len__(self) -> int:
        """The number of samples in one epoch."""
        ...

    def read(self, indices: np.ndarray) -> MicroBatch:
        """The samples with these indices (integers [micro_batch], each in 0 .. len-1), in this order."""
        ...


def from_windows(windows: np.ndarray, masked: np.ndarray | None = None) -> MicroBatch:
    """A micro-batch from int64 windows [micro_batch, sequence + 1], the next token being the target of each.

    `masked` is bool [micro_batch, sequence], true where the target is to be IGNORED.
    """
    inputs, targets = windows[:, :-1].copy(), windows[:, 1:].copy()
    if masked is not None:
        targets[masked] = IGNORED
    return MicroBatch(torch.from_numpy(inputs), torch.from_numpy(targets))
