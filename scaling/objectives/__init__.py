"""Losses: each a function of the module and a micro-batch that returns the sum over target tokens."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scaling.spec.sections import CausalLM

Objective = Callable[[nn.Module, Any], Tensor]
"""(module, micro-batch) -> loss summed over the micro-batch's target tokens, an fp32 scalar. Never a mean."""


def build_objective(spec: CausalLM) -> Objective:
    """The loss function that `spec` names."""
    match spec:
        case CausalLM():
            return _causal_lm


def _causal_lm(module: nn.Module, batch: Any) -> Tensor:
    return module(batch.inputs, batch.targets)
