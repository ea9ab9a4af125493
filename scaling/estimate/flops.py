"""Floating-point operations that training needs, counted from the model's structure."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace

from scaling.estimate.caching import cached
from scaling.estimate.work import recorded_flops
from scaling.inventory import (
    ADAPTERS,
    CHANNELS,
    block_of,
    blocks,
    context_length,
    fusion_shape,
    head_dim,
    ledger_of,
    parameters,
    patches,
    shapes,
    text_length,
)
from scaling.spec.sections import Decoder, Lora, Model, Recorded, Vla


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


@dataclass(frozen=True)
class Stack:
    """Blocks of one part of a vla, alike in what they compute."""

    shape: Decoder
    block: Block
    count: int
    tokens: int
    """Of a sample, that pass through."""
    sequence: int
    """To which each of them attends."""
    causal: bool = False
    crossed: tuple[Product, ...] = ()
    """Keys and values of cross-attention: products over the tokens of the context."""
    context: int = 0
    """Those tokens."""
    reads: bool = False
    """A gradient flows to keys and values of cross-attention."""


@dataclass(frozen=True)
class VlaStructure:
    """A vla as its matrix products."""

    stacks: tuple[Stack, ...]
    """In the order of the forward pass; a kind of block as often as there are different ones."""
    ends: tuple[tuple[Product, int], ...]
    """Products outside of blocks, each with the tokens of a sample that it is over: the head is the last."""
    elements: int
    """Of all parameters that take part."""
    trained: int
    trained_tensors: int


@cached
def vla_structure(model: Vla, text: int, frozen: frozenset[str] = frozenset(), features: bool = False) -> VlaStructure:
    """What `model` computes for instructions of `text` tokens where the parameters named `frozen` do not train.

    A part of which nothing trains, and before which nothing does, has a forward pass alone; vision not even that where
    its `features` are in the data.
    """
    elements = {
        parameter.name: parameter.elements
        for parameter in parameters(model)
        if not (features and parameter.name.startswith("vision."))
    }
    trained = elements.keys() - frozen
    training = {name.rpartition(".")[0] for name in trained}
    by_block = _by_block(elements)
    vision, language, action, width = model.vision, model.language, model.action, model.fusion.hidden_size
    seen, count = vision.views * patches(vision), patches(vision)
    found: list[Stack] = []

    def end(name: str, inputs: int, outputs: int, flows: bool) -> Product:
        return Product(inputs, outputs, flows, f"{name}.weight" in trained)

    embed = (end("vision.patch_embed", CHANNELS * vision.patch_size**2, vision.hidden_size, False), seen)
    ends = [] if features else [embed]
    streams: dict[str, bool] = {"vision": False}
    for part, shape in shapes(model).items():
        if part == "fusion":
            break
        if part == "vision" and features:
            continue
        stream = any(name.startswith((f"{part}.embed", f"{part}.patch")) for name in training)
        for index in range(shape.num_hidden_layers):
            name = f"{part}.layers.{index}"
            block, stream = _block(shape, name, by_block[name], trained, training, stream)
            over = (seen, seen if index % 2 else count, False) if part == "vision" else (text, text, language.causal)
            found.append(Stack(shape, block, 1, *over))
        streams[part] = stream or f"{part}.norm" in training
    looks = context_length(model, text)
    read = any(streams.values())
    ends += [
        (end("fusion.vision_proj", vision.hidden_size, width, streams["vision"]), seen),
        (end("fusion.language_proj", language.hidden_size, width, streams["language"]), text),
        (end("fusion.state_proj", action.state_dim, width, False), 1),
    ]
    read = read or any(f"fusion.{name}_proj" in training for name in ("vision", "language", "state"))
    stream = not training.isdisjoint(("fusion.queries", "fusion.action_proj", "fusion.time_proj"))
    for index in range(model.fusion.num_hidden_layers):
        name = f"fusion.layers.{index}"
        stack, stream = _fusion_stack(model, name, by_block[name], trained, training, (stream, read), looks)
        found.append(stack)
    head = end("action_head", width, action.action_dim, stream or "fusion.norm" in training)
    alike = Counter(found)
    return VlaStructure(
        stacks=tuple(replace(stack, count=count) for stack, count in alike.items()),
        ends=(*ends, (head, action.chunk_size)),
        elements=sum(elements.values()),
        trained=sum(elements[name] for name in trained),
        trained_tensors=len(trained),
    )


def _fusion_stack(
    model: Vla,
    name: str,
    elements: dict[str, int],
    trained: Collection[str],
    training: set[str],
    flows: tuple[bool, bool],
    context: int,
) -> tuple[Stack, bool]:
    """A block of the fusion; `flows`: whether a gradient goes to its queries, and to what they look at."""
    shape, chunk, width = fusion_shape(model.fusion), model.action.chunk_size, model.fusion.hidden_size
    cross = f"{name}.cross_attn"
    stream, read = flows
    crosses = read or any(module.startswith((cross, f"{name}.cross_attention")) for module in training)
    block, after = _block(shape, name, elements, trained, training, stream)
    if crosses and not after:
        after = True
        block = replace(block, backward=True)

    def product(letter: str, flows: bool) -> Product:
        return Product(width, width, flows, f"{cross}.{letter}_proj.weight" in trained)

    keys = (product("k", read), product("v", read))
    block = replace(block, products=(*block.products, product("q", stream), product("o", after)))
    return Stack(shape, block, 1, chunk, chunk, False, keys, context, crosses or stream), after


def _vla_flops(model: Vla, length: int, frozen: frozenset[str], features: bool) -> float:
    """Of one sample."""
    work = vla_structure(model, text_length(model, length), frozen, features)
    total = sum(product.flops_per_token * tokens for product, tokens in work.ends)
    for stack in work.stacks:
        block, width = stack.block, stack.shape.num_attention_heads * head_dim(stack.shape)
        scores = 2 * width * stack.sequence
        attention = scores * (1 + block.query + block.key) + scores * (1 + (block.query or block.key) + block.value)
        once = stack.tokens * (attention + sum(product.flops_per_token for product in block.products))
        once += stack.context * sum(product.flops_per_token for product in stack.crossed)
        once += 4 * width * stack.context * stack.tokens * (3 if stack.reads else 1)
        total += stack.count * once
    return float(total)


def train_flops_per_token(
    model: Model,
    sequence_length: int,
    frozen: Collection[str] = (),
    lora: Lora | None = None,
    *,
    features: bool = False,
) -> float:
    """FLOPs per token of one forward and backward pass, recomputation not counted.

    Each element of a matrix costs 2 in the forward pass, 2 where a gradient flows on through it, and 2 where it is
    trained itself (Kaplan et al., 2020, without their assumption that everything trains). Attention scores and their
    product with the values cost 4 x width x sequence per token and layer forward, up to twice that backward, causal
    masking not discounted (as PaLM's MFU counts, Chowdhery et al., 2022, appendix B). Of a vla tokens are the positions
    of `scaling.inventory.sample_length`, and `sequence_length` is their number in a sample; with `features` its vision
    is left out, whose answers are in the data. Of a recorded model it is
    what its products and attention kernels were counted to cost, where masking is not discounted either. Raises
    UserError where nothing was recorded.
    """
    if isinstance(model, Vla):
        return _vla_flops(model, sequence_length, frozenset(frozen), features) / sequence_length
    if isinstance(model, Recorded):
        return recorded_flops(ledger_of(model)["work"]["none"]) / sequence_length
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
        if block := block_of(name):
            found.setdefault(block, {})[name] = count
    return found


def _block(
    model: Decoder,
    name: str,
    elements: dict[str, int],
    trained: Collection[str],
    training: set[str],
    stream: bool,
    lora: Lora | None = None,
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
