"""A model without a spec: a recipe's, a well-known size by name, or a Hugging Face folder's by its config.json.

The bare spec around it has synthetic data, AdamW and bf16; what is not said does not change memory or speed.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.spec import Document, load_spec
from scaling.spec.document import assign, document_of
from scaling.spec.source import recipes

LIMIT_BYTES = 2**20
"""As of a spec: no config is larger."""
STEPS = 1000
"""`max_steps` of a bare spec, for which times and costs are then told."""


def bare_spec(model: str, sequence_length: int, global_batch: int) -> tuple[dict[str, Any], list[str]]:
    """A spec as plain JSON values around `model` (a name or a path), and notes on what was left out of a config.

    Raises UserError where `model` is neither known nor a config that the decoder covers.
    """
    section, notes = _model(model, sequence_length)
    objective: dict[str, Any] = {}
    if section["kind"] == "vla":
        loss = "flow_matching" if section["action"]["head"] == "velocity" else "regression"
        objective = {"objective": {"kind": "behaviour_cloning", "loss": loss}}
    return {
        "name": _run_name(model),
        "model": section,
        **objective,
        "data": {"kind": "synthetic", "sequence_length": sequence_length},
        # The micro-batch is what is looked for; one of the three sizes may be open.
        "batch": {"global_batch_size": global_batch, "gradient_accumulation_steps": 1},
        "optimizer": {"kind": "adamw", "lr": 1e-4},
        "max_steps": STEPS,
    }, notes


def bare_document(
    model: str, sequence_length: int, global_batch: int, assignments: Sequence[str]
) -> tuple[Document, list[str]]:
    """As `bare_spec`, as a document, with assignments ("a.b.c=VALUE") made in it."""
    values, notes = bare_spec(model, sequence_length, global_batch)
    document = document_of("the bare spec", json.dumps(values, indent=2))
    for assignment in assignments:
        assign(document, assignment)
    return document, notes


def _run_name(model: str) -> str:
    """A name for the run: the model's, or of a config the file's, or its folder's where that says more."""
    path = _config_file(model)
    name = model if path is None else path.stem if path.stem != "config" else path.absolute().parent.name
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name).lstrip("_.-")[:100] or "model"


def _model(name: str, sequence_length: int) -> tuple[dict[str, Any], list[str]]:
    if (path := _config_file(name)) is not None:
        return decoder_of_config(_read(path), sequence_length)
    if name in SIZES:
        return decoder_of_config(SIZES[name], sequence_length)
    if name in recipes():
        return load_spec(name).model.model_dump(), []
    names = [*recipes(), *SIZES]
    near = difflib.get_close_matches(name[:100].lower(), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(names)}"
    raise UserError(
        "`--model` must be a known model, or the path of a config.json or of a folder with one, but is "
        f"{name[:100]!r}; {hint}"
    )


def _config_file(name: str) -> Path | None:
    """The config.json that `name` is the path of, or of whose folder it is."""
    inside = Path(name, "config.json")
    return Path(name) if name.endswith(".json") or Path(name).is_file() else inside if inside.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            config = json.loads(file.read(LIMIT_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"`--model` must be a config.json that can be read, but {str(path)[:200]} is not: {reason}"
        ) from None
    if not isinstance(config, dict):
        raise UserError(
            f"`--model` must be a JSON object, but {str(path)[:200]} holds another value; name a config.json"
        )
    return config


# ---------------------------------------------------------------- config.json


def decoder_of_config(config: Mapping[str, Any], sequence_length: int) -> tuple[dict[str, Any], list[str]]:
    """The spec's `model` with the sizes of a config.json, and notes on what memory and speed do not depend on.

    Absent entries have the defaults of transformers. UserError where the decoder lacks a part that has a size.
    """
    family = str(config.get("model_type"))
    if family == "gpt2":
        return _gpt2(config), []
    if family not in _FAMILIES:
        raise UserError(
            f"`--model` must be of a family that the decoder covers ({', '.join(['gpt2', *_FAMILIES])}), but its "
            f'model_type is {family!r}; write a spec whose `model.kind` is "huggingface", and plan that'
        )
    _refuse_parts(config, family, sequence_length)
    heads = _size(config, "num_attention_heads")
    hidden = _size(config, "hidden_size")
    found: dict[str, Any] = {
        "kind": "decoder",
        "vocab_size": _size(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _size(config, "intermediate_size"),
        "num_hidden_layers": _size(config, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "max_position_embeddings": _size(config, "max_position_embeddings"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tie_word_embeddings": config.get("tie_word_embeddings", family == "gemma"),
        **_FAMILIES[family],
    }
    if config.get("head_dim"):
        found["head_dim"] = _size(config, "head_dim")
    if config.get("mlp_bias"):  # with attention_bias, as _refuse_parts has made sure
        found["bias"] = True
    return found, _notes(config, family, found)


_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma": {},
}
"""What the decoder needs beyond the sizes."""


def _refuse_parts(config: Mapping[str, Any], family: str, sequence_length: int) -> None:
    """UserError where the model has parts with a size that the decoder has not."""

    def refuse(what: str) -> None:
        raise UserError(
            f"`--model` must be one that the decoder can say, but has {what}; "
            'write a spec whose `model.kind` is "huggingface", and plan that'
        )

    if bool(config.get("attention_bias", False)) != bool(config.get("mlp_bias", False)):
        refuse("biases in attention alone or in the MLP alone (attention_bias, mlp_bias)")
    if config.get("num_experts") or config.get("num_local_experts"):
        refuse("experts")
    activation = config.get("hidden_activation") or config.get("hidden_act", "silu")
    gated = ("silu", "swish", *(("gelu", "gelu_pytorch_tanh") if family == "gemma" else ()))
    if activation not in gated:
        refuse(f"the activation {activation!r}")
    window = config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None
    if isinstance(window, int) and window < sequence_length:
        refuse(f"attention to a sliding window of {window} tokens, less than the sequence of {sequence_length}")


def _notes(config: Mapping[str, Any], family: str, found: Mapping[str, Any]) -> list[str]:
    notes: list[str] = []
    if family == "gemma":
        notes.append("gemma: planned as a swiglu decoder, whose tensors and products have the same sizes")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type", "default")) != "default":
        notes.append("rotary embeddings are planned unscaled: their scaling changes no size")
    return notes


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden = _size(config, "n_embd", "hidden_size")
    activation = str(config.get("activation_function", "gelu_new"))
    activation = {"gelu_pytorch_tanh": "gelu_new"}.get(activation, activation)
    return {
        "kind": "decoder",
        "vocab_size": _size(config, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": config.get("n_inner") or 4 * hidden,
        "num_hidden_layers": _size(config, "n_layer", "num_hidden_layers"),
        "num_attention_heads": _size(config, "n_head", "num_attention_heads"),
        "max_position_embeddings": _size(config, "n_positions", "max_position_embeddings"),
        "norm": "layernorm",
        "norm_eps": config.get("layer_norm_epsilon", 1e-5),
        "activation": activation,
        "position": "learned",
        "bias": True,
        "tie_word_embeddings": config.get("tie_word_embeddings", True),
        "dropout": config.get("resid_pdrop", 0.1),
    }


def _size(config: Mapping[str, Any], *names: str) -> int:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    shown = next((config[name] for name in names if name in config), None)
    raise UserError(
        f"`--model` must be a config.json with a whole number as {names[0]}, but it is {shown!r}; correct it"
    )


# ---------------------------------------------------------------- well-known sizes


def _gpt2_size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": 1024, "vocab_size": 50257}
    return {"model_type": "gpt2", "resid_pdrop": 0.0, **sizes}


def _sizes(model_type: str, vocabulary: int, context: int, *sizes: int, tied: bool = False) -> dict[str, Any]:
    hidden, inner, layers, heads, keys = sizes
    return {
        "model_type": model_type,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "tie_word_embeddings": tied,
        **({"head_dim": 128} if model_type == "qwen3" else {}),
    }


SIZES: dict[str, dict[str, Any]] = {
    "gpt2": _gpt2_size(768, 12, 12),
    "gpt2-medium": _gpt2_size(1024, 24, 16),
    "gpt2-large": _gpt2_size(1280, 36, 20),
    "gpt2-xl": _gpt2_size(1600, 48, 25),
    "llama2-7b": _sizes("llama", 32000, 4096, 4096, 11008, 32, 32, 32),
    "llama2-13b": _sizes("llama", 32000, 4096, 5120, 13824, 40, 40, 40),
    "llama2-70b": _sizes("llama", 32000, 4096, 8192, 28672, 80, 64, 8),
    "llama3-8b": _sizes("llama", 128256, 8192, 4096, 14336, 32, 32, 8),
    "llama3-70b": _sizes("llama", 128256, 8192, 8192, 28672, 80, 64, 8),
    "llama3.1-405b": _sizes("llama", 128256, 131072, 16384, 53248, 126, 128, 8),
    "mistral-7b": _sizes("mistral", 32000, 32768, 4096, 14336, 32, 32, 8),
    "qwen2.5-0.5b": _sizes("qwen2", 151936, 32768, 896, 4864, 24, 14, 2, tied=True),
    "qwen2.5-1.5b": _sizes("qwen2", 151936, 131072, 1536, 8960, 28, 12, 2, tied=True),
    "qwen2.5-7b": _sizes("qwen2", 152064, 131072, 3584, 18944, 28, 28, 4),
    "qwen3-8b": _sizes("qwen3", 151936, 40960, 4096, 12288, 36, 32, 8),
}
"""Sizes that people name, as the entries of the config.json of each (huggingface.co, "Files" of the model's page)."""
