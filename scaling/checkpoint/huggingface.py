"""The decoder as Hugging Face's GPT-2, Llama, Qwen2 and Qwen3: names, shapes and config.json, in both directions.

Llama's and Qwen's names are ours below `model.`. GPT-2 has its own, keeps query, key and value in one tensor, and its
matrices transposed. Rotary embeddings turn halves in both (`models/decoder.py`), so nothing is reordered.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from scaling.inventory import VALUE_HEAD, Parameter, head_dim, parameters, shapes
from scaling.spec.sections import Decoder, Model, Recorded, Vla

CONFIG, OWN_CONFIG = "config.json", "scaling_spec.json"
"""Beside weights: which model they are of, as Hugging Face says it; or, under our own names, the spec's `model`."""
Names = Literal["own", "llama", "gpt2"]
"""Whose names the tensors of a file have."""


@dataclass(frozen=True)
class Stored:
    """One tensor as a file has it."""

    name: str
    shape: tuple[int, ...]
    members: tuple[Parameter, ...]
    """What it is made of: the rows of these parameters of ours, one below the other."""
    transposed: bool = False


# ---------------------------------------------------------------- names

_GPT2_TOP = {"embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "norm": "transformer.ln_f"}
_GPT2_TOP |= {"lm_head": "lm_head"}
_GPT2_BLOCK = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.q_proj": "attn.c_attn",
    "self_attn.k_proj": "attn.c_attn",
    "self_attn.v_proj": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_BUFFERS = re.compile(r"(.*\.)?(h\.\d+\.attn\.(bias|masked_bias)|layers\.\d+\.self_attn\.rotary_emb\.inv_freq)")
"""Constants that older versions of transformers saved among the weights."""


def layout(model: Model, names: Names) -> tuple[Stored, ...] | None:
    """The tensors of `model` under these names, in order; None where it has parts that the names have no word for.

    Modules that are not this project's have their own names alone.
    """
    if isinstance(model, Recorded):
        return tuple(Stored(p.name, p.shape, (p,)) for p in parameters(model))
    if names == "gpt2":
        return _gpt2_layout(model) if isinstance(model, Decoder) else None
    return tuple(
        Stored(p.name if names == "own" or p.name == "lm_head.weight" else f"model.{p.name}", p.shape, (p,))
        for p in _given_away(model)
    )


def _given_away(model: Model) -> tuple[Parameter, ...]:
    """All parameters but those of a value head, which is of use to nobody but the run that trains it."""
    return tuple(p for p in parameters(model) if p.name.partition(".")[0] != VALUE_HEAD)


def _gpt2_layout(model: Decoder) -> tuple[Stored, ...] | None:
    members: dict[str, list[Parameter]] = {}
    for parameter in _given_away(model):
        name = _gpt2_name(parameter.name)
        if name is None:
            return None
        members.setdefault(name, []).append(parameter)
    found: list[Stored] = []
    for name, parts in members.items():
        rows = sum(part.shape[0] for part in parts)
        shape = (rows, *parts[0].shape[1:])
        transposed = len(shape) == 2 and ".h." in name  # the linear layers of blocks are its Conv1D
        found.append(Stored(name, shape[::-1] if transposed else shape, tuple(parts), transposed))
    return tuple(found)


def _gpt2_name(name: str) -> str | None:
    block = re.fullmatch(r"layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        module = _GPT2_BLOCK.get(block[2])
        return module and f"transformer.h.{block[1]}.{module}.{block[3]}"
    module, _, kind = name.rpartition(".")
    return f"{_GPT2_TOP[module]}.{kind}"


def recognise(found: Collection[str]) -> tuple[Names, dict[str, str]]:
    """Whose names these are, and the names of a file by those that `layout` gives, without buffers."""
    own_names = [name for name in found if not _BUFFERS.fullmatch(name)]
    if "wte.weight" in found:  # a GPT-2 without its head is saved without the prefix
        return "gpt2", {name if name.startswith("lm_head.") else f"transformer.{name}": name for name in own_names}
    same = {name: name for name in own_names}
    if "transformer.wte.weight" in found:
        return "gpt2", same
    return ("llama" if "model.embed_tokens.weight" in found else "own"), same


# ---------------------------------------------------------------- config.json


def family(model: Model) -> str | None:
    """The `model_type` of the family that computes as `model` does; None where none of them does."""
    if not isinstance(model, Decoder):
        return None
    whole = model.hidden_size % model.num_attention_heads == 0
    if model.position == "learned":
        plain = model.norm == "layernorm" and model.activation != "swiglu" and model.bias and not model.qk_norm
        same = model.num_key_value_heads in (None, model.num_attention_heads)
        return (
            "gpt2"
            if plain and same and whole and head_dim(model) * model.num_attention_heads == model.hidden_size
            else None
        )
    if model.norm != "rmsnorm" or model.activation != "swiglu":
        return None
    if model.qk_norm:
        return None if model.bias or model.qkv_bias else "qwen3"
    if model.qkv_bias and not model.bias:
        return "qwen2"
    return "llama" if whole else None


def render_config(model: Decoder, model_type: str, dtype: str, end_of_text: int | None) -> dict[str, Any]:
    """config.json of `model`. `dtype` as torch calls it; `end_of_text`: the token that ends a document, if known."""
    common = {
        "architectures": [f"{_CLASSES[model_type]}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": model.vocab_size,
        "initializer_range": model.initializer_range,
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": end_of_text if model_type == "gpt2" else None,
        "eos_token_id": end_of_text,
        "torch_dtype": dtype,  # what versions 4 and 5 both read
        "use_cache": True,
    }
    if model_type == "gpt2":
        return common | {
            "n_embd": model.hidden_size,
            "n_inner": model.intermediate_size,
            "n_layer": model.num_hidden_layers,
            "n_head": model.num_attention_heads,
            "n_positions": model.max_position_embeddings,
            "activation_function": model.activation,
            "layer_norm_epsilon": model.norm_eps,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), model.dropout),
        }
    biases = {"llama": {"attention_bias": model.bias, "mlp_bias": model.bias}, "qwen3": {"attention_bias": False}}
    return common | {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "head_dim": head_dim(model),
        "max_position_embeddings": model.max_position_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,  # version 4; version 5 has it below
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        **biases.get(model_type, {}),
    }


_CLASSES = {"gpt2": "GPT2", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}


# ---------------------------------------------------------------- what shapes do not tell


def behaviour(model: Model) -> dict[str, Any]:
    """The fields that decide what is computed and that no shape of a tensor tells, by their name in the spec."""
    if isinstance(model, Vla):
        parts = {part: behaviour(shape) for part, shape in shapes(model).items()}
        found = {f"{part}.{field}": value for part, fields in parts.items() for field, value in fields.items()}
        return found | {"language.causal": model.language.causal}
    if not isinstance(model, Decoder):
        return {}  # its code decides it
    found = {
        "norm": model.norm,
        "norm_eps": model.norm_eps,
        "activation": model.activation,
        "position": model.position,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads or model.num_attention_heads,
        "head_dim": head_dim(model),
    }
    return found | ({"rope_theta": model.rope_theta} if model.position == "rope" else {})


def behaviour_of_config(config: Mapping[str, Any], context: int) -> dict[str, Any] | str:
    """The same of a config.json, or what in it the decoder has no counterpart for up to `context` tokens.

    Absent entries have the defaults of transformers.
    """
    model_type = config.get("model_type")
    if model_type == "gpt2":
        return _behaviour_of_gpt2(config)
    if model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return f"model_type {model_type!r}"
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
        return f"rotary embeddings of another kind ({str(rope)[:80]})"
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1.0:
        return f"partial_rotary_factor {part!r}"
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        return f"hidden_act {activation!r}"
    window = config.get("sliding_window") if config.get("use_sliding_window", model_type == "mistral") else None
    if window is not None and not (isinstance(window, int) and window >= context):
        return f"attention to a sliding window of {window!r} tokens"
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    found = {
        "norm": "rmsnorm",
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "activation": "swiglu",
        "position": "rope",
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
    }
    if config.get("head_dim"):
        return found | {"head_dim": config["head_dim"]}
    return found | (
        {"head_dim": hidden / heads} if isinstance(hidden, int) and isinstance(heads, int) and heads else {}
    )


def _behaviour_of_gpt2(config: Mapping[str, Any]) -> dict[str, Any] | str:
    for name, usual in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(name, usual) is not usual:
            return f"{name} {config[name]!r}"
    activation = config.get("activation_function", "gelu_new")
    heads = config.get("n_head", config.get("num_attention_heads"))
    return {
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "position": "learned",
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
    }


def equal(one: Any, other: Any) -> bool:
    """Whether two values of a field are the same; numbers to what JSON and fp32 leave of them."""
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other
