"""A rank that is rehearsed alone holds what it holds among real ranks, to the byte."""

import json
import subprocess

import pytest
from processes import ENVIRONMENT, ROOT, SPECS, python, torchrun

from scaling.rehearse import lines

BACKENDS = {
    "single": {"kind": "single"},
    "ddp": {"kind": "ddp"},
    "fsdp": {"kind": "fsdp"},
    "fsdp-keep": {"kind": "fsdp", "reshard_after_forward": False},
    "zero1": {"kind": "deepspeed", "zero_stage": 1, "reduce_bucket_size": 20_000},
    "zero2": {"kind": "deepspeed", "zero_stage": 2, "reduce_bucket_size": 20_000},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, "reduce_bucket_size": 20_000},
}
BATCH = {"global_batch_size": 16, "micro_batch_size": 2}


def settings(backend, **more):
    found = {"backend": BACKENDS[backend], "batch": BATCH, "precision": "bf16", **more}
    return [f"{name}={json.dumps(value)}" for name, value in found.items()]


def rehearse(tmp_path, world_size, assignments, spec="gpt-parity", steps=2):
    out = tmp_path / f"{world_size}.json"
    words = [word for assignment in assignments for word in ("--set", assignment)]
    ranks = ("--world-size", str(world_size), "--steps", str(steps))
    path = str(SPECS / f"{spec}.json")
    done = python("-m", "scaling.rehearse", "--spec", path, *ranks, "--json", str(out), *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


LONG = ("fsdp-keep", "zero1", "zero2")


@pytest.mark.parametrize(
    "backend",
    [pytest.param(one, marks=pytest.mark.long) if one in LONG else one for one in BACKENDS if one != "single"],
)
def test_rehearsed_memory_is_that_of_the_real_thing(tmp_path, backend):
    spec = "llama-parity" if backend in ("fsdp", "zero3") else "gpt-parity"
    out, path = tmp_path / "real.json", str(SPECS / f"{spec}.json")
    done = torchrun(2, "tests/rehearse_worker.py", str(out), path, *settings(backend))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bf16_optimizer" not in done.stdout, "what DeepSpeed reports of itself is no concern of the user's"
    real, rehearsed = json.loads(out.read_text()), rehearse(tmp_path, 2, settings(backend), spec)[0]["memory"]
    assert real["peak_allocated_bytes"] > 1e6
    assert rehearsed["peak_allocated_bytes"] == real["peak_allocated_bytes"]
    assert rehearsed["peak_phase"] == real["peak_phase"] and rehearsed["parts"] == real["parts"]


def test_state_is_cut_by_the_number_of_ranks(tmp_path):
    """Adam's moments take 8 bytes a trainable parameter, and every fp32 shard 4."""
    parts = {n: rehearse(tmp_path, n, settings("fsdp", activation_checkpointing="full"))[0] for n in (1, 8)}
    one, eight = (parts[n]["memory"]["parts"] for n in (1, 8))
    for name in ("parameters", "optimizer"):
        assert one[name] / 8 <= eight[name] < one[name] / 8 * 1.3, "rows, and blocks of 512 bytes, are rounded up"
    assert parts[8]["rehearsed"] and parts[8]["world_size"] == 8 and parts[8]["compute_seconds"] is None


def test_parts_and_phases_are_told(tmp_path):
    report, told = rehearse(tmp_path, 4, settings("zero2"), steps=1)
    memory = report["memory"]
    assert sum(memory["parts"].values()) == memory["peak_allocated_bytes"] == max(memory["phases"].values())
    assert {"build", "forward", "backward", "optimizer"} <= memory["phases"].keys()
    assert told.splitlines() == lines(report) and "communication costs nothing" in told


def test_a_checkpointed_model_keeps_less(tmp_path):
    kept = {}
    for mode in ("none", "full"):
        report, _ = rehearse(tmp_path, 2, settings("fsdp", activation_checkpointing=mode), steps=1)
        kept[mode] = report["memory"]["parts"]["activations"]
    assert kept["full"] < kept["none"] / 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--world-size", "0"], "must be a whole number from 1"),
        (["--world-size", "5"], "batch.global_batch_size"),
        (["--world-size", "2", "--set", "model.hidden_size=33"], "model.hidden_size"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(words, said):
    path = str(SPECS / "gpt-parity.json")
    sets = [word for assignment in settings("fsdp") for word in ("--set", assignment)]
    command = ["python", "-m", "scaling.rehearse", "--spec", path, *sets, *words]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
