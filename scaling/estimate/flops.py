"""Floating-point operations that training needs, counted from the model's structure."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from scaling.estimate.caching import cached
from scaling.inventory import ADAPTERS, blocks, head_dim, parameters
from scaling.spec.sections import Decoder, Lora


@dataclass(frozen=True)
class Product:
    """One matrix product of the forward pass: [tokens, inputs] x [inputs, outputs]."""

    inputs: int
    outputs: int
    flows: bool
    """A gradient flows on through it to what it reads."""
    trains: bool
    """Its matrix is trained."""

    @property
    def flops_per_token(self) -> int:
        """2 per element in the forward pass, 2 where a gradient flows on, 2 where the matrix is trained itself."""
        return self.inputs * self.outputs * (2 + 2 * self.flows + 2 * self.trains)


@dataclass(frozen=True)
class Block:
    """What one transformer block computes, and what autograd knows of it."""

    products: tuple[Product, ...]
    """q, k, v, o, then the MLP's; those of an adapter after the layer that it is of."""
    query: bool
    """A gradient flows into the queries, and so on."""
    key: bool
    value: bool
    reads: bool
    """A gradient flows on to the block before."""
    backward: bool
    """It takes part in the backward pass: something in it or before it trains."""
    elements: int
    """Of all its parameters."""
    trained: int
    """Elements of those that train."""
    adapters: tuple[tuple[int, int], ...] = ()
    """Inputs and outputs of each layer with an adapter."""


@dataclass(frozen=True)
class Structure:
    """A model as its matrix products; blocks that are alike stand once."""

    blocks: tuple[tuple[Block, int], ...]
    """Each kind of block, and how many there are of it."""
    head: Product
    elements: int
    """Of all parameters."""
    trained: int
    trained_tensors: int


@cached
def structure(model: Decoder, frozen: frozenset[str] = frozenset(), lora: Lora | None = None) -> Structure:
    """What `model`, with the adapters of `lora`, computes where the parameters named `frozen` do not train."""
    elements = {parameter.name: parameter.elements for parameter in parameters(model, lora)}
    trained = elements.keys() - frozen
    # Modules with anything trained in them; an adapter is part of its layer.
    training = {name.rpartition(".")[0] for name in trained}
    training |= {module.rpartition(".")[0] for module in training if module.endswith(ADAPTERS)}
    by_block = _by_block(elements)
    found: Counter[Block] = Counter()
    # Whether anything before the value trains, which autograd knows.
    stream = not training.isdisjoint(("embed_tokens", "embed_positions"))
    for name in blocks(model):
        block, stream = _block(model, name, by_block[name], trained, training, stream, lora)
        found[block] += 1
    head = "embed_tokens" if model.tie_word_embeddings else "lm_head"
    product = Product(model.hidden_size, model.vocab_size, stream or "norm" in training, f"{head}.weight" in trained)
    return Structure(
        blocks=tuple(found.items()),
        head=product,
        elements=sum(elements.values()),
        trained=sum(elements[name] for name in trained),
        trained_tensors=len(trained),
    )


def train_flops_per_token(
    model: Decoder, sequence_length: int, frozen: Collection[str] = (), lora: Lora | None = None
) -> float:
    """FLOPs per token of one forward and backward pass, recomputation not counted.

    Each element of a matrix costs 2 in the forward pass, 2 where a gradient flows on through it, and 2 where it is
    trained itself (Kaplan et al., 2020, without their assumption that everything trains). Attention scores and their
    product with the values cost 4 x width x sequence per token and layer forward, up to twice that backward, causal
    masking not discounted (as PaLM's MFU counts, Chowdhery et al., 2022, appendix B).
    """
    work = structure(model, frozenset(frozen), lora)
    scores = 2 * model.num_attention_heads * head_dim(model) * sequence_length
    total = work.head.flops_per_token
    for block, count in work.blocks:
        attention = scores * (1 + block.query + block.key) + scores * (1 + (block.query or block.key) + block.value)
        total += count * (attention + sum(product.flops_per_token for product in block.products))
    return float(total)


def _by_block(elements: dict[str, int]) -> dict[str, dict[str, int]]:
    """Block -> its parameters' elements by name."""
    found: dict[str, dict[str, int]] = {}
    for name, count in elements.items():
        if name.startswith("layers."):
            found.setdefault(".".join(name.split(".")[:2]), {})[name] = count
    return found


def _block(
    model: Decoder,
    name: str,
    elements: dict[str, int],
    trained: Collection[str],
    training: set[str],
    stream: bool,
    lora: Lora | None,
) -> tuple[Block, bool]:
    """The block called `name`, where `stream` says whether anything before it trains; and the same for what follows."""
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    widths = (model.num_attention_heads, *[model.num_key_value_heads or model.num_attention_heads] * 2)
    hidden, inner, queries = model.hidden_size, model.intermediate_size, widths[0] * head_dim(model)

    products: list[Product] = []
    adapters: list[tuple[int, int]] = []
    adapted = lora.targets(model) if lora else ()

    def multiply(module: str, inputs: int, outputs: int, flows: bool) -> None:
        products.append(Product(inputs, outputs, flows, f"{module}.weight" in trained))
        if lora is not None and module.rpartition(".")[2] in adapted:
            adapters.append((inputs, outputs))
            down, up = (f"{module}.{part}.weight" in trained for part in ADAPTERS)
            products.extend((Product(inputs, lora.rank, flows, down), Product(lora.rank, outputs, flows or down, up)))

    before = stream
    normed = stream or f"{name}.input_layernorm" in training
    for letter, heads in zip("qkv", widths, strict=True):
        multiply(f"{attention}.{letter}_proj", hidden, heads * head_dim(model), normed)
    query, key, value = (
        normed or not training.isdisjoint((f"{attention}.{letter}_proj", f"{attention}.{letter}_norm"))
        for letter in "qkv"
    )
    mixed = query or key or value
    multiply(f"{attention}.o_proj", queries, hidden, mixed)
    stream = stream or mixed or f"{attention}.o_proj" in training
    normed = stream or f"{name}.post_attention_layernorm" in training
    inwards = [f"{mlp}.{letter}_proj" for letter in (("gate", "up") if model.activation == "swiglu" else ("up",))]
    for module in inwards:
        multiply(module, hidden, inner, normed)
    wide = normed or not training.isdisjoint(inwards)
    multiply(f"{mlp}.down_proj", inner, hidden, wide)
    after = stream or wide or f"{mlp}.down_proj" in training
    own = sum(count for parameter, count in elements.items() if parameter in trained)
    block = Block(
        tuple(products), query, key, value, before, after, sum(elements.values()), own, adapters=tuple(adapters)
    )
    return block, after
