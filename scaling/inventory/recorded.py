"""The inventory file of a model whose code is not this project's: names and shapes, and what a step of it does.

`python -m scaling.inventory SPEC` writes it, with torch; all else reads it, without. JSON:

    {"schema_version": 1,
     "model": a hash of the section it was made from, which may hold what is nobody else's business,
     "parameters": [{"name", "shape", "tied": [other names of the same tensor]}],
     "blocks": [paths], "buffer_bytes", "vocab_size",
     "seen": of a vla what vision gives of a sample's images, [tokens, width]; else null,
     "linears": {path of a linear layer in a block: whether its weight is [inputs, outputs], as transformers' Conv1D},
     "ledger": {"sequence_length", "precision", "objective", "lora", "features", "frozen": [names],
                "events": {"gpu" or "cpu": {checkpointing mode: events, as scaling/recording.py has them}}, and where
                    something is frozen "gpu-zero3" and "cpu-zero3", with DeepSpeed's linear layer, but selective
                "work": {checkpointing mode: as scaling/estimate/work.py has it}}}
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from scaling.errors import UserError
from scaling.spec.sections import Recorded

SCHEMA_VERSION = 1
LIMIT_BYTES = 2**28
LEDGER = {"sequence_length", "precision", "objective", "frozen", "events", "work"}
"""What a ledger must have."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model."""

    name: str
    """Canonical name: the module's path, with no wrapper's prefix."""
    shape: tuple[int, ...]
    frozen: bool = False
    """Part of the model that adapters are put in: not trained, whatever the groups say."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Inventory:
    """What an inventory file holds."""

    path: str
    model: str
    """`fingerprint` of the section that it was made from."""
    parameters: tuple[Parameter, ...]
    tied: tuple[tuple[str, ...], ...]
    blocks: tuple[str, ...]
    buffer_bytes: int
    vocab_size: int | None
    """Of the logits, or of a vla's instructions; None where it is not known."""
    linears: Mapping[str, bool]
    """Linear layers in the blocks by path, in the module's order: whether the weight is [inputs, outputs], as that of
    transformers' Conv1D, in place of [outputs, inputs]."""
    seen: tuple[int, int] | None
    """Of a vla what vision gives of a sample's images: tokens, and the width of each; else None."""
    ledger: Mapping[str, Any] | None
    """None where the module was looked at and nothing recorded."""


def fingerprint(model: Recorded) -> str:
    """A hash of all that decides which module `model` is."""
    section = model.model_dump(mode="json", exclude={"inventory"})
    return hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest()


_looked_at: dict[str, Inventory] = {}
"""By fingerprint, what this process has found in modules that no file describes."""


def keep_inventory(model: Recorded, found: Inventory) -> None:
    """Let `read_inventory` give this for `model`, whose section names no file."""
    _looked_at[fingerprint(model)] = found


def read_inventory(model: Recorded) -> Inventory:
    """The inventory file of `model`; UserError where there is none, or one that was made from another section."""
    path = model.inventory
    if path is None:
        if (found := _looked_at.get(fingerprint(model))) is None:
            raise UserError(
                "`model.inventory` must be a file for all but training, but is null; name one, and run `python -m "
                "scaling.inventory SPEC`, which writes it (it needs torch, and no GPU)"
            )
        return found
    try:
        stamp = os.stat(path)
    except (OSError, ValueError):
        raise _refusal(path, "there is none") from None
    found = _read(path, stamp.st_mtime_ns, stamp.st_size)
    if found.model != fingerprint(model):
        raise _refusal(path, "it was made for another model")
    return found


@lru_cache(maxsize=8)
def _read(path: str, _modified: int, size: int) -> Inventory:
    if size > LIMIT_BYTES:
        raise _refusal(path, f"it has more than {LIMIT_BYTES} bytes")
    try:
        with open(path, "rb") as file:
            found = cast(dict[str, Any], json.loads(file.read(LIMIT_BYTES)))
        version = found["schema_version"]
        listed = cast(list[dict[str, Any]], found["parameters"])
        if not found["ledger"].keys() >= LEDGER:
            raise KeyError
        inventory = Inventory(
            path=path,
            model=found["model"],
            parameters=tuple(Parameter(one["name"], tuple(one["shape"])) for one in listed),
            tied=tuple((one["name"], *one["tied"]) for one in listed if one["tied"]),
            blocks=tuple(found["blocks"]),
            buffer_bytes=found["buffer_bytes"],
            vocab_size=found["vocab_size"],
            linears=found.get("linears", {}),
            seen=(seen[0], seen[1]) if (seen := found.get("seen")) else None,
            ledger=found["ledger"],
        )
    except OSError as error:
        raise _refusal(path, f"it cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _refusal(path, "it is no such file") from None
    if version != SCHEMA_VERSION:
        raise _refusal(path, f"its version is {version!r}, not {SCHEMA_VERSION}")
    return inventory


def _refusal(path: str, reason: str) -> UserError:
    return UserError(
        f"`model.inventory` must be the file that `python -m scaling.inventory SPEC` writes of this model, but "
        f"{path[:200]!r} is not: {reason}; run that (it needs torch, and no GPU)"
    )
