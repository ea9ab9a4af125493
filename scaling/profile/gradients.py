"""How long the gradient of each layer and of each parameter group is, of the steps that are recorded."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Summing(Protocol):
    """What is needed of the process group."""

    def sum_over_ranks(self, value: Tensor) -> Tensor: ...


class GradientNorms:
    """Puts the norms of parameters, of which ranks hold parts, together to those of layers and groups."""

    def __init__(self, layers: Mapping[str, str], groups: Mapping[str, str], device: torch.device) -> None:
        """`layers`, `groups`: which of them each trained parameter is in, by canonical name, in one order."""
        assert list(layers) == list(groups), "the same parameters, in one order"
        self._parameters = list(layers)
        self._sets = {"layers": list(dict.fromkeys(layers.values())), "groups": list(dict.fromkeys(groups.values()))}
        first, members = 0, []
        for names, of in zip(self._sets.values(), (layers, groups), strict=True):
            place = {name: first + index for index, name in enumerate(names)}
            members += [place[of[parameter]] for parameter in self._parameters]
            first += len(names)
        self._count = first
        self._members = torch.tensor(members, device=device)

    def over_ranks(self, norms: Mapping[str, Tensor], process: Summing) -> Tensor:
        """The norms of all layers, then of all groups, of `Engine.gradient_norms`; one collective, on the device."""
        nothing = torch.zeros((), device=self._members.device)
        own = torch.stack([norms.get(name, nothing) for name in self._parameters]).square()
        squares = torch.zeros(self._count, device=own.device).index_add_(0, self._members, own.repeat(2))
        return process.sum_over_ranks(squares).sqrt()

    def told(self, values: Sequence[float]) -> dict[str, Any]:
        """`over_ranks` by name, as `StepRecord.gradient_norms` has it."""
        rest = iter(values)
        return {kind: {name: next(rest) for name in names} for kind, names in self._sets.items()}
