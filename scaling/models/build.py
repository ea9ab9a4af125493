"""From a spec to the recipe of its model."""

from collections.abc import Sequence

from scaling.inventory import blocks
from scaling.models.decoder import decoder_recipe
from scaling.models.recipe import ModelRecipe
from scaling.models.recorded import recorded_recipe
from scaling.models.vla import vla_recipe
from scaling.spec.sections import Decoder, FactoryModel, HuggingFace, HuggingFaceVla, Spec, Vla


def model_recipe(spec: Spec, allow_import: Sequence[str] = (), *, filled: bool = False) -> ModelRecipe:
    """How to build the model that `spec` trains; `allow_import` are the packages that a factory may come from.

    Modules that are not this project's start from values only where `filled`: see there.
    """
    match spec.model:
        case Decoder() as model:
            return decoder_recipe(model, spec.objective, spec.seed, spec.lora)
        case Vla() as model:
            return vla_recipe(model, spec.seed)
        case FactoryModel() | HuggingFace() | HuggingFaceVla() as model:
            return recorded_recipe(model, blocks(model), spec.seed, allow_import, filled=filled, lora=spec.lora)
