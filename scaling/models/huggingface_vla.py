"""A vla of which vision, language or both are models of transformers."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from scaling.models.huggingface import Encoder
from scaling.models.recipe import ModelRecipe, leave
from scaling.models.vla import Language, Vision, Vla, vla_filler
from scaling.spec.sections import AnyVla, HuggingFaceLanguage, HuggingFaceVision, HuggingFaceVla
from scaling.spec.sections import Vision as VisionSpec


def encoders(model: HuggingFaceVla, allow_import: Sequence[str], seed: int = 0) -> dict[str, Encoder]:
    """Its parts that are models of transformers, by name."""
    parts = {"vision": model.vision, "language": model.language}
    return {
        name: Encoder(name, part, allow_import, seed)
        for name, part in parts.items()
        if isinstance(part, HuggingFaceVision | HuggingFaceLanguage)
    }


def build_vla(model: HuggingFaceVla, found: Mapping[str, Encoder]) -> Vla:
    """The module, on torch's default device. UserError where a part cannot be built."""
    vision = Vision(model.vision) if isinstance(model.vision, VisionSpec) else found["vision"].build()
    if isinstance(model.language, HuggingFaceLanguage):
        return Vla(model, vision, found["language"].build())
    return Vla(model, vision, Language(model.language))


def words_of(model: HuggingFaceVla, found: Mapping[str, Encoder]) -> int:
    """Token ids that its instructions may have."""
    return found["language"].words if isinstance(model.language, HuggingFaceLanguage) else model.language.vocab_size


def described(model: AnyVla) -> str:
    """What beside its section and its weights decides what its vision computes."""
    return Encoder("vision", model.vision, ()).described() if isinstance(model.vision, HuggingFaceVision) else ""


def huggingface_vla_recipe(
    model: HuggingFaceVla, blocks: Sequence[str], seed: int, found: Mapping[str, Encoder], *, filled: bool
) -> ModelRecipe:
    """Its recipe, whose blocks have these paths; where `filled` parts start from what their folders have, and otherwise
    values are left as they are."""
    for part in found.values():
        part.look()  # while nobody changes how modules are built, as ZeRO-3 will
    if not filled:
        return ModelRecipe(lambda: build_vla(model, found), leave, tuple(blocks), seed)
    fill_own = vla_filler(model)

    def fill(name: str, value: Tensor, generator: torch.Generator) -> None:
        part = name.partition(".")[0]
        if part in found:
            value.copy_(found[part].parameters[name])
        else:
            fill_own(name, value, generator)

    def buffers() -> dict[str, Tensor]:
        return {name: value for part in found.values() for name, value in part.buffers.items()}

    return ModelRecipe(lambda: build_vla(model, found), fill, tuple(blocks), seed, buffers)
