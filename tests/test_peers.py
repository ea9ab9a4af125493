"""The peers that this toolkit is measured against do the same work, and the command that measures them works."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import started

from benchmarks.peers.common import JOB, TOKENS, Job
from benchmarks.peers.job import SHAPES, write_job
from benchmarks.peers.rounds import Peer, Row, Turn, in_turn, ratios
from scaling.data.build import build_datasets
from scaling.data.order import sample_indices
from scaling.models.build import model_recipe
from scaling.spec import load_spec


def a_job(folder: Path, shape: str, variant: str) -> Job:
    """A job on one rank, as a peer's script reads it."""
    found = json.loads((folder / JOB).read_text())
    return Job(folder, folder / "out", 3, **{**found, "betas": tuple(found["betas"])}, variant=variant)


@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_all_models_of_a_job_have_the_same_loss_and_gradients(tmp_path, shape):
    from benchmarks.peers.common import load_model
    from benchmarks.peers.nanogpt import from_pretrained

    folder = tmp_path / "job"
    write_job(folder, SHAPES[shape], 1)
    spec = load_spec(str(folder / "spec.json"))
    recipe = model_recipe(spec)
    ours = recipe.build()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(recipe.initial_value(name, parameter.shape))
    window = torch.from_numpy(np.load(folder / TOKENS)[:3].astype(np.int64))
    inputs, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    loss = ours(inputs, targets) / targets.numel()
    loss.backward()
    wanted = ours.embed_tokens.weight.grad

    theirs = {variant: load_model(a_job(folder, shape, variant)) for variant in ("handwritten", "transformers")}
    found = {"handwritten": theirs["handwritten"].embed_tokens.weight}
    found["transformers"] = theirs["transformers"].model.get_input_embeddings().weight
    for variant, model in theirs.items():
        other = model(inputs, targets)
        other.backward()
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[variant].grad, wanted, rtol=1e-4, atol=1e-6)
    if shape == "gpt2-tiny":
        torch.testing.assert_close(from_pretrained(a_job(folder, shape, ""))(inputs, targets)[1], loss)


def test_peers_read_the_samples_in_the_order_of_a_run(tmp_path):
    write_job(tmp_path / "job", SHAPES["gpt2-tiny"], 2)
    spec = load_spec(str(tmp_path / "job" / "spec.json"))
    dataset, _ = build_datasets(spec)
    samples = dataset.read(sample_indices(0, 8, len(dataset), spec.seed))
    ordered = np.load(tmp_path / "job" / TOKENS)[:8].astype(np.int64)
    assert (samples.inputs.numpy() == ordered[:, :-1]).all() and (samples.targets.numpy() == ordered[:, 1:]).all()


def test_the_middle_half_of_pairs():
    found = ratios([1.0, 1.1, 0.9, 1.0, 1.2])
    assert found["median"] == 1.0 and found["low"] < 1.0 < found["high"]


def test_each_peer_starts_first_once():
    """The first to start is slower than the others for as long as it lives."""
    assert ["".join(in_turn("abc", number, 3)) for number in range(3)] == ["abc", "bca", "cab"]
    assert [in_turn("abcdef", number, 2)[0] for number in range(2)] == ["a", "d"]


def test_who_has_nothing_to_be_held_against_says_so():
    turns = [Turn(1.0, 2, 0.1, 0.0)] * 2
    ours, other = (Row(Peer(name, name, "", (), "python"), turns=turns) for name in ("ours", "x"))
    ours.why = "has not done 10 steps"
    assert ours.told(ours, 64) == {"peer": "ours", "why_not": "has not done 10 steps"}
    assert other.told(ours, 64) == {"peer": "x", "why_not": "ours, which it would be held against, did not run"}


@pytest.mark.long
def test_the_command_measures_by_turns(tmp_path):
    out = tmp_path / "peers.json"
    words = ("--tiny", "--starts", "2", "--peers", "ours,plain,torchtitan", "--out", str(out))
    done = started("-m", "benchmarks.peers", *words)
    assert done.returncode == 0, done.stderr
    assert "torchtitan will not run: torchtitan trains on GPUs alone" in done.stderr.partition("round 1")[0]
    (job,) = json.loads(out.read_text())["jobs"]
    assert job["same_losses"] and job["device"] == "cpu"
    ours, plain, titan = job["rows"]
    assert titan["why_not"] == "torchtitan trains on GPUs alone"
    for row in (ours, plain):
        assert row["tokens_per_second"] > 0 and row["start_seconds"] > 0 and row["peak_bytes"]["resident"] > 2**27
        assert len(row["turns"]) == len(row["starts"]) == 2 and row["losses_apart"] <= 1e-4
    assert ours["lines"] < plain["lines"]
