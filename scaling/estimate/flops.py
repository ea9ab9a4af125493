"""Floating-point operations that training needs, counted from the model's structure."""

from collections.abc import Collection

from scaling.inventory import blocks, head_dim, parameters
from scaling.spec.sections import Decoder


def train_flops_per_token(model: Decoder, sequence_length: int, frozen: Collection[str] = ()) -> float:
    """FLOPs per token of one forward and backward pass, recomputation not counted.

    Each element of a matrix costs 2 in the forward pass, 2 where a gradient flows on through it, and 2 where it is
    trained itself (Kaplan et al., 2020, without their assumption that everything trains). Attention scores and their
    product with the values cost 4 x width x sequence per token and layer forward, up to twice that backward, causal
    masking not discounted (as PaLM's MFU counts, Chowdhery et al., 2022, appendix B).
    """
    elements = {parameter.name: parameter.elements for parameter in parameters(model)}
    trained = elements.keys() - set(frozen)
    training = {name.rpartition(".")[0] for name in trained}  # modules with anything trained in them
    scores = 2 * model.num_attention_heads * head_dim(model) * sequence_length

    def product(module: str, flows: bool) -> int:
        weight = f"{module}.weight"
        return elements[weight] * (2 + 2 * flows + 2 * (weight in trained))

    # The forward pass, with what autograd knows of each value: whether anything before it trains.
    stream = not training.isdisjoint(("embed_tokens", "embed_positions"))
    total = 0
    for block in blocks(model):
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        normed = stream or f"{block}.input_layernorm" in training
        total += sum(product(f"{attention}.{name}_proj", normed) for name in "qkv")
        query, key, value = (
            normed or not training.isdisjoint((f"{attention}.{name}_proj", f"{attention}.{name}_norm"))
            for name in "qkv"
        )
        total += scores * (1 + query + key) + scores * (1 + (query or key) + value)
        mixed = query or key or value
        total += product(f"{attention}.o_proj", mixed)
        stream = mixed or f"{attention}.o_proj" in training
        normed = stream or f"{block}.post_attention_layernorm" in training
        inwards = [f"{mlp}.{name}_proj" for name in (("gate", "up") if model.activation == "swiglu" else ("up",))]
        total += sum(product(module, normed) for module in inwards)
        inner = normed or not training.isdisjoint(inwards)
        total += product(f"{mlp}.down_proj", inner)
        stream = inner or f"{mlp}.down_proj" in training
    head = "embed_tokens" if model.tie_word_embeddings else "lm_head"
    return float(total + product(head, stream or "norm" in training))
