"""Losses: each a function of the module and a micro-batch that returns the sum over target tokens."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from scaling.errors import UserError
from scaling.imports import call_target
from scaling.spec.sections import CausalLM, Factory

Objective = Callable[[nn.Module, Any], Tensor]
"""(module, micro-batch) -> loss summed over the micro-batch's target tokens, an fp32 scalar. Never a mean."""


def build_objective(spec: CausalLM | Factory, allow_import: Sequence[str] = ()) -> Objective:
    """The loss function that `spec` names; `allow_import` are the packages that a factory may come from."""
    match spec:
        case CausalLM():
            return _causal_lm
        case Factory():
            objective = call_target(spec.target, spec.arguments, allow_import, "objective")
            if not callable(objective):
                raise UserError(
                    f"`objective.target` must return a function of (module, micro-batch), but {spec.target} returns "
                    f"a {type(objective).__name__}; correct it"
                )
            return cast(Objective, objective)


def _causal_lm(module: nn.Module, batch: Any) -> Tensor:
    return module(batch.inputs, batch.targets)
