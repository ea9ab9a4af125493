"""A vla whose vision and language are models of transformers."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import python
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageClassification

from scaling.checkpoint.weights import open_weights
from scaling.data.build import build_datasets
from scaling.errors import CheckpointError, UserError
from scaling.inventory import blocks, parameters, sample_length, seen_shape, words
from scaling.models.build import model_recipe
from scaling.models.recorded import look_at
from scaling.rollout import main as roll_out
from scaling.spec import Spec, load_spec
from scaling.trace import trace
from scaling.train import main

VIEWS, PIXELS = 2, 32
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
SEEN = {**SMALL, "image_size": PIXELS, "patch_size": 8}
READ = {**SMALL, "vocab_size": 256, "max_position_embeddings": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "vit": {"model_type": "vit", **SEEN, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "dinov2": {"model_type": "dinov2", **SEEN, "mlp_ratio": 2},
    "resnet": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 64], "depths": [1, 1]},
    "clip": {"model_type": "clip", "vision_config": SEEN, "text_config": {**READ, **ENDS}},
    "siglip": {"model_type": "siglip", "vision_config": SEEN, "text_config": READ},
    "llama": {"model_type": "llama", **READ, "num_key_value_heads": 2},
    "bert": {"model_type": "bert", **READ, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {
        "model_type": "t5",
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 256,
        "dropout_rate": 0.0,
    },
}
KINDS: dict[str, Any] = {"vit": AutoModelForImageClassification, "llama": AutoModelForCausalLM}
"""What was saved, where that has a head."""
OWN: dict[str, dict[str, Any]] = {
    "vision": {"kind": "vit", **SEEN, "views": VIEWS},
    "language": {"kind": "decoder", **READ},
}
BATCH = {"global_batch_size": 8, "micro_batch_size": 2}
STILL = [{"name": "vision", "match": ["vision.*"], "freeze": True}, {"name": "rest", "match": ["*"]}]


def saved(folder: Path, name: str, *, weights: bool = True) -> Path:
    """A model of random weights as transformers saves it, twenty times as wide as it would have them."""
    to = folder / name
    values = dict(CONFIGS[name])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(3)
    if weights:
        model = KINDS.get(name, AutoModel).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, 0.0, 0.2)
        model.save_pretrained(to)
    else:
        config.save_pretrained(to)
    return to


def made(folder: Path, vision: str | None, language: str | None, *, weights: bool = True, **more: Any) -> Path:
    """A spec of these models; None: a part of our own."""
    parts: dict[str, Any] = dict(OWN)
    if vision is not None:
        path = str(saved(folder, vision, weights=weights))
        parts["vision"] = {"kind": "huggingface", "path": path, "image_size": PIXELS, "views": VIEWS}
    if language is not None:
        parts["language"] = {"kind": "huggingface", "path": str(saved(folder, language, weights=weights))}
    model = {"kind": "huggingface_vla", **parts, "fusion": SMALL}
    model["action"] = {"action_dim": 2, "chunk_size": 4, "state_dim": 6}
    spec = {
        "name": "vla",
        "model": model,
        "objective": {"kind": "behaviour_cloning"},
        "data": {"kind": "synthetic", "sequence_length": 12, "masked_fraction": 0.3},
        "batch": BATCH,
        "optimizer": {"lr": 1e-3},
        "param_groups": STILL,
        "precision": "fp32",
        "backend": {"kind": "single"},
        "max_steps": 6,
        "profile": {"interval": 1},
        "tracking": {"tensorboard": False},
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec | more))
    return path


def opened(path: Path, *changes: str) -> Spec:
    spec = load_spec(str(path), changes)
    look_at(spec.model, ())
    return spec


def filled(spec: Spec) -> nn.Module:
    """The module as training begins with it."""
    recipe = model_recipe(spec, filled=True)
    module = recipe.build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(recipe.initial_value(name, parameter.shape))
    buffers = recipe.buffers()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, buffers[name])
    return module.eval()


PAIRS = [("vit", "bert"), ("clip", "llama"), ("siglip", "clip"), ("dinov2", "t5"), ("resnet", None), (None, "llama")]


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_parts_see_and_read_as_transformers_does(tmp_path: Path, vision: str | None, language: str | None) -> None:
    spec = opened(made(tmp_path, vision, language))
    module = filled(spec)
    batch = build_datasets(spec)[0].read(np.arange(3))
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [
        (p.name, p.shape) for p in parameters(spec.model)
    ]
    with torch.no_grad():
        seen, read = module.vision(batch.images), module.language(batch.instruction)
        if vision is not None:
            theirs = AutoModel.from_pretrained(tmp_path / vision).eval()
            theirs = getattr(theirs, "vision_model", theirs)
            pixels = (batch.images.float() / 127.5 - 1).movedim(-1, 2)
            views = [theirs(pixel_values=pixels[:, view]).last_hidden_state for view in range(VIEWS)]
            views = [one.flatten(2).mT if one.dim() == 4 else one for one in views]
            torch.testing.assert_close(seen, torch.cat(views, dim=1))
        if language is not None:
            theirs = AutoModel.from_pretrained(tmp_path / language).eval()
            theirs = theirs.get_encoder() if language == "t5" else getattr(theirs, "text_model", theirs)
            torch.testing.assert_close(read, theirs(input_ids=batch.instruction).last_hidden_state)
        assert module(batch.images, batch.instruction, batch.state).shape == (3, 4, 2)
    assert seen_shape(spec.model) == tuple(seen.shape[1:]) and words(spec.model) == 256
    assert sample_length(spec) == seen.shape[1] + 12 + 4


@pytest.mark.parametrize(("vision", "language"), PAIRS)
def test_what_a_step_never_reads_is_left_out(tmp_path: Path, vision: str | None, language: str | None) -> None:
    """So that every parameter has a gradient, as DDP wants it."""
    spec = opened(made(tmp_path, vision, language, weights=False))
    module = filled(spec).train()
    batch = build_datasets(spec)[0].read(np.arange(2))
    module(batch.images, batch.instruction, batch.state).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_pixels_are_as_the_folder_says(tmp_path: Path) -> None:
    path = made(tmp_path, "vit", None)
    said = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(said))
    module = filled(opened(path))
    images = torch.randint(256, (1, VIEWS, PIXELS, PIXELS, 3), dtype=torch.uint8)
    pixels = (images[0].float() / 255 - torch.tensor(said["image_mean"])) / torch.tensor(said["image_std"])
    with torch.no_grad():
        wanted = module.vision.model(pixel_values=pixels.movedim(-1, 1)).last_hidden_state
        torch.testing.assert_close(module.vision(images)[0], wanted.flatten(0, 1))


@pytest.mark.parametrize(
    ("vision", "language", "changes"),
    [
        ("clip", "llama", {}),
        pytest.param("vit", "t5", {"param_groups": [{"name": "all", "match": ["*"]}]}, marks=pytest.mark.long),
        pytest.param(
            *("siglip", None, {"objective": {"kind": "behaviour_cloning", "loss": "flow_matching"}}),
            marks=pytest.mark.long,
        ),
    ],
)
def test_one_curve_under_every_backend(
    tmp_path: Path, vision: str, language: str | None, changes: dict[str, Any]
) -> None:
    path = made(tmp_path, vision, language, **changes)
    if "objective" in changes:
        document = json.loads(path.read_text())
        document["model"]["action"]["head"] = "velocity"
        path.write_text(json.dumps(document))
    sizes, backends = ("1,2", "single,fsdp,zero2") if changes else ("2", "single,ddp,fsdp,zero2,zero3")
    command = ("-m", "scaling.parity", "--spec", str(path), "--world-sizes", sizes, "--backends", backends)
    done = python(*command, "--steps", "5")
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------- known before


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a spec whose model has an inventory file."""
    folder = tmp_path_factory.mktemp("recorded")
    changes = {"precision": "bf16", "batch": BATCH | {"global_batch_size": 16}}
    path = made(folder, "clip", "bert", weights=False, **changes)
    document = json.loads(path.read_text())
    document["model"]["inventory"] = "inventory.json"
    path.write_text(json.dumps(document))
    done = python("-m", "scaling.inventory", "spec.json", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


ZERO: dict[str, Any] = {"kind": "deepspeed", "reduce_bucket_size": 20000}


@pytest.mark.parametrize(
    ("backend", "ranks", "mode"),
    [
        ({"kind": "single"}, 1, "none"),
        pytest.param({"kind": "fsdp"}, 4, "full", marks=pytest.mark.long),
        pytest.param({"kind": "fsdp", "frozen": "replicate"}, 4, "none", marks=pytest.mark.long),
        pytest.param(ZERO | {"zero_stage": 2}, 4, "none", marks=pytest.mark.long),
        pytest.param(ZERO | {"zero_stage": 3}, 4, "none", marks=pytest.mark.long),
    ],
)
def test_memory_is_known_before(recorded: Path, backend: dict[str, Any], ranks: int, mode: str, monkeypatch) -> None:
    monkeypatch.chdir(recorded)
    settings = [f"backend={json.dumps(backend)}", f"activation_checkpointing={mode}"]
    found = trace(load_spec("spec.json", settings), ranks)
    assert found["predicted_to_traced"] == pytest.approx(1, abs=0.01)


def test_the_planner_reads_the_file_without_torch(recorded: Path, monkeypatch) -> None:
    code = "import sys; sys.modules['torch'] = None; from scaling.plan import main; sys.exit(main())"
    words = ("--spec", "spec.json", "--gpus", "4xH100-80GB", "--json", "p.json")
    done = python("-c", code, *words, folder=recorded)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.chdir(recorded)
    model = load_spec("spec.json").model
    planned = json.loads(Path("p.json").read_text())["model"]
    assert planned["parameters"] == sum(p.elements for p in parameters(model))
    parts = ("vision.model.encoder.layers", "language.model.encoder.layer", "fusion.layers")
    assert blocks(model) == tuple(f"{part}.{index}" for part in parts for index in range(2))


# ---------------------------------------------------------------- a run


def test_demonstrations_are_learnt_from_kept_features(tmp_path: Path, monkeypatch, capsys) -> None:
    """With a checkpoint in between; then the policy is tried, and exported."""
    monkeypatch.chdir(tmp_path)
    data = {"kind": "episodes", "train": ["simulated-arm"], "simulated_episodes": 12, "sequence_length": 24}
    path = made(
        tmp_path, "dinov2", "bert", data=data, checkpoint={"interval": 3}, validation={"interval": 3, "batches": 1}
    )
    curves: list[list[float]] = []
    for name, change in (("seen", "data.cache_features=false"), ("kept", "data.cache_features=true")):
        words = ["--spec", str(path), "--set", f"name={name}", "--set", change]
        assert main([*words, "--stop-after", "3"]) == 0 and main(words) == 0
        lines = map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if line.get("kind", "train") == "train" and "loss" in line])
    assert len(curves[0]) == 6 and curves[0] == curves[1]
    spec = opened(path)
    frozen = [name for name, _ in filled(spec).named_parameters() if name.startswith("vision.")]
    start = model_recipe(spec, filled=True)
    with closing(open_weights(Path("runs/kept/checkpoints/step-00000006"), spec.model)) as weights:
        for name in frozen:
            shape = next(torch.Size(p.shape) for p in parameters(spec.model) if p.name == name)
            assert torch.equal(weights.read(name, 0, shape.numel()).view(shape), start.initial_value(name, shape))
    assert roll_out(["runs/kept", "--trials", "3", "--json", "trials.json"]) == 0
    assert json.loads(Path("trials.json").read_text())["trials"] == 3
    capsys.readouterr()


# ---------------------------------------------------------------- what is refused


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path, "vit", "bert")
    for part, message in (("vision", "an image model of, but"), ("language", "a language model of, but")):
        other = {"vision": "bert", "language": "vit"}[part]
        with pytest.raises(UserError, match=message) as raised:
            opened(path, f"model.{part}.path={tmp_path / other}")
        assert f"`model.{part}.path`" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"`model\.vision\.path` must be a folder with a config.json"):
        opened(path, "model.vision.path=no/such")


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    spec = opened(made(tmp_path, "vit", None))
    file = tmp_path / "vit" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("cls_token"))
    save_file({name: value for name, value in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"must have embeddings\.cls_token, but have no such tensor"):
        filled(spec)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="must be whole"):
        filled(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.vision", "model.language"], '`model.kind` must be "vla"'),
        (["lora"], "`lora` must be null"),
        (["parts"], "`initialize_parts` must be empty"),
        (["curriculum"], "`data.sequence_curriculum` must be null"),
    ],
)
def test_what_does_not_go_together(tmp_path: Path, changes: list[str], message: str) -> None:
    values = {
        "model.vision": f"model.vision={json.dumps(OWN['vision'])}",
        "model.language": f"model.language={json.dumps(OWN['language'])}",
        "lora": 'lora={"rank": 4}',
        "parts": 'initialize_parts=[{"part": "vision", "path": "x"}]',
        "curriculum": 'data.sequence_curriculum={"min_length": 4, "steps": 2}',
    }
    path = made(tmp_path, "vit", "bert", weights=False)
    with pytest.raises(UserError) as raised:
        load_spec(str(path), [values[change] for change in changes])
    assert message in str(raised.value)
