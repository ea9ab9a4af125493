"""What the loop knows of data: micro-batches of samples, and datasets that read them by index."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from scaling.records import IGNORED


@dataclass(frozen=True)
class Samples:
    """The samples of one forward pass on one rank: tensors of which each has a row for each sample."""

    unit: ClassVar[str] = "tokens"
    """What `terms` counts."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed: pinned, say, or on another device."""
        return replace(self, **{part.name: change(getattr(self, part.name)) for part in fields(self)})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        sizes = [0]

        def note(tensor: Tensor) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        self.each(note)
        return sum(sizes)

    def keyed(self, keys: Callable[[], np.ndarray]) -> Self:
        """The same, what is random about each sample (noise, say) drawn by its key: uint64 [micro_batch]; whose samples
        have nothing random need not ask for them."""
        return self

    @property
    def terms(self) -> int:
        """How many numbers the loss adds up, and is divided by over the whole step."""
        raise NotImplementedError

    def leave_out(self, rows: Tensor) -> None:
        """Let these samples (bool [micro_batch]) add nothing to the loss, in place."""
        raise NotImplementedError


@dataclass(frozen=True)
class MicroBatch(Samples):
    """Sequences of tokens."""

    inputs: Tensor
    """Token ids, int64 [micro_batch, sequence]."""
    targets: Tensor
    """The token that follows each input, int64 [micro_batch, sequence]; IGNORED where masked."""

    @property
    def terms(self) -> int:
        """Target tokens."""
        return int((self.targets != IGNORED).sum())

    def leave_out(self, rows: Tensor) -> None:
        self.targets[rows] = IGNORED

    def cut(self, pieces: int) -> Self:
        """The same tokens with each sequence cut into so many, none of which sees another."""
        return self.each(lambda tensor: tensor.view(pieces * tensor.shape[0], -1))


@dataclass(frozen=True)
class PackedBatch(MicroBatch):
    """Sequences that each hold several texts, none of which is to see another."""

    starts: Tensor
    """Where in its sequence the text begins that each input belongs to, int64 [micro_batch, sequence]."""


@dataclass(frozen=True)
class PairBatch(Samples):
    """Pairs of sequences: the chosen one, then the rejected one."""

    unit: ClassVar[str] = "pairs"
    inputs: Tensor
    """Token ids, int64 [micro_batch, 2, sequence]."""
    targets: Tensor
    """The token that follows each input, int64 [micro_batch, 2, sequence]; IGNORED where masked."""
    reference: Tensor
    """Log-probability of each sequence's targets by the model that training starts from, fp32 [micro_batch, 2]."""

    @property
    def terms(self) -> int:
        """Pairs."""
        return int(self.counted().sum())

    def counted(self) -> Tensor:
        """Which pairs count, bool [micro_batch]."""
        return (self.targets != IGNORED).flatten(1).any(dim=1)

    def leave_out(self, rows: Tensor) -> None:
        self.targets[rows] = IGNORED


@dataclass(frozen=True)
class ActionBatch(Samples):
    """What robots saw, were told and did."""

    unit: ClassVar[str] = "numbers"
    images: Tensor
    """uint8 [micro_batch, views, height, width, 3]; or what a frozen vision made of them, [micro_batch, views x
    patches, hidden] in the compute type."""
    instruction: Tensor
    """Token ids, int64 [micro_batch, tokens]."""
    state: Tensor
    """fp32 [micro_batch, state_dim]."""
    actions: Tensor
    """fp32 [micro_batch, chunk, action_dim]."""
    action_is_pad: Tensor
    """Steps beyond the end of an episode, bool [micro_batch, chunk]: they add nothing to the loss."""
    keys: Tensor
    """What noise is drawn by, int64 [micro_batch]; of each place in the order of a run another."""

    def keyed(self, keys: Callable[[], np.ndarray]) -> Self:
        return replace(self, keys=torch.from_numpy(keys().view(np.int64)))

    @property
    def terms(self) -> int:
        """Numbers in all actions that are no padding."""
        return int((~self.action_is_pad).sum()) * self.actions.shape[2]

    def leave_out(self, rows: Tensor) -> None:
        self.action_is_pad[rows] = True


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

    @property
    def terms_per_sample(self) -> int | None:
        """`Samples.terms` of each sample, where all have as many; None where only reading them tells."""
        ...

    def __len__(self) -> int:
        """The number of samples in one epoch."""
        ...

    def read(self, indices: np.ndarray) -> Samples:
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
