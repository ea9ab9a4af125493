"""Losses: each a function of the module and a micro-batch that returns the sum over target tokens, or numbers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.imports import call_target
from scaling.objectives.behaviour_cloning import flow_matching, regression
from scaling.objectives.policy import PolicyLoss
from scaling.objectives.preference import PreferenceLoss
from scaling.records import IGNORED
from scaling.spec.sections import DPO, PPO, SFT, BehaviourCloning, CausalLM, Factory
from scaling.spec.sections import Objective as ObjectiveSpec

Objective = Callable[[nn.Module, Any], Tensor]
"""(module, micro-batch) -> loss summed over the micro-batch's terms, an fp32 scalar. Never a mean."""


def build_objective(
    spec: ObjectiveSpec, allow_import: Sequence[str] = (), *, from_logits: bool = False, by_sample: bool = False
) -> Objective:
    """The loss function that `spec` names; `allow_import` are the packages that a factory may come from.

    `from_logits`: of a module that returns logits, where this project's own take targets and return the summed loss.
    `by_sample`: of samples that are no text but what a user's own data set gives, where the function gives a loss for
    each, [micro_batch].
    """
    if by_sample and not isinstance(spec, Factory):
        raise UserError(
            f'`objective.kind` must be "factory" where `data` is of a factory and its items are no text, but is '
            f'"{spec.kind}"; give it a loss, or have the items be {{"inputs", "targets"}} of token ids'
        )
    match spec:
        case CausalLM() | SFT():
            return _causal_lm_from_logits if from_logits else _causal_lm
        case DPO():
            return PreferenceLoss(spec.beta, spec.label_smoothing, from_logits)
        case PPO():
            return PolicyLoss(spec.clip_ratio, spec.value_clip, spec.value_coef)
        case BehaviourCloning(loss="flow_matching"):
            return flow_matching
        case BehaviourCloning():
            return partial(regression, squared=spec.error == "mse")
        case Factory():
            objective = call_target(spec.target, spec.arguments, allow_import, "objective")
            if not callable(objective):
                raise UserError(
                    f"`objective.target` must return a function of (module, micro-batch), but {spec.target} returns "
                    f"a {type(objective).__name__}; correct it"
                )
            return _by_sample(cast(Objective, objective), spec.target) if by_sample else cast(Objective, objective)


def _by_sample(loss: Callable[[nn.Module, Any], Tensor], name: str) -> Objective:
    """The sum of what `loss` gives for each sample that counts."""

    def objective(module: nn.Module, batch: Any) -> Tensor:
        found = loss(module, batch.values)
        wanted = tuple(batch.counts.shape)
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"the loss of {name} must give a number for each sample, of shape {list(wanted)}, but gives {shape}; "
                'return it without averaging (`reduction="none"`)'
            )
        return torch.where(batch.counts, found.float(), 0.0).sum()

    return objective


def _causal_lm_from_logits(module: nn.Module, batch: Any) -> Tensor:
    output = module(batch.inputs)
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _causal_lm(module: nn.Module, batch: Any) -> Tensor:
    return module(batch.inputs, batch.targets, **_apart(batch))


def _apart(batch: Any) -> dict[str, Tensor]:
    starts = getattr(batch, "starts", None)
    return {} if starts is None else {"starts": starts}
