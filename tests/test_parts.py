"""Weights of parts of a vla from files of their own, under whatever names."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SPECS
from safetensors.torch import save_file

from scaling.checkpoint.parts import open_parts
from scaling.engine.process import process_from_environment
from scaling.errors import CheckpointError
from scaling.inventory import parameters
from scaling.profile.sinks import Memory
from scaling.run import resolve
from scaling.run import run as run_job
from scaling.spec import SpecError, load_spec
from scaling.spec.sections import PartWeights, Vla

SPEC = load_spec(str(SPECS / "vla-parity.json"))
VIT = {
    "patch_embed.*": "embeddings.projection.*",
    "embed_positions.weight": "embeddings.position",
    "layers.*.input_layernorm.*": "blocks.*.norm1.*",
    "layers.*.post_attention_layernorm.*": "blocks.*.norm2.*",
    "layers.*.self_attn.q_proj.*": "blocks.*.attn.qkv.*",
    "layers.*.self_attn.k_proj.*": "blocks.*.attn.qkv.*",
    "layers.*.self_attn.v_proj.*": "blocks.*.attn.qkv.*",
    "layers.*.self_attn.o_proj.*": "blocks.*.attn.proj.*",
    "layers.*.mlp.up_proj.*": "blocks.*.mlp.fc1.*",
    "layers.*.mlp.down_proj.*": "blocks.*.mlp.fc2.*",
}
"""Names as vision transformers elsewhere have them."""


def model() -> Vla:
    assert isinstance(SPEC.model, Vla)
    return SPEC.model


def values(part: str) -> dict[str, torch.Tensor]:
    """Random weights of a part, by the names that it has itself."""
    generator = torch.Generator().manual_seed(3)
    found = {p.name.removeprefix(f"{part}."): p.shape for p in parameters(model()) if p.name.startswith(f"{part}.")}
    return {name: torch.randn(shape, generator=generator) for name, shape in found.items()}


def read(source: Any, name: str) -> torch.Tensor:
    size = torch.Size(source.shape(name)).numel()
    middle = size // 3
    pieces = [source.read(name, 0, middle), source.read(name, middle, size - middle)]
    return torch.cat(pieces).view(source.shape(name))


def elsewhere(own: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same vision with its patches projected by a convolution, and query, key and value in one tensor."""
    conv = own["patch_embed.weight"].view(32, 4, 4, 3).permute(0, 3, 1, 2).contiguous()
    found = {"embeddings.projection.weight": conv, "embeddings.projection.bias": own["patch_embed.bias"]}
    found["embeddings.position"] = own["embed_positions.weight"]
    found |= {name: own[name] for name in ("embed_views.weight", "norm.weight", "norm.bias")}
    for block in range(2):
        mine, theirs = f"layers.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            rows = [own[f"{mine}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            found[f"{theirs}.attn.qkv.{kind}"] = torch.cat(rows)
            for here, there in (
                *(("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2")),
                *(("self_attn.o_proj", "attn.proj"), ("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2")),
            ):
                found[f"{theirs}.{there}.{kind}"] = own[f"{mine}.{here}.{kind}"]
    return found | {"head.weight": torch.randn(10, 32)}


def test_vision_by_a_map_of_names(tmp_path: Path) -> None:
    own = values("vision")
    save_file(elsewhere(own), tmp_path / "vit.safetensors")
    source = open_parts([PartWeights(part="vision", path=f"{tmp_path}/vit.safetensors", names=VIT)], model())
    assert set(source.names()) == {f"vision.{name}" for name in own}
    for name, value in own.items():
        assert torch.equal(read(source, f"vision.{name}"), value), name
    source.close()


@pytest.mark.parametrize("prefix", ["", "vision."])
def test_vision_under_our_own_names(tmp_path: Path, prefix: str) -> None:
    own = values("vision")
    save_file({f"{prefix}{name}": value for name, value in own.items()}, tmp_path / "model.safetensors")
    source = open_parts([PartWeights(part="vision", path=str(tmp_path))], model())
    assert all(torch.equal(read(source, f"vision.{name}"), value) for name, value in own.items())


def llama(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """A folder of Hugging Face's with the language's weights, and a head that it has no use for."""
    own = values("language")
    folder.mkdir()
    save_file(
        {f"model.{name}": value for name, value in own.items()} | {"lm_head.weight": torch.zeros(61, 32)},
        folder / "model.safetensors",
    )
    language = model().language
    shape = {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "rms_norm_eps": language.norm_eps,
    }
    (folder / "config.json").write_text(json.dumps(shape | config))
    return own


def test_language_as_hugging_face_has_it(tmp_path: Path) -> None:
    own = llama(tmp_path / "llama")
    source = open_parts([PartWeights(part="language", path=f"{tmp_path}/llama")], model())
    assert set(source.names()) == {f"language.{name}" for name in own}
    assert all(torch.equal(read(source, f"language.{name}"), value) for name, value in own.items())
    llama(tmp_path / "other", rope_theta=5e5)
    with pytest.raises(CheckpointError, match=r"`model.language.rope_theta` must be as in the weights of `initialize_"):
        open_parts([PartWeights(part="language", path=f"{tmp_path}/other")], model())


def test_what_a_file_lacks_is_named(tmp_path: Path) -> None:
    found = elsewhere(values("vision"))
    del found["blocks.1.mlp.fc1.bias"]
    found["embeddings.position"] = torch.zeros(17, 32)
    save_file(found, tmp_path / "vit.safetensors")
    one = PartWeights(part="vision", path=f"{tmp_path}/vit.safetensors", names=VIT)
    with pytest.raises(CheckpointError) as caught:
        open_parts([one], model())
    told = str(caught.value)
    assert "`initialize_parts.0` must name every weight of vision" in told
    assert (
        "lacks blocks.1.mlp.fc1.bias" in told
        and "embeddings.position of another shape ([17, 32], not [16, 32])" in told
    )
    with pytest.raises(CheckpointError, match="nowhere"):
        open_parts([PartWeights(part="vision", path=f"{tmp_path}/nowhere")], model())


def test_training_starts_from_them(tmp_path: Path) -> None:
    own = values("vision")
    save_file(elsewhere(own), tmp_path / "vit.safetensors")
    save_file({f"vision.{name}": value for name, value in own.items()}, tmp_path / "own.safetensors")
    curves = []
    vit = {"part": "vision", "path": f"{tmp_path}/vit.safetensors", "names": VIT}
    for parts in ([], [vit], [{"part": "vision", "path": f"{tmp_path}/own.safetensors"}]):
        memory = Memory()
        spec = load_spec(
            str(SPECS / "vla-parity.json"),
            ["max_steps=4", "profile.interval=1", f"initialize_parts={json.dumps(parts)}"],
        )
        with process_from_environment() as process:
            run_job(resolve(spec, 1), process, [memory])
        curves.append([step.loss for step in memory.steps])
    assert curves[0] != curves[1] == curves[2]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ('[{"part":"vision","path":"a"},{"part":"vision","path":"b"}]', 'must name a part once, but names "vision"'),
        ('[{"part":"vision","path":"a","names":{"layers.*":"blocks"}}]', "with as many `*`, and no other wildcard"),
        ('[{"part":"eyes","path":"a"}]', "initialize_parts.0.part"),
    ],
)
def test_what_does_not_fit_is_said(value: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(str(SPECS / "vla-parity.json"), [f"initialize_parts={value}"])
    assert said in str(caught.value)


def test_only_a_vla_has_parts() -> None:
    parts = 'initialize_parts=[{"part":"vision","path":"a"}]'
    with pytest.raises(SpecError, match='`initialize_parts` must be empty for a model of kind "decoder"'):
        load_spec("gpt-stdlib", [parts])
    with pytest.raises(SpecError, match="`initialize_parts` must be empty where `initialize_from` gives all"):
        load_spec(str(SPECS / "vla-parity.json"), [parts, 'initialize_from="b"'])
