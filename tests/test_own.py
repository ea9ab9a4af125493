"""Modules, data sets and losses that a program hands over itself: `scaling.train.run`, and data of a factory."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, python, torchrun

from scaling.data.given import GivenDataset
from scaling.data.loader import validation_batches
from scaling.errors import UserError
from scaling.inventory import blocks, parameters
from scaling.models.recorded import take_inventory
from scaling.objectives import build_objective
from scaling.spec.sections import CausalLM, FactoryModel

EXAMPLE = "launch/own_model.py"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "backends", [("fsdp", "zero2"), pytest.param(("ddp", "zero3"), marks=pytest.mark.long)], ids=" ".join
)
def test_the_example_has_one_curve_on_every_backend_and_goes_on_where_it_stopped(tmp_path, backends):
    short = ("--set", "max_steps=12", "--set", "validation.interval=6", "--set", "profile.interval=1")
    curves = {}
    for backend in ("single", *backends):
        folder = tmp_path / backend
        kind = {"kind": "deepspeed", "zero_stage": int(backend[-1])} if "zero" in backend else {"kind": backend}
        flags = (*short, "--set", f"backend={json.dumps(kind)}", "--run-dir", str(folder))
        done = torchrun(1 if backend == "single" else 2, EXAMPLE, *flags)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        curves[backend] = losses(folder)
    for backend, curve in curves.items():
        assert curve == pytest.approx(curves["single"], rel=1e-5), backend
    assert len(curves["single"]) == 12 and curves["single"][-1] < curves["single"][0] < np.log(256) + 0.1

    record = json.loads((tmp_path / "single" / "validation.jsonl").read_text().splitlines()[-1])
    assert record["unit"] == "samples" and record["tokens"] == 1024

    folder = tmp_path / "again"
    for flags in (("--stop-after", "5", "--set", "backend.kind=fsdp"), ("--set", "backend.kind=single")):
        ranks = 2 if "--stop-after" in flags else 1
        done = torchrun(ranks, EXAMPLE, *short, *flags, "--run-dir", str(folder))
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert losses(folder) == pytest.approx(curves["single"], rel=1e-5)
    for module in ("scaling.report", "scaling.doctor"):  # which find no estimate
        done = python("-m", module, str(folder))
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_module_is_no_way_to_make_one(tmp_path):
    script = tmp_path / "mine.py"
    script.write_text(
        "import sys\nfrom torch import nn\nfrom scaling.train import run\n"
        "sys.exit(run('gpt-stdlib', model=nn.Linear(2, 2)))\n"
    )
    done = python(str(script))
    assert done.returncode == 2 and "`model` must be a class or function that returns the module" in done.stderr
    assert "Traceback" not in done.stderr


SPEC = {
    "name": "own",
    "model": {"kind": "factory", "target": "own_models:mixers", "arguments": {"dropout": 0.0}},
    "data": {"kind": "factory", "target": "own_data:counting", "sequence_length": 16},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
    "optimizer": {"lr": 3e-3},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 6,
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}
ALLOWED = ("--allow-import", "own_models", "--allow-import", "own_data")


def train(folder: Path, changes: dict, *flags: str):
    path = folder / "spec.json"
    path.write_text(json.dumps(SPEC | changes))
    words = ("launch/train.py", "--spec", str(path), "--run-dir", str(folder / "run"), *flags)
    return python(*words, paths=str(ROOT / "tests"))


def test_text_of_a_factory_trains_a_module_that_no_file_describes(tmp_path):
    done = train(tmp_path, {"validation": {"interval": 3, "batches": 1}}, *ALLOWED)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    curve = losses(tmp_path / "run")
    assert curve[-1] < curve[0]
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == {}
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert record["mfu"] is None and record["tokens"] == 4 * 16


@pytest.mark.parametrize(
    ("changes", "flags", "told"),
    [
        ({}, ("--allow-import", "own_models"), "`data.target` must be in a package that --allow-import names"),
        ({}, ("--allow-import", "own_data"), "`model.target` must be in a package that --allow-import names"),
        ({"data": {"kind": "factory", "target": "own_data:endless"}}, ALLOWED, "with `__len__` and `__getitem__`"),
        ({"data": {"kind": "factory", "target": "own_data:empty"}}, ALLOWED, "must have items, but has none"),
        ({"data": {"kind": "factory", "target": "own_data:points"}}, ALLOWED, '`objective.kind` must be "factory"'),
        (
            {
                "data": {"kind": "factory", "target": "own_data:points"},
                "validation": {"interval": 3, "batches": 1},
            },
            ALLOWED,
            "`validation` must be null where own_data:points returns one data set",
        ),
        (
            {
                "model": {"kind": "factory", "target": "own_data:line"},
                "data": {"kind": "factory", "target": "own_data:points"},
                "objective": {"kind": "factory", "target": "own_data:averaged"},
            },
            ALLOWED,
            "must give a number for each sample, of shape [2], but gives []",
        ),
        (
            {"data": {"kind": "synthetic", "sequence_length": 16}},
            ALLOWED,
            '`model.inventory` must be a file for the data "synthetic"',
        ),
    ],
)
def test_mistakes_are_told_without_a_traceback(tmp_path, changes, flags, told):
    done = train(tmp_path, changes, *flags)
    assert done.returncode == 2 and told in done.stderr, done.stdout[-500:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr


def test_an_inventory_wants_a_file(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC))
    done = python("-m", "scaling.inventory", str(path), *ALLOWED, paths=str(ROOT / "tests"))
    assert done.returncode == 2 and "`model.inventory` must be the file to write, but is null" in done.stderr


def test_the_planner_says_what_it_lacks(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC))
    done = python("-m", "scaling.plan", "--spec", str(path), "--gpus", "1xH100-80GB")
    assert done.returncode == 2 and "`model.inventory` must be a file for all but training" in done.stderr


class Points(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"at": torch.tensor([float(index)]), "name": index}


def test_each_item_counts_once_in_validation_whatever_the_ranks():
    dataset = GivenDataset(Points(5), "data")
    for ranks in (1, 2, 3):
        seen: list[float] = []
        for rank in range(ranks):
            for batch in validation_batches(dataset, samples=9, micro_batch=2, rank=rank, world_size=ranks):
                seen += batch.values["at"][batch.counts].flatten().tolist()
        assert sorted(seen) == [0, 1, 2, 3, 4]


def test_each_item_is_one_term():
    dataset = GivenDataset(Points(5), "data")
    assert dataset.terms_per_sample == 1 and dataset.read(np.arange(3)).terms == 3


def test_what_an_item_holds_is_in_the_fingerprint():
    class Others(Points):
        def __getitem__(self, index: int) -> dict:
            return {"at": torch.tensor([index + 1.0]), "name": index}

    Others.__qualname__ = Points.__qualname__
    first, again, other = GivenDataset(Points(5), "a"), GivenDataset(Points(5), "b"), GivenDataset(Others(5), "c")
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert GivenDataset(Points(6), "d").fingerprint != first.fingerprint


def test_losses_of_text_alone_go_with_others_than_a_factorys():
    with pytest.raises(UserError, match=r"`objective.kind` must be \"factory\""):
        build_objective(CausalLM(), by_sample=True)


def test_a_module_that_is_not_known_has_one_block_or_none():
    section = FactoryModel(kind="factory", target="own_data:line")
    take_inventory(section, ("own_data",))
    assert blocks(section) == () and [p.name for p in parameters(section)] == ["0.weight", "0.bias"]
