"""Modules of the user's own and of transformers: how to build them, and which of their parts are the blocks."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.imports import call_target
from scaling.inventory.recorded import Inventory, Parameter, fingerprint, keep_inventory
from scaling.models.initial import InitialValues
from scaling.models.recipe import ModelRecipe, canonical_name
from scaling.spec.sections import FactoryModel, HuggingFace, Recorded

BLOCKS_SHARE = 0.05
"""Of all elements, what a list of alike modules must have for them to be blocks."""


def recorded_recipe(
    model: Recorded, blocks: Sequence[str], seed: int, allow_import: Sequence[str], *, filled: bool = False
) -> ModelRecipe:
    """How to build `model`, whose blocks have these paths. Unless `filled` values are left as they are: neither memory
    nor speed depends on them, and to have them takes all of the model's memory on the host, or its files."""
    if not filled:
        return ModelRecipe(lambda: build(model, allow_import), _leave, tuple(blocks), seed)
    values = InitialValues(model, lambda filled: build(model, allow_import, filled=filled), seed)
    return ModelRecipe(lambda: build(model, allow_import), values.fill, tuple(blocks), seed, values.buffers)


def _leave(name: str, value: Tensor, generator: torch.Generator) -> None:
    """As it is."""


def build(model: Recorded, allow_import: Sequence[str], *, filled: bool = False) -> nn.Module:
    """The module, on the device that is torch's default. UserError where it cannot be built.

    transformers' models have initial values only where `filled`; other code gives them in any case.
    """
    match model:
        case FactoryModel():
            found = call_target(model.target, model.arguments, allow_import, "model")
            if not isinstance(found, nn.Module):
                raise UserError(
                    f"`model.target` must return an nn.Module, but {model.target} returns a "
                    f"{type(found).__name__}; correct it"
                )
            return found
        case HuggingFace():
            return _causal_lm(model.path, filled=filled)


def _causal_lm(path: str, *, filled: bool) -> nn.Module:
    """From its config.json alone, by code that transformers has itself."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights
        from transformers.utils import logging as messages
    except ImportError as error:
        raise UserError(
            f'`model.kind` must be another where transformers is not installed ({error}), but is "huggingface"; '
            "`pip install 'scaling[huggingface]'`"
        ) from None
    messages.set_verbosity_error()
    try:
        config: Any = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        config.use_cache = False  # of generation
        with nullcontext() if filled else no_init_weights():  # which would look into what ZeRO-3 has cut already
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.get_default_dtype())
        model.tie_weights()
        return model
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"`model.path` must be a folder whose config.json transformers builds a causal language model of, but "
            f"{path[:200]!r} is not: {str(error).splitlines()[0][:300]}"
        ) from None


def take_inventory(model: Recorded, allow_import: Sequence[str]) -> None:
    """Look at a module that no inventory file describes; from here on `inventory_of` knows it. UserError where it
    cannot be built.

    Without blocks the whole is one: it is gathered at once, and neither checkpointed nor compiled.
    """
    with torch.device("meta"):
        module = build(model, allow_import)
    listed = parameters_of(module)
    try:
        blocks = find_blocks(module)
    except UserError:
        blocks = ()
    config = getattr(module, "config", None)
    keep_inventory(
        model,
        Inventory(
            path="",
            model=fingerprint(model),
            parameters=tuple(Parameter(one["name"], tuple(one["shape"])) for one in listed),
            tied=tuple((one["name"], *one["tied"]) for one in listed if one["tied"]),
            blocks=blocks,
            buffer_bytes=sum(buffer.nbytes for buffer in module.buffers()),
            vocab_size=getattr(config, "vocab_size", None),
            ledger=None,
        ),
    )


def find_blocks(module: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks: members of the outermost lists of alike modules that hold a good part of the model.

    UserError where there are none: nothing could be gathered, checkpointed and compiled piece by piece.
    """
    total = sum(parameter.numel() for parameter in module.parameters())
    found: list[str] = []
    for path, inner in module.named_modules():
        if any(path.startswith(f"{block}.") for block in found) or not isinstance(inner, nn.ModuleList | nn.Sequential):
            continue
        members = list(inner)
        size = sum(parameter.numel() for parameter in inner.parameters())
        if len(members) > 1 and len({type(member) for member in members}) == 1 and size >= BLOCKS_SHARE * total:
            found += [canonical_name(f"{path}.{index}" if path else str(index)) for index in range(len(members))]
    if not found:
        raise UserError(
            "`model` must have blocks: an nn.ModuleList of two or more modules of one class that hold at least "
            f"{BLOCKS_SHARE:.0%} of its parameters".replace("%", " %")
            + ", but has none; put its layers into one"
        )
    return tuple(found)


def parameters_of(module: nn.Module) -> list[dict[str, Any]]:
    """Names and shapes of all parameters, each tensor once, with its other names."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, list[int]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical_name(name))
        shapes[id(parameter)] = list(parameter.shape)
    return [{"name": first, "shape": shapes[key], "tied": others} for key, (first, *others) in names.items()]
