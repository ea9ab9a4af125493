"""Models that are not this project's own, trained: from their weights or their own initial values, on every backend."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, python, torchrun
from transformers import AutoConfig, AutoModelForCausalLM

from scaling.data.build import build_datasets
from scaling.data.order import sample_indices
from scaling.errors import CheckpointError
from scaling.models.build import model_recipe
from scaling.spec import load_spec

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": {"model_type": "llama", **SMALL, "num_key_value_heads": 2, "vocab_size": 256},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64},
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
SPEC = {
    "name": "other",
    "data": {"kind": "synthetic", "sequence_length": 32, "masked_fraction": 0.3},
    "batch": {"global_batch_size": 8, "micro_batch_size": 2},
    "optimizer": {"lr": 3e-3},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 10,
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


def made(folder: Path, name: str, *, weights: bool, **more) -> Path:
    """A spec of a model in a folder, recorded; with weights twenty times as wide as transformers would have them."""
    values = CONFIGS[name] | (dict.fromkeys(DROPOUTS, 0.0) if name == "gpt2" else {})
    (folder / "hf").mkdir()
    if weights:
        torch.manual_seed(3)
        kind = values.pop("model_type")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values, initializer_range=0.4))
        model.save_pretrained(folder / "hf")
    else:
        (folder / "hf" / "config.json").write_text(json.dumps(values))
    section = {"kind": "huggingface", "path": str(folder / "hf"), "inventory": str(folder / "inventory.json")}
    return recorded(folder, SPEC | {"model": section} | more)


def recorded(folder: Path, values: dict, *flags: str, paths: str = "") -> Path:
    path = folder / "spec.json"
    path.write_text(json.dumps(values))
    done = python("-m", "scaling.inventory", str(path), *flags, paths=paths)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.long)])
def test_it_starts_from_the_weights_in_its_folder_on_every_backend(tmp_path, name):
    path = made(tmp_path, name, weights=True)
    out = tmp_path / "parity.json"
    command = ("-m", "scaling.parity", "--spec", str(path), "--world-sizes", "2", "--steps", "6", "--json", str(out))
    done = python(*command, "--backends", "single,fsdp,zero3")
    assert done.returncode == 0, done.stdout + done.stderr
    curve = [step["loss"] for step in json.loads(out.read_text())["curves"][0]["steps"]]
    assert curve[-1] < curve[0]

    spec = load_spec(str(path))
    batch = build_datasets(spec)[0].read(sample_indices(0, 8, spec.data.samples, spec.seed))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(batch.inputs).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=-100)
    assert curve[0] == pytest.approx(float(expected), rel=1e-5)
    assert float(expected) > 1.2 * np.log(256), "weights of one's own must show"


@pytest.mark.long
def test_without_weights_it_starts_from_transformers_values_and_moves_between_backends(tmp_path):
    path = made(tmp_path, "llama", weights=False)
    run, whole = tmp_path / "run", tmp_path / "whole"
    fsdp = ("--set", 'backend={"kind":"fsdp"}')
    for folder, flags in ((whole, fsdp), (run, (*fsdp, "--stop-after", "5")), (run, ())):
        processes = 2 if flags else 1
        done = torchrun(processes, "launch/train.py", "--spec", str(path), "--run-dir", str(folder), *flags)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5) and len(losses(run)) == 10
    assert abs(losses(whole)[0] - np.log(256)) < 0.2, "as good as guessing at the start"


@pytest.mark.long  # in CI: the example of tests/test_own.py
@pytest.mark.parametrize("backend", ["fsdp", "ddp"])
def test_a_module_of_ones_own_trains_from_its_own_values(tmp_path, backend):
    section = {"kind": "factory", "target": "own_models:mixers", "arguments": {"dropout": 0.0}}
    section["inventory"] = str(tmp_path / "inventory.json")
    flags, paths = ("--allow-import", "own_models"), str(ROOT / "tests")
    path = recorded(tmp_path, SPEC | {"model": section}, *flags, paths=paths)
    curves = []
    for number, kind in enumerate(("single", backend)):
        run = tmp_path / kind
        words = ("launch/train.py", "--spec", str(path), "--run-dir", str(run), "--set", f"backend.kind={kind}")
        done = torchrun(2 if number else 1, *words, *flags, paths=paths)
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
        curves.append(losses(run))
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[0][-1] < curves[0][0]


def test_weights_that_are_not_the_models_are_refused(tmp_path):
    path = made(tmp_path, "llama", weights=True)
    recipe = model_recipe(load_spec(str(path)), filled=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(CheckpointError, match=r"q_proj.weight is \[32, 32\] there and \[32, 16\] here"):
        recipe.initial_value(name, torch.Size([32, 16]))
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="must be whole safetensors"):
        model_recipe(load_spec(str(path)), filled=True).initial_value(name, torch.Size([32, 32]))


def test_instructions_teach_it(tmp_path):
    chats = [{"instruction": f"{index}?", "response": "yes " * (index % 4 + 1)} for index in range(64)]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chats)))
    data = {"kind": "chat", "train": [str(tmp_path / "chat.jsonl")], "validation": 0, "sequence_length": 96}
    data |= {"packing": False, "cache": str(tmp_path / "cache")}
    path = made(tmp_path, "llama", weights=True, data=data, objective={"kind": "sft"})
    run = tmp_path / "run"
    zero2 = ("--set", 'backend={"kind":"deepspeed","zero_stage":2}')
    done = torchrun(2, "launch/train.py", "--spec", str(path), "--run-dir", str(run), *zero2)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert losses(run)[-1] < 0.8 * losses(run)[0]
