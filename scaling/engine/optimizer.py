"""torch's fused AdamW with our groups: one implementation for every backend, so that they share its arithmetic."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scaling.groups import Group
from scaling.spec.sections import AdamW


def build_adamw(parameters: Mapping[str, nn.Parameter], groups: Sequence[Group], spec: AdamW) -> torch.optim.AdamW:
    """AdamW over the trainable groups; `parameters` by canonical name."""
    live: list[dict[str, Any]] = [
        {
            "params": [parameters[name] for name in group.names],
            "name": group.name,
            "lr": group.lr,
            "initial_lr": group.lr,
            "weight_decay": group.weight_decay,
            "betas": group.betas,
        }
        for group in groups
        if not group.frozen
    ]
    return torch.optim.AdamW(live, eps=spec.eps, fused=True)


def make_moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
    """Give `parameter` the state that fused AdamW makes at its first step, of zeros, unless it has it."""
    state = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The moments of `parameter` by kind, as far as they exist."""
    state = optimizer.state.get(parameter, {})
    return {kind: state[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in state}


def updates(optimizer: torch.optim.Optimizer) -> float:
    """How many steps AdamW has applied; refused ones do not count."""
    steps = _steps(optimizer)
    if not steps:
        return 0.0
    distinct = torch.stack(steps).unique().tolist()
    assert len(distinct) == 1, f"parameters differ in the number of their updates: {distinct}"
    return distinct[0]


def set_updates(optimizer: torch.optim.Optimizer, number: float) -> None:
    """Set what `updates` reads, and with it the bias correction of the next step."""
    for step in _steps(optimizer):
        step.fill_(number)


def _steps(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [state["step"] for state in optimizer.state.values() if "step" in state]


def check_live_groups(groups: Sequence[Group], live: Sequence[dict[str, Any]], live_names: Sequence[list[str]]) -> None:
    """Compare the built optimizer with the table that the user was shown, name by name and LR by LR.

    A difference would be this project's fault, hence an assertion: a wrapper or a backend changed the groups.
    """
    table = {group.name: group for group in groups if not group.frozen}
    found = {settings["name"]: (settings, names) for settings, names in zip(live, live_names, strict=True)}
    assert list(found) == list(table), f"the optimizer has groups {list(found)}, the table {list(table)}"
    for name, group in table.items():
        settings, names = found[name]
        assert sorted(names) == sorted(group.names), (
            f"group {name!r} trains {sorted(set(names) ^ set(group.names))} in only one of optimizer and table"
        )
        for key in ("lr", "weight_decay", "betas"):
            have, want = settings[key], getattr(group, key)
            have = tuple(have) if isinstance(have, list) else have
            assert have == want, f"group {name!r} has {key} {have} in the optimizer, but {want} in the table"
