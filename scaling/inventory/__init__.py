"""What a model is made of, from its section of the spec alone: parameter names, shapes, blocks. No torch.

A test builds the real module on the meta device and finds the same names and shapes.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from scaling.spec.sections import Decoder, Lora

ADAPTERS = ("lora_A", "lora_B")
"""Modules of an adapter, below the linear layer that it is of: [rank, inputs], then [outputs, rank]."""


@dataclass(frozen=True)
class Parameter:
    """One tensor of the model."""

    name: str
    """Canonical name: the module's path, with no wrapper's prefix."""
    shape: tuple[int, ...]
    frozen: bool = False
    """Part of the model that adapters are put in: not trained, whatever the groups say."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def parameters(model: Decoder, lora: Lora | None = None) -> tuple[Parameter, ...]:
    """Every parameter of `model` once, in the order of `nn.Module.named_parameters` (a tied head is its embedding).

    With `lora` its adapters too, each after the layer that it is of; the others keep their names, and are frozen.
    """
    own = _own(model)
    return own if lora is None else tuple(_with_adapters(own, lora.targets(model), lora.rank))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return any(part in ADAPTERS for part in name.split("."))


def _with_adapters(own: Sequence[Parameter], targets: Collection[str], rank: int) -> Iterator[Parameter]:
    for module, members in groupby(own, key=lambda parameter: parameter.name.rpartition(".")[0]):
        weight, *rest = members
        yield from (replace(parameter, frozen=True) for parameter in (weight, *rest))
        if module.rpartition(".")[2] in targets:
            outputs, inputs = weight.shape
            yield Parameter(f"{module}.lora_A.weight", (rank, inputs))
            yield Parameter(f"{module}.lora_B.weight", (outputs, rank))


def _own(model: Decoder) -> tuple[Parameter, ...]:
    found = [("embed_tokens.weight", (model.vocab_size, model.hidden_size))]
    if model.position == "learned":
        found.append(("embed_positions.weight", (model.max_position_embeddings, model.hidden_size)))
    for block in blocks(model):
        found += [(f"{block}.{name}", shape) for name, shape in _block(model)]
    found += _norm("norm", model)
    if not model.tie_word_embeddings:
        found.append(("lm_head.weight", (model.vocab_size, model.hidden_size)))
    return tuple(Parameter(name, shape) for name, shape in found)


def blocks(model: Decoder) -> tuple[str, ...]:
    """Paths of the repeated blocks, in order: what is wrapped, checkpointed and compiled one by one."""
    return tuple(f"layers.{index}" for index in range(model.num_hidden_layers))


def tied(model: Decoder) -> tuple[tuple[str, ...], ...]:
    """Groups of parameter names that are one tensor; the first name of each is the one in `parameters`."""
    return (("embed_tokens.weight", "lm_head.weight"),) if model.tie_word_embeddings else ()


def head_dim(model: Decoder) -> int:
    """Width of one attention head."""
    return model.head_dim or model.hidden_size // model.num_attention_heads  # divisible: the spec refuses others


def _block(model: Decoder) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner, width = model.hidden_size, model.intermediate_size, head_dim(model)
    queries = model.num_attention_heads * width
    keys = (model.num_key_value_heads or model.num_attention_heads) * width
    qkv_bias = model.bias or model.qkv_bias
    found = _norm("input_layernorm", model)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        found += _linear(f"self_attn.{name}", hidden, rows, qkv_bias)
    found += _linear("self_attn.o_proj", queries, hidden, model.bias)
    if model.qk_norm:
        found += [("self_attn.q_norm.weight", (width,)), ("self_attn.k_norm.weight", (width,))]
    found += _norm("post_attention_layernorm", model)
    if model.activation == "swiglu":
        found += _linear("mlp.gate_proj", hidden, inner, model.bias)
    found += _linear("mlp.up_proj", hidden, inner, model.bias)
    found += _linear("mlp.down_proj", inner, hidden, model.bias)
    return found


def _norm(name: str, model: Decoder) -> list[tuple[str, tuple[int, ...]]]:
    weight = [(f"{name}.weight", (model.hidden_size,))]
    return [*weight, (f"{name}.bias", (model.hidden_size,))] if model.norm == "layernorm" and model.bias else weight


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> list[tuple[str, tuple[int, ...]]]:
    weight = (f"{name}.weight", (outputs, inputs))
    return [weight, (f"{name}.bias", (outputs,))] if bias else [weight]
