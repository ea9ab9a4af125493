"""From a spec to the recipe of its model."""

from scaling.models.decoder import decoder_recipe
from scaling.models.recipe import ModelRecipe
from scaling.models.vla import vla_recipe
from scaling.spec.sections import Decoder, Spec, Vla


def model_recipe(spec: Spec) -> ModelRecipe:
    """How to build the model that `spec` trains."""
    match spec.model:
        case Decoder() as model:
            return decoder_recipe(model, spec.objective, spec.seed, spec.lora)
        case Vla() as model:
            return vla_recipe(model, spec.seed)
