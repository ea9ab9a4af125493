"""Sequences that grow: their lengths, what becomes of tokens and samples, resuming, and what the planner makes of it.

That the curve is the same on every backend and number of ranks, `test_parity.py` shows.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import TINY_MODEL

from scaling.batch import resolve_batch
from scaling.data.loader import step_batches
from scaling.data.synthetic import SyntheticDataset
from scaling.errors import UserError
from scaling.estimate.flops import train_flops_per_token
from scaling.estimate.report import run_report
from scaling.groups import resolve_groups
from scaling.inventory import parameters
from scaling.profile.recorder import Recorder, StepResult, Yardsticks
from scaling.profile.sinks import Memory
from scaling.records import BatchPlan, Progress
from scaling.render import render
from scaling.schedule import growth, length_at
from scaling.spec import load_spec
from scaling.spec.sections import SyntheticData
from scaling.train import main

CPU = torch.device("cpu")
SPEC = {
    "name": "tiny",
    "model": TINY_MODEL | {"max_position_embeddings": 32, "dropout": 0.1},
    "data": {
        "kind": "tokens",
        "train": [],
        "sequence_length": 32,
        "sequence_curriculum": {"min_length": 4, "steps": 6},
    },
    "batch": {"global_batch_tokens": 128, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-2},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 9,
    "validation": {"interval": 9, "batches": 1},
    "checkpoint": {"interval": 3},
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


def synthetic(longest: int, shortest: int, steps: int) -> SyntheticData:
    curriculum = {"min_length": shortest, "steps": steps}
    return SyntheticData.model_validate(
        {"kind": "synthetic", "sequence_length": longest, "sequence_curriculum": curriculum}
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokens")
    np.save(folder / "tokens.npy", np.random.default_rng(1).integers(0, 64, 4000, dtype=np.uint16))
    spec = SPEC | {"data": SPEC["data"] | {"train": [str(folder / "tokens.npy")]}}
    (folder / "spec.json").write_text(json.dumps(spec))
    return str(folder / "spec.json")


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("longest", "shortest", "steps"), [(1024, 64, 1000), (1536, 64, 777), (64, 8, 3), (90, 9, 50), (16, 1, 1)]
)
def test_the_length_is_the_longest_that_the_line_has_reached(longest, shortest, steps):
    at = length_at(synthetic(longest, shortest, steps))
    legal = [length for length in range(shortest, longest + 1, shortest) if longest % length == 0]
    for step in range(steps + 5):
        reached = shortest + (longest - shortest) * min(steps, step) // steps
        assert at(step) == max(length for length in legal if length <= reached), step
    assert at(0) == shortest and at(steps) == at(10 * steps) == longest


def test_lengths_of_a_usual_run():
    assert growth(synthetic(1024, 64, 1000)) == ((0, 64), (67, 128), (200, 256), (467, 512), (1000, 1024))
    assert growth(SyntheticData.model_validate({"kind": "synthetic", "sequence_length": 48})) == ((0, 48),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "min_length=5",
            "`data.sequence_curriculum.min_length` must divide data.sequence_length (32) and be less, but is 5; "
            "use 4 or 8",
        ),
        ("min_length=32", "and be less, but is 32; use 16"),
        ("min_length=64", "and be less, but is 64; use 16"),
        (
            "steps=10",
            "`data.sequence_curriculum.steps` must be at most max_steps (9), but is 10; shorten it or train longer",
        ),
        ("steps=0", "`data.sequence_curriculum.steps` must be"),
    ],
)
def test_what_cannot_be_is_refused_in_one_message(path, change, message):
    with pytest.raises(UserError) as error:
        load_spec(path, [f"data.sequence_curriculum.{change}"])
    assert message in str(error.value) and str(error.value).count(" must ") == 1


def test_a_run_in_epochs_must_be_long_enough_too(path, tmp_path, capsys):
    sets = ["--set", "max_steps=null", "--set", "epochs=1", "--set", "data.sequence_curriculum.steps=99"]
    assert main(["--spec", path, "--run-dir", str(tmp_path / "run"), *sets]) == 2
    assert "must be at most the steps of the run (29), but is 99" in capsys.readouterr().err


# ---------------------------------------------------------------- tokens and samples


def test_a_step_has_the_same_tokens_and_targets_at_every_length_and_number_of_ranks():
    dataset = SyntheticDataset(3, 0, 50, 16, 64, masked_fraction=0.3)
    places, pieces = [0, 8, 16], [4, 2, 1]

    def read(ranks: int, cut: list[int] | None) -> list[list]:
        """For each step the micro-batches in the order of their samples."""
        settings = {"seed": 5, "micro_batch": 2, "accumulation": 4 // ranks, "world_size": ranks, "device": CPU}
        streams = [step_batches(dataset, **settings, rank=r, first_samples=places, pieces=cut) for r in range(ranks)]
        by_step = zip(*map(list, streams), strict=True)
        return [[batch for micro_step in zip(*by_rank, strict=True) for batch in micro_step] for by_rank in by_step]

    whole = read(1, None)
    for ranks in (1, 2):
        for count, batches, uncut in zip(pieces, read(ranks, pieces), whole, strict=True):
            assert {batch.inputs.shape for batch in batches} == {(2 * count, 16 // count)}
            for name in ("inputs", "targets"):
                ours, theirs = (torch.cat([getattr(one, name).flatten() for one in some]) for some in (batches, uncut))
                assert torch.equal(ours, theirs)
            assert sum(batch.terms for batch in batches) == sum(batch.terms for batch in uncut)


def test_a_run_counts_as_it_would_anyway_and_goes_on_in_the_midst_of_the_growth(path, tmp_path, capsys):
    """To the bit, in what it records."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(["--spec", path, "--run-dir", str(whole)]) == 0
    out = capsys.readouterr().out
    assert "sequences grow: 4 tokens from step 1, 8 tokens from step 2, 16 tokens from step 4, 32 tokens from" in out
    found = rows(whole)
    assert [row["sequence_length"] for row in found] == [4, 8, 8, 16, 16, 16, 32, 32, 32]
    assert [(row["tokens"], row["samples_seen"]) for row in found] == [(128 * s, 4 * s) for s in range(1, 10)]
    assert main(["--spec", path, "--run-dir", str(parts), "--stop-after", "5"]) == 0
    assert "step 5/5" in capsys.readouterr().out
    assert main(["--spec", path, "--run-dir", str(parts), "--log-level", "warning"]) == 0
    assert "step 9/9" not in capsys.readouterr().out, "the log level leaves out what is no warning"
    keys = ("step", "loss", "grad_norm", "tokens", "samples_seen", "sequence_length")
    assert [[row[key] for key in keys] for row in rows(parts)] == [[row[key] for key in keys] for row in found]
    last = [json.loads((folder / "validation.jsonl").read_text().splitlines()[-1])["loss"] for folder in (whole, parts)]
    assert last[0] == last[1]


# ---------------------------------------------------------------- speed and memory


class Alone:
    rank, world_size, device = 0, 1, CPU

    def sum_over_ranks(self, value):
        return value

    def gather_objects(self, value):
        return [value]


def test_mfu_is_of_the_lengths_that_the_steps_had():
    kept, data = Memory(), synthetic(16, 4, 6)
    assert growth(data) == ((0, 4), (2, 8), (6, 16))
    plan = BatchPlan(global_batch=8, micro_batch=8, accumulation=1, world_size=1, sequence_length=16)
    sticks = Yardsticks(4e9, 1e9, None, {4: 5e8, 8: 1e9, 16: 4e9})
    taker = Recorder([kept], plan, Alone(), sticks, interval=4, first_step=0, last_step=8, length=length_at(data))
    for step in range(1, 9):
        taker.begin(step)
        result = StepResult(torch.zeros(3), 1.0, torch.tensor(1.0))
        taker.step(Progress(step, step * 8, step * 128), (step - 1) * 8, result, lr={"all": 0.1}, loss_scale=1.0)
    taker.close()
    assert [(record.step, record.sequence_length) for record in kept.steps] == [(4, 8), (8, 16)]
    # The first tells of steps 3 and 4 (before them it warms up), the second of two short ones and two long ones.
    for record, flops in zip(kept.steps, (1e9, 2.5e9), strict=True):
        assert record.mfu == pytest.approx(record.tokens_per_second * flops / 1e9)


def test_the_planner_takes_memory_at_the_longest_and_time_over_the_run():
    curriculum, found = 'data.sequence_curriculum={"min_length": 256, "steps": 30000}', {}
    for name, changes in {"plain": [], "grows": [curriculum]}.items():
        spec = load_spec("gpt2-124m", ['backend={"kind": "ddp"}', "batch.micro_batch_size=8", *changes])
        groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
        plan, config = resolve_batch(spec, 8), render(spec, 8)
        found[name] = run_report(spec, plan, groups, config, "NVIDIA H100 80GB HBM3", 8)
    assert found["plain"]["memory"] == found["grows"]["memory"]
    plain, grows = found["plain"]["time"], found["grows"]["time"]
    assert plain["mean_step_seconds"] is None and grows["step_seconds"] == plain["step_seconds"]
    model = load_spec("gpt2-124m").model
    work = {length: train_flops_per_token(model, length) for length in (256, 512, 1024)}
    # 10,000 steps at 256, 20,000 at 512 and 10,000 at 1,024: attention is all that gets cheaper.
    share = (work[256] + 2 * work[512] + work[1024]) / 4 / work[1024]
    assert share - 0.05 < grows["mean_step_seconds"] / grows["step_seconds"] < 1
