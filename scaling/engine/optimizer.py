"""torch's fused AdamW with our groups: one implementation for every backend, so that they share its arithmetic."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
