"""Parameter groups: ordered glob rules over names, first match wins, every trainable parameter in exactly one group."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import translate

from scaling.errors import UserError
from scaling.inventory import Parameter
from scaling.spec.sections import AdamW, ParamGroup, Spec, caches_features

UNDECAYED = "/undecayed"
"""Suffix of the part of a group that weight decay leaves out (`optimizer.decay: "matrices"`)."""
BASE = "lora/base"
"""The group of what adapters are put in; no rule can have this name."""


@dataclass(frozen=True)
class Group:
    """One group of the optimizer, or one frozen part of the model."""

    name: str
    names: tuple[str, ...]
    """Canonical names of its parameters, in the model's order."""
    parameters: int
    """Elements in all of them."""
    lr: float | None
    """Peak learning rate, LR scaling included; None where frozen."""
    weight_decay: float | None
    betas: tuple[float, float] | None
    frozen: bool

    @property
    def tensors(self) -> int:
        """Number of tensors."""
        return len(self.names)


def resolve_groups(
    rules: Sequence[ParamGroup], optimizer: AdamW, parameters: Iterable[Parameter], *, lr_scale: float = 1.0
) -> tuple[Group, ...]:
    """The groups that train `parameters` by `rules`, in the rules' order, empty ones left out.

    Parameters that are `frozen` are a group of their own, the first, whatever rule they match.
    Raises UserError for a glob that matches no parameter at all, and for a parameter that no rule matches. A rule all
    of whose parameters were taken by earlier rules is empty, not wrong: it is dropped (see `empty_groups`).
    """
    parameters = tuple(parameters)
    assigned = _assign(rules, parameters)
    found: list[Group] = []
    if base := [parameter for parameter in parameters if parameter.frozen]:
        names, elements = tuple(p.name for p in base), sum(p.elements for p in base)
        found.append(Group(BASE, names, elements, lr=None, weight_decay=None, betas=None, frozen=True))
    for rule, members in zip(rules, assigned, strict=True):
        split = optimizer.decay == "matrices" and not rule.freeze
        decayed = [p for p in members if not split or len(p.shape) >= 2]
        undecayed = [p for p in members if split and len(p.shape) < 2]
        found += [_group(rule, rule.name, decayed, optimizer, lr_scale)] if decayed else []
        if undecayed:
            found.append(_group(rule, rule.name + UNDECAYED, undecayed, optimizer, lr_scale, weight_decay=0.0))
    if all(group.frozen for group in found):
        raise UserError("`param_groups` must leave something to train, but every group is frozen; unfreeze one")
    return tuple(found)


def check_features(spec: Spec, groups: Sequence[Group]) -> None:
    """UserError where the features of images are to be kept although what makes them trains."""
    if not caches_features(spec.data):
        return
    for group in groups:
        trained = [name for name in group.names if name.startswith("vision.") and not group.frozen]
        if trained:
            raise UserError(
                f"`data.cache_features` must be false where vision trains, but is true, and {trained[0]} of the group "
                f'{group.name!r} trains; set it to false, or put {{"name": "vision", "match": ["vision.*"], "freeze": '
                "true} first in `param_groups`"
            )


def empty_groups(rules: Sequence[ParamGroup], groups: Sequence[Group]) -> tuple[str, ...]:
    """Names of the rules that ended with no parameter, because earlier rules took all that they match."""
    filled = {group.name.removesuffix(UNDECAYED) for group in groups}
    return tuple(rule.name for rule in rules if rule.name not in filled)


def group_of(groups: Sequence[Group]) -> dict[str, Group]:
    """Parameter name -> its group."""
    return {name: group for group in groups for name in group.names}


def _assign(rules: Sequence[ParamGroup], parameters: Sequence[Parameter]) -> list[list[Parameter]]:
    patterns = [[re.compile(translate(glob)) for glob in rule.match] for rule in rules]
    for i, rule in enumerate(rules):
        for j, (glob, pattern) in enumerate(zip(rule.match, patterns[i], strict=True)):
            if not any(pattern.match(parameter.name) for parameter in parameters):
                raise UserError(
                    f"`param_groups.{i}.match.{j}` must match a parameter, but {glob!r} matches none; "
                    f"did you mean {_near(glob, parameters)}?"
                )
    assigned: list[list[Parameter]] = [[] for _ in rules]
    for parameter in (parameter for parameter in parameters if not parameter.frozen):
        owner = next((i for i, some in enumerate(patterns) if any(p.match(parameter.name) for p in some)), None)
        if owner is None:
            raise UserError(
                f"`param_groups` must match every parameter, but no rule matches {parameter.name!r}; "
                'add it to a rule, or end with {"name": "rest", "match": ["*"]}'
            )
        assigned[owner].append(parameter)
    return assigned


def _near(glob: str, parameters: Sequence[Parameter]) -> str:
    """Up to three globs like `glob` that do match; the blocks, which are all alike, stand once, as `layers.*`."""
    names = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", parameter.name) for parameter in parameters)
    parts = [name.split(".") for name in names]
    prefixes = dict.fromkeys(".".join([*part[:depth], "*"]) for part in parts for depth in range(1, len(part)))
    candidates = [*names, *(prefix for prefix in prefixes if not prefix.endswith("*.*"))]
    close = difflib.get_close_matches(glob, candidates, n=3, cutoff=0.3) or candidates[:3]
    return ", ".join(repr(name) for name in close)


def _group(
    rule: ParamGroup,
    name: str,
    members: Sequence[Parameter],
    optimizer: AdamW,
    lr_scale: float,
    weight_decay: float | None = None,
) -> Group:
    if weight_decay is None:
        weight_decay = optimizer.weight_decay if rule.weight_decay is None else rule.weight_decay
    return Group(
        name=name,
        names=tuple(parameter.name for parameter in members),
        parameters=sum(parameter.elements for parameter in members),
        lr=None if rule.freeze else (optimizer.lr if rule.lr is None else rule.lr) * lr_scale,
        weight_decay=None if rule.freeze else weight_decay,
        betas=None if rule.freeze else (rule.betas or optimizer.betas),
        frozen=rule.freeze,
    )
