"""What the loop may ask of a backend."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class FlatShard:
    """A contiguous range of one flattened tensor that this rank holds."""

    name: str
    """Canonical name of the parameter."""
    kind: str
    """"master" (the fp32 weights), "exp_avg" or "exp_avg_sq"."""
    elements: int
    """Elements of the whole tensor."""
    start: int
    """Where the range begins in the flattened tensor."""
    values: Tensor
    """The live values [range], not a copy: writing to them changes the training state (see `Engine.loading`)."""
    copies: int = 1
    """How many ranks hold this very range, with equal values."""
    copy: int = 0
    """Which of them this rank is."""

    def own(self) -> "FlatShard":
        """The part of the range that this rank is to write: over all ranks, every element comes exactly once."""
        part = cut(self.values.numel(), self.copies, self.copy)
        return replace(self, start=self.start + part.start, values=self.values[part], copies=1, copy=0)


def cut(elements: int, parts: int, index: int) -> slice:
    """The `index`-th of `parts` consecutive parts of `elements`, as equal as can be; of few, some are empty."""
    return slice(elements * index // parts, elements * (index + 1) // parts)


class Engine(Protocol):
    """A model being trained under one backend.

    Gradients are averaged over the ranks, so the loss must weigh as much more as there are ranks (the loop sees to it).
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

    @property
    def waits_below_python(self) -> bool:
        """Whether others are waited for where no Python code sees it: at the end of a backward pass."""
        ...

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Goes around one forward and backward pass; `last` says that `step` comes next."""
        ...

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """The sum of `values` over all ranks; what is returned waits for it and returns it. Collective calls.

        To be called just before the last `backward` of a step, and to be waited for after it: the values may travel
        with its gradients. A row of fp32 numbers on the device, two more than there are ranks.
        """
        ...

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        """Add the gradients of `loss` x `weight`, `weight` being an fp32 scalar on the device."""
        ...

    def gradient_norms(self) -> dict[str, Tensor]:
        """The 2-norm of what this rank holds of the gradient of each trained parameter, by canonical name.

        To be asked for between the last backward pass of a step and `step`; scalars on the device, without the loss
        scale. Their squares add up over the ranks to that of the whole gradient: where several ranks hold the same,
        each says a part of it.
        """
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
        """Every range that this rank holds: fp32 masters of all parameters, moments of the trained ones if they exist.

        Replicas are among them (`FlatShard.own` says who writes what). Shards that are kept on NVMe are in memory only
        until the next one is asked for: use each before going on.
        """
        ...

    def counters(self) -> dict[str, float]:
        """What the training state counts besides tensors, the same on every rank.

        "updates": steps that Adam applied. In fp16 also "loss_scale", and "finite_steps": steps in a row that were
        finite, since the last that was not or since the start.
        """
        ...

    def loading(self, counters: Mapping[str, float]) -> AbstractContextManager[None]:
        """In its body, write to the values that `state` yields; a collective call, between steps.

        On entry moments that do not exist yet are made, of zeros, so that `state` has all of them. On exit the counters
        are set ("updates" must be there, others stay as they are where absent), and what is derived from the masters
        follows them: copies for computing, whether sharded, gathered, on the host or on NVMe. With zero moments and
        no updates the optimizer is a fresh one. After an error in the body the engine is of no more use.
        """
        ...

    def close(self) -> None:
        """Free what must not outlive the run."""
        ...
