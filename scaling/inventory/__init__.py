"""What a model is made of, from its section of the spec alone: parameter names, shapes, blocks. No torch.

A test builds the real module on the meta device and finds the same names and shapes. Of modules of the user's own, and
of transformers', it is in the inventory file that the section names.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any

from scaling.errors import UserError
from scaling.inventory.recorded import Inventory, Parameter, read_inventory
from scaling.spec.sections import AnyVla, Decoder, Fusion, Lora, Model, PreferenceData, Recorded, Spec, Vision, Vla
from scaling.units import WIDTHS

ADAPTERS = ("lora_A", "lora_B")
"""Modules of an adapter, below the linear layer that it is of: [rank, inputs], then [outputs, rank]."""
VALUE_HEAD = "value_head"
"""What foretells rewards; never a part of what weights are taken from or given away."""
CHANNELS = 3
"""Of an image."""
TIME_FEATURES = 256
"""Sines and cosines that a time is told by (as DiT: Peebles and Xie, 2023)."""


def parameters(model: Model, lora: Lora | None = None) -> tuple[Parameter, ...]:
    """Every parameter of `model` once, in the order of `nn.Module.named_parameters` (a tied head is its embedding).

    With `lora` its adapters too, each after the layer that it is of; the others keep their names, and are frozen.
    """
    own = _own(model)
    if lora is None:
        return own
    return tuple(_with_adapters(own, adapted_layers(model, lora), lora.rank))


def adapted_layers(model: Model, lora: Lora) -> dict[str, bool]:
    """Paths of the linear layers of `model` that get an adapter, in its order; each with whether its weight is
    [inputs, outputs] in place of [outputs, inputs]. UserError where `lora` names one that the blocks have not.
    """
    if isinstance(model, Decoder):
        targets = lora.targets(model)
        modules = (parameter.name.removesuffix(".weight") for parameter in _own(model))
        return {module: False for module in modules if module.rpartition(".")[2] in targets}
    assert isinstance(model, Recorded), "the spec refuses adapters in others"
    linears = inventory_of(model).linears
    known = dict.fromkeys(path.rpartition(".")[2] for path in linears)
    if not known:
        raise UserError(
            "`lora` must be null for a model without linear layers in its blocks, but is set, and none is known; set "
            "it to null or, if `model.inventory` is of an older version, run `python -m scaling.inventory SPEC` again"
        )
    if lora.target_modules == "all-linear":
        return dict(linears)
    for index, name in enumerate(lora.target_modules):
        if name not in known:
            raise UserError(
                f"`lora.target_modules.{index}` must be a linear layer of the model's blocks, but is {name[:100]!r}; "
                f'use some of {", ".join(known)}, or "all-linear" in place of the list'
            )
    return {path: turned for path, turned in linears.items() if path.rpartition(".")[2] in lora.target_modules}


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return any(part in ADAPTERS for part in name.split("."))


def _with_adapters(own: Sequence[Parameter], layers: Mapping[str, bool], rank: int) -> Iterator[Parameter]:
    for module, members in groupby(own, key=lambda parameter: parameter.name.rpartition(".")[0]):
        weight, *rest = members
        frozen = module != VALUE_HEAD
        yield from (replace(parameter, frozen=frozen) for parameter in (weight, *rest))
        if module in layers:
            inputs, outputs = weight.shape if layers[module] else weight.shape[::-1]
            yield Parameter(f"{module}.lora_A.weight", (rank, inputs))
            yield Parameter(f"{module}.lora_B.weight", (outputs, rank))


def _own(model: Model) -> tuple[Parameter, ...]:
    if isinstance(model, Recorded):
        return inventory_of(model).parameters
    found = _decoder(model) if isinstance(model, Decoder) else _vla(model)
    return tuple(Parameter(name, shape) for name, shape in found)


def inventory_of(model: Recorded) -> Inventory:
    """What `python -m scaling.inventory` wrote of `model`; UserError where it did not, or of another."""
    return read_inventory(model)


def ledger_of(model: Recorded) -> Mapping[str, Any]:
    """What a step of `model` does, as its inventory file has it; UserError where there is no file."""
    ledger = inventory_of(model).ledger
    if ledger is None:
        raise UserError(
            "`model.inventory` must be a file where memory or speed are to be known before, but is null; name one, and "
            "run `python -m scaling.inventory SPEC`"
        )
    return ledger


def blocks(model: Model) -> tuple[str, ...]:
    """Paths of the repeated blocks, in order: what is wrapped, checkpointed and compiled one by one."""
    if isinstance(model, Recorded):
        return inventory_of(model).blocks
    if isinstance(model, Decoder):
        return _layers("", model.num_hidden_layers)
    parts = (("vision.", model.vision), ("language.", model.language), ("fusion.", model.fusion))
    return tuple(path for prefix, part in parts for path in _layers(prefix, part.num_hidden_layers))


@cache
def block_of(path: str) -> str | None:
    """The block that a module or parameter of a decoder or vla is, or is in; None where it is in none."""
    found = re.match(r"((vision|language|fusion)\.)?layers\.\d+(?=\.|$)", path)
    return found.group() if found else None


def block_finder(model: Model) -> Callable[[str], str | None]:
    """What says as `block_of` does which block of `model` a path is in."""
    if not isinstance(model, Recorded):
        return block_of
    known = set(blocks(model))

    @cache
    def find(path: str) -> str | None:
        while path and path not in known:
            path = path.rpartition(".")[0]
        return path or None

    return find


def layers_of(model: Model, names: Iterable[str]) -> dict[str, str]:
    """For each of these parameters the block that it is in, or the module where it is in none."""
    block = block_finder(model)
    return {name: block(name) or name.rpartition(".")[0] or name for name in names}


def tied(model: Model) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor; the first name of each is the one in `parameters`."""
    if isinstance(model, Recorded):
        return inventory_of(model).tied
    if isinstance(model, Decoder) and model.tie_word_embeddings:
        return (("embed_tokens.weight", "lm_head.weight"),)
    return ()


def head_dim(model: Decoder) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads  # divisible: the spec refuses others


def words(model: Model) -> int | None:
    """How many words `model` reads: token ids are below it. None of a module that nobody has looked into."""
    if isinstance(model, Recorded):
        return inventory_of(model).vocab_size
    return model.vocab_size if isinstance(model, Decoder) else model.language.vocab_size


def instruction_words(model: AnyVla) -> int:
    """The same of a vla, of which it is always known: whoever looks at one finds it."""
    found = words(model)
    assert found is not None
    return found


def dropout(model: Model) -> float:
    """The largest dropout probability of any part, as far as the spec says it."""
    if isinstance(model, Recorded):
        return 0.0
    return model.dropout if isinstance(model, Decoder) else max(shape.dropout for shape in shapes(model).values())


def still(model: Vla, frozen: Collection[str]) -> tuple[str, ...]:
    """Parts of a vla in which nothing trains and that read nothing that trains, where these parameters are frozen.

    They run without gradients and without dropout.
    """
    training = {p.name.partition(".")[0] for p in parameters(model) if p.name not in frozen}
    found = [part for part in ("vision", "language") if part not in training]
    return (*found, "fusion") if len(found) == 2 and "fusion" not in training else tuple(found)


# ---------------------------------------------------------------- sizes of a sample


def patches(vision: Vision) -> int:
    """Tokens of one view."""
    return (vision.image_size // vision.patch_size) ** 2  # divisible: the spec refuses others


CHECKSUM_BYTES = 4
"""Of the features of one sample on disk."""


def seen_shape(model: AnyVla) -> tuple[int, int]:
    """Of what vision makes of the images of one sample: tokens of all views, and the width of each."""
    if isinstance(model, Vla):
        return model.vision.views * patches(model.vision), model.vision.hidden_size
    found = inventory_of(model).seen
    if found is None:
        raise UserError(
            "`model.inventory` must be of a vla and say what its vision gives, but does not; run `python -m "
            "scaling.inventory SPEC` again"
        )
    return found


def feature_bytes(model: AnyVla, precision: str) -> int:
    """Of what vision makes of the images of one sample, in the type that training computes in; without checksum."""
    return math.prod(seen_shape(model)) * WIDTHS[precision]


def sample_length(spec: Spec) -> int:
    """Positions of a sample: what throughput and FLOPs are counted by.

    Of a language model its tokens, of a pair of responses those of both. Of a vla the patches of all views, the tokens
    of the instruction (`data.sequence_length`) and the actions of a chunk.
    """
    length = spec.data.sequence_length
    return length + _beside_text(spec.model) if isinstance(spec.model, AnyVla) else sequences(spec) * length


def sequences(spec: Spec) -> int:
    """How many sequences a sample has: two where responses are compared."""
    return 2 if isinstance(spec.data, PreferenceData) else 1


def attended_length(spec: Spec) -> int:
    """Positions of a sample that may look at each other, as `train_flops_per_token` wants them."""
    return sample_length(spec) // sequences(spec)


def text_length(model: Model, length: int) -> int:
    """Tokens of text in a sample of so many positions: the reverse of `sample_length`."""
    return length - _beside_text(model) if isinstance(model, AnyVla) else length


def context_length(model: Vla, text: int) -> int:
    """Tokens that the action queries look at: all views, the instruction, the state."""
    return seen_shape(model)[0] + text + 1


def _beside_text(model: AnyVla) -> int:
    return seen_shape(model)[0] + model.action.chunk_size


# ---------------------------------------------------------------- shapes of blocks


def shapes(model: AnyVla) -> dict[str, Decoder]:
    """Each part of a vla that has blocks of this project's, as the decoder whose blocks they are; fusion's attend
    twice."""
    found = {"vision": vision_shape(model.vision)} if isinstance(model.vision, Vision) else {}
    found |= {"language": model.language} if isinstance(model.language, Decoder) else {}
    return found | {"fusion": fusion_shape(model.fusion)}


def vision_shape(vision: Vision) -> Decoder:
    """The decoder whose blocks are a vision transformer's."""
    return _vit(vision, patches(vision))


def fusion_shape(fusion: Fusion) -> Decoder:
    """The decoder whose blocks are those of the fusion, but for their cross-attention."""
    return _vit(fusion, 1)


def _vit(part: Vision | Fusion, positions: int) -> Decoder:
    return Decoder(
        kind="decoder",
        vocab_size=1,
        hidden_size=part.hidden_size,
        intermediate_size=part.intermediate_size,
        num_hidden_layers=part.num_hidden_layers,
        num_attention_heads=part.num_attention_heads,
        max_position_embeddings=positions,
        norm="layernorm",
        norm_eps=part.norm_eps,
        activation="gelu",
        position="learned",
        bias=True,
        dropout=part.dropout,
        initializer_range=part.initializer_range,
    )


# ---------------------------------------------------------------- names and shapes

Shapes = list[tuple[str, tuple[int, ...]]]


def _decoder(model: Decoder) -> Shapes:
    found = _embeddings("", model)
    for block in blocks(model):
        found += _named(block, _block(model))
    found += _norm("norm", model)
    if not model.tie_word_embeddings:
        found.append(("lm_head.weight", (model.vocab_size, model.hidden_size)))
    return found + _linear(VALUE_HEAD, model.hidden_size, 1, True) if model.value_head else found


def _vla(model: Vla) -> Shapes:
    vision, action, width = model.vision, model.action, model.fusion.hidden_size
    by_part = shapes(model)
    found = _linear("vision.patch_embed", CHANNELS * vision.patch_size**2, vision.hidden_size, True)
    found.append(("vision.embed_positions.weight", (patches(vision), vision.hidden_size)))
    found.append(("vision.embed_views.weight", (vision.views, vision.hidden_size)))
    found += _tower("vision", by_part["vision"])
    found += _embeddings("language.", model.language)
    found += _tower("language", model.language)
    found.append(("fusion.queries.weight", (action.chunk_size, width)))
    found += _linear("fusion.vision_proj", vision.hidden_size, width, True)
    found += _linear("fusion.language_proj", model.language.hidden_size, width, True)
    found += _linear("fusion.state_proj", action.state_dim, width, True)
    if action.head == "velocity":
        found += _linear("fusion.action_proj", action.action_dim, width, True)
        found += _linear("fusion.time_proj", TIME_FEATURES, width, True)
    found += _tower("fusion", by_part["fusion"], crossed=True)
    return found + _linear("action_head", width, action.action_dim, True)


def _tower(name: str, shape: Decoder, *, crossed: bool = False) -> Shapes:
    """Blocks, of the fusion with their cross-attention, and the norm after them."""
    found: Shapes = []
    for block in _layers(f"{name}.", shape.num_hidden_layers):
        found += _named(block, _block(shape, crossed=crossed))
    return found + _norm(f"{name}.norm", shape)


def _layers(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}layers.{index}" for index in range(count))


def _named(prefix: str, shapes: Shapes) -> Shapes:
    return [(f"{prefix}.{name}", shape) for name, shape in shapes]


def _embeddings(prefix: str, model: Decoder) -> Shapes:
    found: Shapes = [(f"{prefix}embed_tokens.weight", (model.vocab_size, model.hidden_size))]
    if model.position == "learned":
        found.append((f"{prefix}embed_positions.weight", (model.max_position_embeddings, model.hidden_size)))
    return found


def _block(model: Decoder, *, crossed: bool = False) -> Shapes:
    found = _norm("input_layernorm", model) + _attention("self_attn", model)
    if crossed:
        found += _norm("cross_attention_layernorm", model) + _attention("cross_attn", model)
    found += _norm("post_attention_layernorm", model)
    hidden, inner = model.hidden_size, model.intermediate_size
    if model.activation == "swiglu":
        found += _linear("mlp.gate_proj", hidden, inner, model.bias)
    found += _linear("mlp.up_proj", hidden, inner, model.bias)
    found += _linear("mlp.down_proj", inner, hidden, model.bias)
    return found


def _attention(name: str, model: Decoder) -> Shapes:
    hidden, width = model.hidden_size, head_dim(model)
    queries = model.num_attention_heads * width
    keys = (model.num_key_value_heads or model.num_attention_heads) * width
    found: Shapes = []
    for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
        found += _linear(f"{name}.{letter}_proj", hidden, rows, model.bias or model.qkv_bias)
    found += _linear(f"{name}.o_proj", queries, hidden, model.bias)
    if model.qk_norm:
        found += [(f"{name}.q_norm.weight", (width,)), (f"{name}.k_norm.weight", (width,))]
    return found


def _norm(name: str, model: Decoder) -> Shapes:
    weight: Shapes = [(f"{name}.weight", (model.hidden_size,))]
    return [*weight, (f"{name}.bias", (model.hidden_size,))] if model.norm == "layernorm" and model.bias else weight


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> Shapes:
    weight: Shapes = [(f"{name}.weight", (outputs, inputs))]
    return [*weight, (f"{name}.bias", (outputs,))] if bias else weight
