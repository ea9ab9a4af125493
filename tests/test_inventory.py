"""The torch-free inventory against the real module, and the FLOPs formula against torch's counter."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SPECS as FILES
from processes import python
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from scaling.estimate.flops import train_flops_per_token
from scaling.inventory import blocks, head_dim, parameters, tied
from scaling.models.decoder import Decoder
from scaling.spec import load_spec
from scaling.spec.sections import Decoder as DecoderSpec
from scaling.spec.source import recipes

PARITY = FILES / "gpt-parity.json"
SIZES = dict(
    kind="decoder",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=20,
)
GPT2 = dict(norm="layernorm", activation="gelu_new", position="learned", bias=True, tie_word_embeddings=True)


def decoder_spec(**changes: Any) -> DecoderSpec:
    return DecoderSpec(**(SIZES | changes))


SPECS = {
    "llama": decoder_spec(),
    "llama tied": decoder_spec(tie_word_embeddings=True),
    "grouped queries": decoder_spec(num_key_value_heads=2),
    "one key head, head_dim given": decoder_spec(num_key_value_heads=1, head_dim=10),
    "heads that do not divide the width": decoder_spec(num_attention_heads=5, head_dim=8),
    "qwen2": decoder_spec(qkv_bias=True, num_key_value_heads=2),
    "qwen3": decoder_spec(qk_norm=True, head_dim=16, num_key_value_heads=2, tie_word_embeddings=True),
    "rmsnorm with bias": decoder_spec(bias=True, qk_norm=True),
    "gpt2": decoder_spec(**GPT2),
    "gpt2 untied": decoder_spec(**(GPT2 | {"tie_word_embeddings": False})),
    "gpt2 without bias": decoder_spec(**(GPT2 | {"bias": False})),
    "gpt2 without bias, with qkv_bias": decoder_spec(**(GPT2 | {"bias": False, "qkv_bias": True})),
    "relu": decoder_spec(**(GPT2 | {"activation": "relu"})),
    "layernorm and rope": decoder_spec(norm="layernorm", activation="gelu"),
    "one layer": decoder_spec(num_hidden_layers=1),
} | {f"recipe {name}": model for name in recipes() if isinstance(model := load_spec(name).model, DecoderSpec)}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request: pytest.FixtureRequest) -> DecoderSpec:
    return request.param


def meta_decoder(spec: DecoderSpec) -> Decoder:
    with torch.device("meta"):
        return Decoder(spec)


def test_names_and_shapes_are_the_modules(spec: DecoderSpec) -> None:
    real = [(name, tuple(parameter.shape)) for name, parameter in meta_decoder(spec).named_parameters()]
    assert [(parameter.name, parameter.shape) for parameter in parameters(spec)] == real


def test_blocks_are_modules_alike_and_complete(spec: DecoderSpec) -> None:
    model = meta_decoder(spec)
    found = [model.get_submodule(path) for path in blocks(spec)]
    assert found == list(model.layers)
    assert len(found) == spec.num_hidden_layers


def test_tied_names_are_one_tensor(spec: DecoderSpec) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in meta_decoder(spec).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    assert tied(spec) == tuple(tuple(some) for some in names.values() if len(some) > 1)
    listed = {parameter.name for parameter in parameters(spec)}
    assert all(first in listed and not listed & set(others) for first, *others in tied(spec))


def test_head_dim_is_the_modules(spec: DecoderSpec) -> None:
    attention = meta_decoder(spec).layers[0].self_attn
    assert attention.q_proj.out_features == spec.num_attention_heads * head_dim(spec)


@pytest.mark.parametrize(
    ("recipe", "vocabulary", "count"),
    [
        ("gpt2-124m", 50304, 124_475_904),
        ("gpt2-124m", 50257, 124_439_808),  # as published: Hugging Face's openai-community/gpt2
        ("llama-8b", 128256, 8_030_261_248),  # as published: meta-llama/Meta-Llama-3-8B
    ],
)
def test_published_parameter_counts(recipe: str, vocabulary: int, count: int) -> None:
    model = load_spec(recipe, [f"model.vocab_size={vocabulary}"]).model
    assert sum(parameter.elements for parameter in parameters(model)) == count


# ---------------------------------------------------------------- FLOPs


LENGTH, BATCH = 20, 2


def counted_flops(spec: DecoderSpec, frozen: set[str], *, chunked: bool) -> float:
    """What torch's counter finds in one forward and backward pass, per token, on the meta device: nothing is computed.

    Attention runs as plain matrix products: the counter takes fused kernels' backward pass to recompute the forward.
    """
    with torch.device("meta"):
        model = Decoder(spec, chunked=chunked)
        ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    return counter.get_total_flops() / (BATCH * LENGTH)


MODELS = {
    "gpt2": decoder_spec(**GPT2),
    "gpt2 untied": decoder_spec(**(GPT2 | {"tie_word_embeddings": False})),
    "llama": decoder_spec(num_key_value_heads=2),
    "llama tied, head_dim": decoder_spec(num_key_value_heads=2, head_dim=10, tie_word_embeddings=True),
    "qwen3": decoder_spec(num_key_value_heads=2, qk_norm=True),
}
FROZEN = {
    "nothing": (),
    "embeddings and first layers": ("embed_", "layers.0.", "layers.1."),
    "a block in the middle": ("layers.2.",),
    "all but the last block and the head": ("embed_", "layers.0.", "layers.1.", "layers.2."),
    "the head": ("lm_head.", "embed_tokens."),
    "all but the head": ("embed_positions.", "layers.", "norm."),
    "all but an untied head": ("embed_", "layers.", "norm."),
    "all but norms": (
        "embed_",
        "lm_head.",
        *(f"layers.{i}.{part}." for i in range(4) for part in ("self_attn", "mlp")),
    ),
    "all but the last MLP": (
        "embed_",
        "lm_head.",
        *(f"layers.{i}." for i in range(3)),
        "layers.3.self_attn.",
        "layers.3.input",
    ),
    "all but the queries from layer 2 on": (
        "embed_",
        "lm_head.",
        "layers.0.",
        "layers.1.",
        *(
            f"layers.{i}.{part}"
            for i in (2, 3)
            for part in ("input", "post", "mlp", *(f"self_attn.{p}" for p in "kvo"))
        ),
    ),
}


def frozen_names(model: str, frozen: str) -> set[str]:
    return {p.name for p in parameters(MODELS[model]) if p.name.startswith(FROZEN[frozen])}


@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "chunked"])
@pytest.mark.parametrize(
    ("model", "frozen"),
    [
        pytest.param(model, frozen, id=f"{model}: {frozen}")
        for model in MODELS
        for frozen in FROZEN
        if len(frozen_names(model, frozen)) < len(parameters(MODELS[model]))  # something is left to train
    ],
)
def test_flops_are_what_torch_counts(model: str, frozen: str, chunked: bool) -> None:
    names = frozen_names(model, frozen)
    have = train_flops_per_token(MODELS[model], LENGTH, names)
    assert have == pytest.approx(counted_flops(MODELS[model], names, chunked=chunked), rel=1e-9)


def test_flops_of_gpt2_are_six_per_parameter_and_attention() -> None:
    spec = load_spec("gpt2-124m").model
    matrices = 124_475_904 - 1024 * 768 - sum(p.elements for p in parameters(spec) if len(p.shape) == 1)
    assert train_flops_per_token(spec, 1024) == 6 * matrices + 12 * 12 * 768 * 1024


# ---------------------------------------------------------------- the command


def inventory(*words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "scaling.inventory", str(PARITY), *words)


def test_the_command_lists_every_parameter_with_its_group(tmp_path: Path) -> None:
    out = tmp_path / "inventory.json"
    done = inventory("--json", str(out))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    model = meta_decoder(load_spec(str(PARITY)).model)
    real = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert {row["name"]: row["shape"] for row in found["parameters"]} == real
    for row in found["parameters"]:
        assert row["bytes"] == 4 * row["elements"] == 4 * math.prod(row["shape"])
        assert row["frozen"] == row["name"].startswith("layers.1.") == (row["group"] == "frozen")
        assert row["name"] in done.stdout
    trained = sum(row["elements"] for row in found["parameters"] if not row["frozen"])
    total = sum(math.prod(shape) for shape in real.values())
    assert found["elements"] == {"total": total, "trained": trained} and 0 < trained < total
    assert sum(group["elements"] for group in found["groups"]) == total


def test_json_in_place_of_the_table() -> None:
    assert json.loads(inventory("--json").stdout)["spec"] == "gpt-parity"


SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": SMALL,
    "llama with biases": SMALL | {"attention_bias": True, "mlp_bias": True},
    "mistral": SMALL,
    "qwen2": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "gemma": SMALL | {"head_dim": 16},
    "gpt2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_folder_has_the_parameters_of_its_model(tmp_path: Path, family: str, tied: bool) -> None:
    config = AutoConfig.for_model(family.split()[0], tie_word_embeddings=tied, **FAMILIES[family])
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    done = python("-m", "scaling.inventory", "--model", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    found = {row["name"]: row["shape"] for row in json.loads(done.stdout)["parameters"]}
    real = {name.removeprefix("model."): list(parameter.shape) for name, parameter in model.named_parameters()}
    if family == "gpt2":  # other names, and queries, keys and values in one
        assert sum(map(math.prod, found.values())) == sum(map(math.prod, real.values()))
    else:
        assert found == real


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "neither is"), (["gpt2-124m", "--model", "gpt2"], "both are"), (["--model", "gtp2"], "gpt2")],
)
def test_a_spec_or_a_model_is_named(words: list[str], told: str) -> None:
    done = python("-m", "scaling.inventory", *words)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--set", "model.hidden_size=33"], ["--json", "/nowhere/x.json"], ["--jason"]])
def test_mistakes_are_told_in_one_message(words: list[str]) -> None:
    done = inventory(*words)
    assert done.returncode == 2 and done.stderr and "Traceback" not in done.stderr
