"""Models that are not this project's own: their inventory file, and the planner that reads it, against the tracer."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, python
from transformers import AutoConfig, AutoModelForCausalLM

from scaling.errors import UserError
from scaling.estimate.compute import block_passes, recorded_passes
from scaling.estimate.flops import structure, train_flops_per_token
from scaling.estimate.ops import FLOAT, Ops, Shape
from scaling.estimate.rates import rates_of
from scaling.estimate.replay import Replay
from scaling.estimate.step import batch_sizes, engine_of, play
from scaling.estimate.tape import Storage, Tape
from scaling.estimate.work import recorded_flops
from scaling.hardware import find_gpu
from scaling.inventory import blocks, parameters, tied
from scaling.inventory.recorded import fingerprint
from scaling.models.build import model_recipe
from scaling.objectives import build_objective
from scaling.recording import Recording, record
from scaling.run import Job, resolve
from scaling.spec import load_spec
from scaling.spec.sections import FactoryModel
from scaling.trace import trace
from scaling.units import WIDTHS

SEQUENCE = 64
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512, "n_positions": 128},
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 512,
        "max_position_embeddings": 128,
    },
    "mixtral": {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 128,
        "num_local_experts": 4,
    },
}
PAIRS = {"kind": "preference", "train": ["pairs.jsonl"], "sequence_length": SEQUENCE}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2 with adapters": {"lora": {"rank": 4, "target_modules": ["c_attn", "c_fc"], "dropout": 0.1}},
    "gpt2 on pairs": {"objective": {"kind": "dpo"}, "data": PAIRS},
}
"""What is trained otherwise of the same models."""
BACKENDS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {"kind": "single"}),
    "ddp": (2, {"kind": "ddp"}),
    "fsdp": (4, {"kind": "fsdp"}),
    **{f"zero{n}": (4, {"kind": "deepspeed", "zero_stage": n, "reduce_bucket_size": 20000}) for n in (1, 2, 3)},
}
OWN_CLASS = "own_models:mixers"


def command(*words: str, folder: Path, paths: str = "") -> subprocess.CompletedProcess[str]:
    return python("-m", *words, folder=folder, paths=paths)


def spec_file(folder: Path, model: dict[str, Any], **more: Any) -> Path:
    path = folder / "spec.json"
    values = {
        "name": "recorded",
        "model": {**model, "inventory": "inventory.json"},
        "data": {"kind": "synthetic", "sequence_length": SEQUENCE},
        "batch": {"global_batch_size": 16, "micro_batch_size": 4, "gradient_accumulation_steps": "auto"},
        "optimizer": {"lr": 1e-4},
        "max_steps": 10,
    }
    path.write_text(json.dumps({**values, **more}))
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of a recorded model, by name."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder = tmp_path_factory.mktemp(name)
            if name == "own":
                still = {"name": "still", "match": ["before.*", "layers.*.inner.*"], "freeze": True}
                frozen = [still, {"name": "rest", "match": ["*"]}]
                spec_file(folder, {"kind": "factory", "target": OWN_CLASS}, param_groups=frozen)
                words = ["--allow-import", "own_models"]
            else:
                (folder / "hf").mkdir()
                (folder / "hf" / "config.json").write_text(json.dumps(CONFIGS[name.partition(" ")[0]]))
                spec_file(folder, {"kind": "huggingface", "path": "hf"}, **VARIANTS.get(name, {}))
                words = []
            done = command("scaling.inventory", "spec.json", *words, folder=folder, paths=str(ROOT / "tests"))
            assert done.returncode == 0, done.stdout + done.stderr
            assert "written: inventory.json" in done.stdout
        return made[name]

    return get


def settings(backend: str, mode: str) -> list[str]:
    return [f"backend={json.dumps(BACKENDS[backend][1])}", f"activation_checkpointing={mode}"]


# ---------------------------------------------------------------- a second derivation of the ledger


def replayed(job: Job, events: list[Any], *, cuda: bool) -> Tape:
    spec, plan, tape = job.spec, job.plan, Tape()
    ops = Ops(tape, Shape(plan.micro_batch, plan.sequence_length, WIDTHS[spec.precision]), cuda=cuda)
    engine = engine_of(spec)(ops, spec, job.groups, job.rendered, plan)
    model = Replay(events, ops, engine)
    held = [Storage(tape, size, "activations") for size in batch_sizes(spec, plan, cuda=cuda)]
    held += [Storage(tape, FLOAT) for _ in range(5)]
    for _ in range(engine.steps):
        for index in range(plan.accumulation):
            engine.begin(last=index == plan.accumulation - 1)
            with tape.during("forward", "activations"):
                model.forward()
            with tape.during("backward", "workspace"):
                model.backward()
                engine.end()
        with tape.during("optimizer", "workspace"):
            engine.step()
    return tape


@pytest.mark.parametrize(("shape", "kernels", "mode"), [("gpt", "gpu", "none"), ("llama", "cpu", "full")])
def test_our_own_models_recorded_are_what_the_ledger_has(shape, kernels, mode):
    """Two derivations of one figure: written op by op, and recorded from torch."""
    tiny = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "vocab_size": 512, "max_position_embeddings": 64, "dropout": 0.1 if kernels == "gpu" else 0.0,
    }  # fmt: skip
    changes = [f"model.{name}={value}" for name, value in tiny.items()]
    changes += ["model.num_key_value_heads=2"] if shape == "llama" else []
    changes += ['batch={"global_batch_size":32,"micro_batch_size":4}', 'data={"kind":"synthetic","sequence_length":64}']
    changes += ["objective.cross_entropy=plain", "compile=false"]
    recipe = {"gpt": "gpt2-124m", "llama": "llama-8b"}[shape]
    events = None
    for backend, (ranks, _) in BACKENDS.items():
        job = resolve(load_spec(recipe, [*changes, *settings(backend, mode)]), ranks)
        if events is None:
            recording = Recording(job.spec, model_recipe(job.spec), (), build_objective(job.spec.objective))
            events, work = record(recording, kernels, mode)
            if mode == "none":
                flops = train_flops_per_token(job.spec.model, SEQUENCE)
                assert recorded_flops(work) / SEQUENCE == pytest.approx(flops, rel=0.001)
        own = play(job.spec, job.plan, job.groups, job.rendered, cuda=kernels == "gpu").peak
        again = replayed(job, events, cuda=kernels == "gpu").peak
        assert again.phase == own.phase, backend
        assert again.bytes == pytest.approx(own.bytes, rel=0.003), backend


@pytest.mark.parametrize(("recipe", "mode"), [("llama-8b", "selective"), ("gpt2-124m", "full")])
def test_time_of_our_own_blocks_recorded_is_what_is_estimated(recipe, mode):
    changes = ["model.num_hidden_layers=2", "objective.cross_entropy=plain", "compile=false", "backend.kind=single"]
    spec = load_spec(recipe, [*changes, f"activation_checkpointing={mode}"])
    recording = Recording(spec, model_recipe(spec), (), build_objective(spec.objective))
    parts = record(recording, "gpu", mode)[1]
    rates, length = rates_of(find_gpu("H100-80GB"), "bf16"), spec.data.sequence_length
    block = structure(spec.model).blocks[-1][0]
    own = block_passes(spec.model, block, 4 * length, length, mode, False, rates)
    found = recorded_passes(next(part for part in reversed(parts) if part["blocks"]), 4, rates)
    assert found.forward.seconds == pytest.approx(own.forward.seconds, rel=0.02)
    assert found.backward.seconds == pytest.approx(own.backward.seconds, rel=0.04)


# ---------------------------------------------------------------- against the tracer

CELLS = [
    ("own", "zero1", "none"),
    ("gpt2", "fsdp", "full"),
]
MORE = [
    (name, backend, mode)
    for name in ("own", *CONFIGS, *VARIANTS)
    for backend in BACKENDS
    for mode in ("none", "selective", "full")
    if (name, backend, mode) not in CELLS
]


def check(folder: Path, backend: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    found = trace(load_spec("spec.json", settings(backend, mode)), BACKENDS[backend][0], ["own_models"])
    held, played = found["memory"], found["predicted"]
    assert played["peak_phase"] == held["peak_phase"]
    assert found["predicted_to_traced"] == pytest.approx(1, abs=0.01)
    parts = {name: size for name, size in played["parts"].items() if name not in ("activations", "logits")}
    for name, size in parts.items():
        if name not in ("framework", "communication"):  # what libraries hold is among the latter there
            assert abs(size - held["parts"].get(name, 0)) <= 0.05 * held["peak_allocated_bytes"], name


@pytest.mark.parametrize(("name", "backend", "mode"), CELLS)
def test_the_replay_is_the_trace(recorded, name, backend, mode, monkeypatch):
    check(recorded(name), backend, mode, monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize(("name", "backend", "mode"), MORE)
def test_the_replay_is_the_trace_under_the_others(recorded, name, backend, mode, monkeypatch):
    check(recorded(name), backend, mode, monkeypatch)


# ---------------------------------------------------------------- the file, and the planner that reads it


def test_names_and_shapes_are_those_of_transformers(recorded, monkeypatch):
    monkeypatch.chdir(recorded("gpt2"))
    model = load_spec("spec.json").model
    with torch.device("meta"):
        real = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("hf"))
    assert [(p.name, p.shape) for p in parameters(model)] == [(n, tuple(p.shape)) for n, p in real.named_parameters()]
    assert tied(model) == (("transformer.wte.weight", "lm_head.weight"),)
    assert blocks(model) == tuple(f"transformer.h.{index}" for index in range(3))


def test_a_module_of_ones_own(recorded, monkeypatch):
    monkeypatch.chdir(recorded("own"))
    model = load_spec("spec.json").model
    assert blocks(model) == ("layers.0", "layers.1", "layers.2")
    assert tied(model) == (("embed.weight", "head.weight"),)
    document = json.loads(Path("inventory.json").read_text())
    assert document["vocab_size"] == 512 and document["buffer_bytes"] == 64 * 4
    still = [f"before.{index}.{name}" for index in range(2) for name in ("bias", "weight")]
    assert document["ledger"]["frozen"] == [*still, *(f"layers.{index}.inner.weight" for index in range(3))]


def test_the_planner_reads_it_without_torch(recorded):
    folder = recorded("own")
    code = (
        "import sys; sys.modules['torch'] = None; from scaling.plan import main; "
        "sys.exit(main(['--spec', 'spec.json', '--gpus', '4xH100-80GB', '--json', 'plan.json', '--explain']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "plan.json").read_text())
    kinds = {(one["backend"]["kind"], one["activation_checkpointing"]) for one in found["candidates"]}
    assert len(kinds) == 9 and all(one["time"]["step_seconds"] > 0 for one in found["candidates"])
    assert found["model"]["parameters"] == sum(p["elements"] for p in _inventory_report(folder))
    assert found["model"]["flops_per_token"] > 6 * 64 * 512  # the head alone


def _inventory_report(folder: Path) -> list[dict[str, Any]]:
    done = command("scaling.spec", "validate", "spec.json", folder=folder)
    assert done.returncode == 0, done.stderr
    document = json.loads((folder / "inventory.json").read_text())
    return [{"elements": torch.Size(one["shape"]).numel()} for one in document["parameters"]]


# ---------------------------------------------------------------- mistakes


def refusal(folder: Path, *words: str, module: str = "scaling.plan") -> str:
    done = command(module, *words, folder=folder, paths=str(ROOT / "tests"))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


PLAN = ("--spec", "spec.json", "--gpus", "4xH100-80GB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["data.sequence_length=32"], "must be recorded for the spec's data.sequence_length (32)"),
        (["precision=fp32"], "must be recorded for the spec's precision (fp32), but 'inventory.json' is for bf16"),
        (['param_groups=[{"name":"all","match":["*"]}]'], "recorded for the spec's frozen parameters"),
        (['model.arguments={"layers": 4}'], "it was made for another model"),
        (["model.inventory=absent.json"], "there is none; run that"),
        (["model.inventory=spec.json"], "it is no such file"),
        (['lora={"rank": 4}'], '`lora` must be null for a model of kind "factory"'),
        (
            ["objective.kind=behaviour_cloning"],
            '`objective.kind` must be "causal_lm", "sft" or "dpo" for a model of kind "factory"',
        ),
    ],
)
def test_what_does_not_go_with_the_file_is_refused(recorded, change, message):
    folder = recorded("own")
    told = refusal(folder, *PLAN, *(word for one in change for word in ("--set", one)))
    assert message in told and len(told.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("own_models:no_blocks", "`model` must have blocks"),
        ("own_models:no_logits", "`model` must return logits, [batch, sequence, vocabulary], for token ids"),
        ("own_models:no_module", "`model.target` must return an nn.Module, but own_models:no_module returns a str"),
        ("own_models:absent", "`model.target` must be a function, but absent of own_models is not"),
        ("own_models:by_batch", "`model` must do the same for any number of sequences"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path, target, message):
    spec_file(tmp_path, {"kind": "factory", "target": target})
    words = ("spec.json", "--allow-import", "own_models")
    assert message in refusal(tmp_path, *words, module="scaling.inventory")
    assert not (tmp_path / "inventory.json").exists()


def test_code_is_imported_only_where_it_is_allowed(tmp_path):
    spec_file(tmp_path, {"kind": "factory", "target": OWN_CLASS})
    assert "`model.target` must be in a package that --allow-import names" in refusal(
        tmp_path, "spec.json", module="scaling.inventory"
    )


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    spec_file(tmp_path, {"kind": "huggingface", "path": "absent"})
    told = refusal(tmp_path, "spec.json", module="scaling.inventory")
    assert "`model.path` must be a folder with a config.json" in told


def test_what_a_factory_is_given_is_not_in_the_file(recorded, monkeypatch):
    monkeypatch.chdir(recorded("own"))
    model = load_spec("spec.json").model
    assert isinstance(model, FactoryModel)
    text = Path("inventory.json").read_text()
    assert fingerprint(model) in text and model.target not in text
    assert fingerprint(model.model_copy(update={"arguments": {"token": "secret"}})) not in text


def test_a_file_of_another_version_is_refused(recorded, tmp_path):
    document = json.loads((recorded("own") / "inventory.json").read_text())
    path = tmp_path / "old.json"
    path.write_text(json.dumps(document | {"schema_version": 0}))
    spec = load_spec(str(recorded("own") / "spec.json"), [f"model.inventory={path}"])
    with pytest.raises(UserError, match="its version is 0, not 1"):
        parameters(spec.model)
