"""Losses between the actions that a policy predicts and those that a demonstrator took, summed over their numbers."""

import math
from typing import Any

import torch
from torch import Tensor, nn

TIMES = 256
"""Times that flow matching draws from: 0/256 .. 255/256, each exact in every compute type, so that a backend that casts
what it is given draws the same as one that does not."""
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""As in scaling/data/hashing.py, in 64 bits with a sign."""


def regression(module: nn.Module, batch: Any, *, squared: bool) -> Tensor:
    """The distance of each number of an action, absolute or squared."""
    predicted = module(batch.images, batch.instruction, batch.state)
    return _summed(predicted.float(), batch.actions, batch.action_is_pad, squared=squared)


def flow_matching(module: nn.Module, batch: Any) -> Tensor:
    """The squared error of the velocity on a straight way from noise, at time 0, to the actions, at time 1.

    Noise and time are pure functions of the samples' keys: they depend neither on the backend nor on the ranks.
    """
    actions = batch.actions
    time, noise = draws(batch.keys, actions[0].numel())
    noise = noise.view_as(actions)
    along = time.view(-1, 1, 1)
    predicted = module(batch.images, batch.instruction, batch.state, (1 - along) * noise + along * actions, time)
    return _summed(predicted.float(), actions - noise, batch.action_is_pad, squared=True)


def draws(keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """For each key (int64 [batch]) a time [batch] of TIMES and `count` standard normals [batch, count], in fp32."""
    places = torch.arange(2 * count + 1, device=keys.device) * _GOLDEN
    bits = _mix(keys.unsqueeze(1) + places)
    time = _shifted(bits[:, 0], 56).float() / TIMES
    uniform = (_shifted(bits[:, 1:], 11).double() + 0.5) * 2.0**-53
    first, second = uniform.chunk(2, dim=1)  # Box and Muller, 1958
    return time, ((-2 * first.log()).sqrt() * (2 * math.pi * second).cos()).float()


def _mix(values: Tensor) -> Tensor:
    """SplitMix64's finaliser, whose products wrap around."""
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in."""
    return (values >> places) & (2 ** (64 - places) - 1)


def _summed(predicted: Tensor, wanted: Tensor, is_pad: Tensor, *, squared: bool) -> Tensor:
    # Masked before it is squared: the gradient of what is not a number is none even where it is not wanted.
    apart = torch.where(is_pad.unsqueeze(-1), 0.0, predicted - wanted)
    return (apart.square() if squared else apart.abs()).sum()
