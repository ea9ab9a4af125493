"""Today's job beside the one that a checkpoint is of: what changed, and whether training can go on all the same."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

_HARMLESS = (
    *("$schema", "name", "profile.*", "tracking.*", "checkpoint*", "validation*", "timeouts.*", "initialize_*"),
    *("on_nonfinite", "nonfinite_limit", "backend.*", "batch.*", "data.cache*", "data.train*", "data.validation*"),
    *("activation_checkpointing", "compile", "objective.cross_entropy"),
    *("model.initializer_range", "model.*.initializer_range"),
)
"""Fields that leave the curve as it is, or (batch, data) whose effect is compared by what comes of it, not by words."""
_CONTINUES = (
    *("model.dropout", "model.*.dropout", "lora.dropout"),
    *("optimizer.*", "param_groups*", "lr_scaling.*", "schedule.*", "precision"),
    *("max_steps", "epochs", "max_grad_norm", "data.sequence_curriculum*"),
)
"""Fields after whose change the curve goes on otherwise."""


@dataclass(frozen=True)
class Change:
    """A field that is not as it was."""

    field: str
    saved: Any
    today: Any

    def __str__(self) -> str:
        saved, today = _shown(self)
        return f"{self.field} {saved} -> {today}"


@dataclass(frozen=True)
class Comparison:
    """All changes, by what they mean for going on."""

    harmless: list[Change]
    continues: list[Change]
    """The curve goes on otherwise."""
    allowed: list[Change]
    """Would break the data's order, but the user has allowed it."""
    impossible: list[str]
    """A message each."""


def compare(saved: Mapping[str, Any], today: Mapping[str, Any], allow: Collection[str]) -> Comparison:
    """Compare two identities (see `train`): resolved spec, trainable parameters, shapes, global batch, seed, data."""
    found = Comparison([], [], [], [])
    for change in _changes(saved["spec"], today["spec"]):
        if _matches(change.field, _HARMLESS):
            found.harmless.append(change)
        elif _matches(change.field, _CONTINUES):
            found.continues.append(change)
        elif change.field != "seed" and not change.field.startswith("data."):
            otherwise = "train it in another run folder"
            if not change.field.startswith(("model", "lora")):
                otherwise += " with `initialize_from`, which takes over the weights alone"
            found.impossible.append(_refusal(change, otherwise))
    if not found.impossible:
        found.impossible.extend(_other_parameters(saved, today))
    for field, key in ORDER.items():
        if saved[key] != today[key]:
            change = Change(field, saved[key], today[key])
            if field in allow:
                found.allowed.append(change)
            else:
                how = f"pass `--allow-change {field}` to go on at the same place in the order of the samples"
                found.impossible.append(_refusal(change, how))
    return found


ORDER = {"batch.global_batch_size": "global_batch", "data.sequence_length": "sequence_length", "seed": "seed"}
ORDER |= {"data": "data"}
"""What decides which samples a step sees."""


def _other_parameters(saved: Mapping[str, Any], today: Mapping[str, Any]) -> Iterator[str]:
    if saved["shapes"] != {name: list(shape) for name, shape in today["shapes"].items()}:
        names = sorted(set(saved["shapes"]) ^ set(today["shapes"])) or ["shapes"]
        yield f"`model` must have the parameters of the checkpoint, but differs in {names[:3]}; use its spec"
    elif differing := sorted(set(saved["trainable"]) ^ set(today["trainable"])):
        yield (
            f"`param_groups` must train the parameters that the checkpoint was trained with, but {len(differing)} are "
            f"frozen in one and not in the other ({differing[0]}, say); put it back, or set `initialize_from` to take "
            "over the weights alone"
        )


def _refusal(change: Change, otherwise: str) -> str:
    saved, today = _shown(change)
    return f"`{change.field}` must be as in the checkpoint ({saved}), but is {today}; put it back, or {otherwise}"


def _changes(saved: Any, today: Any, path: str = "") -> Iterator[Change]:
    if isinstance(saved, dict) and isinstance(today, dict) and saved.get("kind") != today.get("kind"):
        yield Change(f"{path}.kind", saved.get("kind"), today.get("kind"))  # the other fields are not the same ones
    elif isinstance(saved, dict) and isinstance(today, dict):
        for name in dict.fromkeys([*saved, *today]):
            yield from _changes(saved.get(name), today.get(name), f"{path}.{name}" if path else name)
    elif saved != today:
        yield Change(path, saved, today)


def _matches(field: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(field, pattern) for pattern in patterns)


def _shown(change: Change) -> list[str]:
    """Both values, long ones cut to where they begin to differ."""
    texts = [repr(change.saved), repr(change.today)]
    same = next((at for at, (one, other) in enumerate(zip(*texts, strict=False)) if one != other), min(map(len, texts)))
    return [_cut(text, max(0, same - 20) if max(map(len, texts)) > 60 else 0) for text in texts]


def _cut(text: str, start: int) -> str:
    shown = text[start : start + 54]
    return "..." * (start > 0) + shown + "..." * (start + len(shown) < len(text))
