"""What the loop may ask of a backend."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class FlatShard:
    """A contiguous range of one flattened tensor that this rank owns."""

    name: str
    """Canonical name of the parameter."""
    kind: str
    """"master" (the fp32 weights), "exp_avg" or "exp_avg_sq"."""
    elements: int
    """Elements of the whole tensor."""
    start: int
    """Where the range begins in the flattened tensor."""
    values: Tensor
    """The live values [range], not a copy: writing to them changes the training state."""


class Engine(Protocol):
    """A model being trained under one backend.

    Gradients are averaged over the ranks, so the loss that arrives must be scaled by their number (the loop does).
    """

    module: nn.Module
    """Call it for the forward pass."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The live optimizer's groups, each with "name" and "initial_lr"; a new "lr" takes effect at the next step."""
        ...

    @property
    def loss_scale(self) -> float:
        """The factor against fp16 underflow; 1 where there is none. While above 1, a non-finite step halves it."""
        ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Goes around one forward and backward pass; `last` says that `step` comes next."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, which arrives fully scaled."""
        ...

    def step(self) -> Tensor:
        """Clip, update, zero the gradients. Returns the global 2-norm before clipping, on the device.

        Where the norm is not finite nothing is updated, on any rank.
        """
        ...

    def live_names(self) -> list[list[str]]:
        """Canonical parameter names of each live group, in the order of `param_groups`."""
        ...

    def state(self) -> Iterator[FlatShard]:
        """The ranges of master weights and moments that this rank owns; every element of the model is owned once."""
        ...

    def close(self) -> None:
        """Free what must not outlive the run."""
        ...
