"""Modules of the user's own and of transformers: how to build them, and which of their parts are the blocks."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from scaling.errors import UserError
from scaling.imports import call_target, check_allowed
from scaling.inventory import CHANNELS, adapted_layers, is_adapter
from scaling.inventory.recorded import Inventory, Parameter, fingerprint, keep_inventory
from scaling.models.huggingface import causal_lm
from scaling.models.huggingface_vla import build_vla, encoders, huggingface_vla_recipe, words_of
from scaling.models.initial import InitialValues
from scaling.models.lora import adapter_inserter, fill_adapter
from scaling.models.recipe import ModelRecipe, canonical_name, leave
from scaling.spec.sections import FactoryModel, HuggingFace, HuggingFaceVla, Lora, Model, Recorded

BLOCKS_SHARE = 0.05
"""Of all elements, what a list of alike modules must have for them to be blocks."""


def recorded_recipe(
    model: Recorded,
    blocks: Sequence[str],
    seed: int,
    allow_import: Sequence[str],
    *,
    filled: bool = False,
    lora: Lora | None = None,
) -> ModelRecipe:
    """How to build `model`, whose blocks have these paths, with the adapters of `lora` in it. Unless `filled` values
    are left as they are: neither memory nor speed depends on them, and to have them takes all of the model's memory on
    the host, or its files."""
    insert = None if lora is None else adapter_inserter(lora, list(adapted_layers(model, lora)))

    def with_adapters() -> nn.Module:
        module = build(model, allow_import)
        if insert is not None:
            insert(module)
        return module

    if isinstance(model, HuggingFaceVla):
        return huggingface_vla_recipe(model, blocks, seed, encoders(model, allow_import, seed), filled=filled)
    if not filled:
        return ModelRecipe(with_adapters, leave, tuple(blocks), seed)
    values = InitialValues(model, lambda filled: build(model, allow_import, filled=filled), seed)

    def fill(name: str, value: Tensor, generator: torch.Generator) -> None:
        if is_adapter(name):
            fill_adapter(name, value, generator)
        else:
            values.fill(name, value, generator)

    return ModelRecipe(with_adapters, fill, tuple(blocks), seed, values.buffers)


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
            return causal_lm(model, allow_import, filled=filled)
        case HuggingFaceVla():
            return build_vla(model, encoders(model, allow_import))


def look_at(model: Model, allow_import: Sequence[str]) -> None:
    """Find out what a module is made of that no inventory file describes."""
    if isinstance(model, Recorded) and model.inventory is None:
        if isinstance(model, FactoryModel):
            check_allowed(model.target, allow_import, "model.target")
        take_inventory(model, allow_import)


def take_inventory(model: Recorded, allow_import: Sequence[str]) -> None:
    """Look at a module that no inventory file describes; from here on `inventory_of` knows it. UserError where it
    cannot be built.

    Without blocks the whole is one: it is gathered at once, and neither checkpointed nor compiled.
    """
    with torch.device("meta"):
        module = build(model, allow_import)
    try:
        blocks = blocks_in(model, module)
    except UserError:
        blocks = ()
    keep_inventory(model, inventory_found(model, module, blocks, allow_import))


def inventory_found(
    model: Recorded, module: nn.Module, blocks: Sequence[str], allow_import: Sequence[str]
) -> Inventory:
    """What `module`, as `build` made it of `model`, is made of; without a step of it."""
    listed = parameters_of(module)
    config = getattr(module, "config", None)
    words, seen = getattr(config, "vocab_size", None), None
    if isinstance(model, HuggingFaceVla):
        words, seen = words_of(model, encoders(model, allow_import)), _seen(model, module)
    return Inventory(
        path="",
        model=fingerprint(model),
        parameters=tuple(Parameter(one["name"], tuple(one["shape"])) for one in listed),
        tied=tuple((one["name"], *one["tied"]) for one in listed if one["tied"]),
        blocks=tuple(blocks),
        buffer_bytes=sum(buffer.nbytes for buffer in module.buffers()),
        vocab_size=words,
        linears=linear_layers(module, blocks),
        seen=seen,
        ledger=None,
    )


def _seen(model: HuggingFaceVla, module: nn.Module) -> tuple[int, int]:
    """Tokens that vision gives of a sample's images, and their width; of a module without values."""
    views, size, device = model.vision.views, model.vision.image_size, next(module.parameters()).device
    images = torch.zeros(1, views, size, size, CHANNELS, dtype=torch.uint8, device=device)
    with torch.no_grad():
        found = module(images)
    return found.shape[1], found.shape[2]


def blocks_in(model: Recorded, module: nn.Module) -> tuple[str, ...]:
    """As `find_blocks`; of a vla those of each of its parts, however small it is beside the others."""
    if not isinstance(model, HuggingFaceVla):
        return find_blocks(module)
    found: list[str] = []
    for part in ("vision", "language", "fusion"):
        with suppress(UserError):
            found += [f"{part}.{path}" for path in find_blocks(module.get_submodule(part))]
    return tuple(found)


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


def linear_layers(module: nn.Module, blocks: Sequence[str]) -> dict[str, bool]:
    """Paths of the linear layers in the blocks; whether the weight of each is [inputs, outputs], as Conv1D's of
    transformers (GPT-2's)."""
    found: dict[str, bool] = {}
    for path in blocks:
        for inner, layer in module.get_submodule(path).named_modules(prefix=path):
            turned = type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"
            if isinstance(layer, nn.Linear) or turned:
                found[canonical_name(inner)] = turned
    return found


def parameters_of(module: nn.Module) -> list[dict[str, Any]]:
    """Names and shapes of all parameters, each tensor once, with its other names."""
    names: dict[int, list[str]] = {}
    shapes: dict[int, list[int]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical_name(name))
        shapes[id(parameter)] = list(parameter.shape)
    return [{"name": first, "shape": shapes[key], "tied": others} for key, (first, *others) in names.items()]
