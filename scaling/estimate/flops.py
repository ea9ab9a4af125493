"""Floating-point operations that training needs, counted from the model's structure."""

from collections.abc import Collection

from scaling.inventory import blocks, head_dim, parameters
from scaling.spec.sections import Decoder


def train_flops_per_token(model: Decoder, sequence_length: int, frozen: Collection[str] = ()) -> float:
    """FLOPs per token of one forward and backward pass, recomputation not counted.

    Each element of a matrix costs 2 in the forward pass, 2 where a gradient flows on through it, and 2 where it is
    trained itself (Kaplan et al., 2020, without their assumption that everything trains). Attention scores and their
    product with the values cost 4 x width x sequence per token and layer forward, twice that backward, causal masking
    not discounted (as PaLM's MFU counts, Chowdhery et al., 2022, appendix B).
    """
    names = [parameter.name for parameter in parameters(model)]
    first_trained = next((i for i, name in enumerate(names) if name not in frozen), len(names))
    total = 0.0
    for i, parameter in enumerate(parameters(model)):
        is_head = parameter.name == "lm_head.weight" or (
            parameter.name == "embed_tokens.weight" and model.tie_word_embeddings
        )
        if len(parameter.shape) < 2 or (parameter.name.startswith("embed_") and not is_head):
            continue  # adding and looking up are not matrix products
        trained = parameter.name not in frozen
        # A gradient flows on through a matrix if something before it in the forward pass is trained.
        flows = is_head or first_trained < i
        total += parameter.elements * (2 + 2 * flows + 2 * trained)
    width = model.num_attention_heads * head_dim(model)
    for block in blocks(model):
        own = next(i for i, name in enumerate(names) if name.startswith(f"{block}."))
        last = max(i for i, name in enumerate(names) if name.startswith(f"{block}."))
        flows = first_trained < own or any(name not in frozen for name in names[own : last + 1])
        total += 4 * width * sequence_length * (3 if flows else 1)
    return total
