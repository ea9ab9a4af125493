"""Proximal policy optimisation: rewards of responses, what each token is credited with, and the loss."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.imports import call_target
from scaling.records import IGNORED
from scaling.spec.sections import PPO, Factory, Overlap, Pattern

Reward = Callable[[Sequence[str], Sequence[str], Sequence[str]], list[float]]
"""(prompts, responses, what is expected) -> what each response is worth."""


@dataclass(frozen=True)
class PolicyLoss:
    """The clipped objective (Schulman et al., 2017, eq. 7) and the clipped error of values, summed over tokens."""

    clip_ratio: float
    value_clip: float
    value_coef: float

    def __call__(self, module: nn.Module, batch: Any) -> Tensor:
        losses, values = module(batch.inputs, batch.targets, batch.starts, by_token=True)
        counted = batch.targets != IGNORED
        ratio = (-losses - batch.log_probabilities).exp()
        gain = batch.advantages * ratio
        clipped = batch.advantages * ratio.clamp(1 - self.clip_ratio, 1 + self.clip_ratio)
        near = batch.values + (values - batch.values).clamp(-self.value_clip, self.value_clip)
        error = torch.maximum((values - batch.returns).square(), (near - batch.returns).square())
        return torch.where(counted, self.value_coef * error - torch.minimum(gain, clipped), 0.0).sum()


def credit(rewards: Tensor, values: Tensor, counted: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns of tokens, both [responses, tokens]: generalised advantage estimation (Schulman et al.,
    2016, eq. 16), from the last token of each response to its first.

    `rewards` and `values`: [responses, tokens]; `counted`: bool, true for a response's tokens, which are neighbours.
    """
    rewards, values = torch.where(counted, rewards, 0.0), torch.where(counted, values, 0.0)
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    after = torch.zeros_like(later)
    for place in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, place] + gamma * after - values[:, place]
        later = torch.where(counted[:, place], delta + gamma * lam * later, 0.0)
        after = torch.where(counted[:, place], values[:, place], 0.0)
        advantages[:, place] = later
    return advantages, torch.where(counted, advantages + values, 0.0)


def whitened(values: Tensor, counted: Tensor) -> Tensor:
    """Values [any shape] with mean 0 and deviation 1 over those that count; 0 elsewhere."""
    chosen = values[counted].double()
    scale = chosen.std(correction=0).clamp(min=1e-8)
    return torch.where(counted, (values - chosen.mean()) / scale, 0.0).float()


def build_reward(spec: PPO, allow_import: Sequence[str]) -> Reward:
    """The function that `objective.reward` names. Raises UserError where its code cannot be used."""
    match spec.reward:
        case Overlap():
            return lambda _, responses, expected: [overlap(*pair) for pair in zip(responses, expected, strict=True)]
        case Pattern() as found:
            pattern = re.compile(found.pattern, re.DOTALL)
            return lambda _, responses, __: [float(pattern.search(response) is not None) for response in responses]
        case Factory() as code:
            function = call_target(code.target, code.arguments, allow_import, "objective.reward")
            return lambda prompts, responses, _: _checked(function(prompts, responses), len(responses), code.target)


def overlap(response: str, expected: str) -> float:
    """F1 of the words of two texts, 0 to 1; case and what is no letter or digit do not count."""
    one, other = (Counter(re.findall(r"\w+", text.lower())) for text in (response, expected))
    shared = (one & other).total()
    return 2 * shared / (one.total() + other.total()) if shared else 0.0


def _checked(found: Any, count: int, name: str) -> list[float]:
    try:
        numbers = [float(one) for one in found]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count:
        raise UserError(
            f"the reward of {name} must be a list of {count} numbers, one for each response, but is none; correct it"
        )
    return numbers
