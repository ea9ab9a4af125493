"""Numbers that are added up over the ranks along with DDP's gradients: a collective of their own would cost a meeting.

They are the gradient of a parameter that DDP knows and the model does not. What DDP averages, times the number of
ranks, is their sum.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scaling.engine.process import Process

_NAME = "_rider"


class Rider:
    """To be made before DDP wraps the model, and to get off when it has."""

    def __init__(self, model: nn.Module, process: Process) -> None:
        self._ranks = process.world_size
        self._seat = nn.Parameter(torch.zeros(2 + self._ranks, device=process.device))
        self._values = torch.zeros_like(self._seat)
        model.register_parameter(_NAME, self._seat)

    def get_off(self, model: nn.Module) -> None:
        """Leave the model; DDP has its reference."""
        delattr(model, _NAME)

    def begin_sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Send `values` with the next backward pass; what is returned has the sum, after it."""
        self._values = values
        return self._sum

    def backward(self, loss: Tensor, weight: Tensor) -> None:
        """The backward pass of `loss` x `weight`, at the end of which DDP brings gradients together."""
        self._seat.grad = None
        torch.autograd.backward((loss, self._seat), (weight, self._values))

    def _sum(self) -> Tensor:
        assert self._seat.grad is not None
        return self._seat.grad * self._ranks
