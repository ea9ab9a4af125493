"""Frozen parts cut over the ranks or whole on each: one curve, frozen weights bit for bit, checkpoints that move."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SPECS, python, torchrun
from test_lora import metrics, saved

from scaling.groups import resolve_groups
from scaling.inventory import parameters
from scaling.models.build import model_recipe
from scaling.render import render
from scaling.spec import change_spec, load_spec
from scaling.train import main

LORA = {"rank": 4, "alpha": 6, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"]}
FSDP, ZERO3 = ({"kind": "fsdp"}, {"kind": "deepspeed", "zero_stage": 3})
WHOLE = {"frozen": "replicate"}


@pytest.mark.long
@pytest.mark.parametrize(
    ("spec", "changes"),
    [
        pytest.param("atlas-vla-tiny", (), id="vision and language frozen"),
        pytest.param(
            str(SPECS / "gpt-parity.json"),
            (f"lora={json.dumps(LORA)}", "optimizer.lr=0.003", "activation_checkpointing=full"),
            id="adapters, tied embeddings, recomputed",
        ),
        pytest.param(
            str(SPECS / "llama-parity.json"),
            (f"lora={json.dumps(LORA)}", "optimizer.lr=0.003", "activation_checkpointing=selective", "compile=true"),
            id="adapters, compiled",
        ),
    ],
)
def test_curves_agree(spec: str, changes: tuple[str, ...], tmp_path: Path) -> None:
    sets = [text for change in ("precision=fp32", *changes) for text in ("--set", change)]
    command = ["-m", "scaling.parity", "--spec", spec, *sets, "--json", str(tmp_path / "out")]
    names = "single,fsdp,fsdp-replicate,zero3,zero3-replicate"
    done = python(*command, "--backends", names, "--world-sizes", "2", "--steps", "4", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    report = json.loads((tmp_path / "out").read_text())
    assert report["agree"] and report["tolerance"] == 1e-5 and len(report["curves"]) == 5


def test_a_run_moves_between_both_and_what_is_frozen_stays(tmp_path: Path) -> None:
    """FSDP2 whole, ZeRO-3 whole, FSDP2 cut, one process: the curve of an undisturbed one."""
    source = str(SPECS / "vla-parity.json")
    frozen = [{"name": "still", "match": ["vision.*", "language.*"], "freeze": True}]
    groups = f"param_groups={json.dumps([*frozen, {'name': 'rest', 'match': ['*']}])}"
    sets = [groups, "max_steps=8", "profile.interval=1", 'checkpoint={"interval":2}', "tracking.tensorboard=false"]
    words = [word for setting in sets for word in ("--set", setting)]
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    assert main(["--spec", source, "--run-dir", str(whole), *words]) == 0
    for stop, backend in ((2, FSDP | WHOLE), (4, ZERO3 | WHOLE), (6, FSDP)):
        command = ["launch/train.py", "--spec", source, "--run-dir", str(moved), *words, "--stop-after", str(stop)]
        done = torchrun(2, *command, "--set", f"backend={json.dumps(backend)}", timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert main(["--spec", source, "--run-dir", str(moved), *words]) == 0
    curve = metrics(whole)
    assert metrics(moved) == {step: pytest.approx(values, rel=1e-5) for step, values in curve.items()}
    assert_untouched(load_spec(source, sets), moved, 8)


@pytest.mark.parametrize(
    "backend", [pytest.param(FSDP, id="fsdp", marks=pytest.mark.long), pytest.param(ZERO3, id="zero3")]
)
def test_from_training_in_bf16_to_an_export(backend: dict[str, Any], tmp_path: Path) -> None:
    """Frozen weights are computed with in 16 bits, and come out as they went in."""
    source, run, out = str(SPECS / "gpt-parity.json"), tmp_path / "run", tmp_path / "out"
    sets = ["max_steps=2", "schedule.warmup_steps=1", "precision=bf16", f"backend={json.dumps(backend | WHOLE)}"]
    words = [word for setting in sets for word in ("--set", setting)]
    done = torchrun(2, "launch/train.py", "--spec", source, *words, "--run-dir", str(run))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_untouched(load_spec(source, sets), run, 2)
    done = python("-m", "scaling.export", str(run), "--to", str(out))
    assert done.returncode == 0, done.stderr
    assert "step-00000002" in done.stdout and list(out.glob("*.safetensors"))


def assert_untouched(spec: Any, run: Path, step: int) -> None:
    """What is frozen has its initial values, bit for bit, and all else has others."""
    shapes = {p.name: torch.Size(p.shape) for p in parameters(spec.model, spec.lora)}
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    frozen = {name for group in groups if group.frozen for name in group.names}
    assert frozen and frozen != shapes.keys()
    recipe, masters = model_recipe(spec), saved(run, step)
    same = {
        name
        for name, shape in shapes.items()
        if torch.equal(masters[f"master/{name}"].view(shape), recipe.initial_value(name, shape))
    }
    assert same == frozen


def test_the_policy_is_rendered_and_null_is_what_was() -> None:
    spec = load_spec("atlas-vla-tiny")

    def policy(**backend: Any) -> str:
        return render(change_spec(spec, backend=backend), 2)["frozen"]

    assert policy(kind="fsdp") == policy(kind="fsdp", frozen="shard") == "shard"
    assert policy(kind="fsdp", frozen="replicate") == "replicate"
    assert not change_spec(spec, backend={"kind": "ddp"}).backend.shards_frozen
    stages = [change_spec(spec, backend={"kind": "deepspeed", "zero_stage": stage}) for stage in (1, 2, 3)]
    assert [one.backend.shards_frozen for one in stages] == [False, False, True]
