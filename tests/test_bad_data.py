"""Data that goes bad while a run of two ranks reads it: the run ends at once, and says where."""

import json
import subprocess
import time

import numpy as np
import pytest
from processes import ENVIRONMENT, ROOT
from test_resume import SPEC

from scaling.data.order import sample_indices

SAMPLES, LENGTH = 5000, 16


@pytest.fixture
def run(tmp_path):
    """Starts two ranks on the tokens in tmp_path/tokens.npy; returns the process and the run folder."""
    data = {"kind": "tokens", "train": [f"{tmp_path}/tokens.npy"], "validation": 0, "sequence_length": LENGTH}
    spec = SPEC | {"data": data, "backend": {"kind": "fsdp"}, "max_steps": 10**6, "validation": None}
    del spec["param_groups"]
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    started = []

    def start():
        launcher = ["torchrun", "--nproc_per_node=2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        words = ["launch/train.py", "--spec", f"{tmp_path}/spec.json", "--run-dir", f"{tmp_path}/run"]
        out = subprocess.PIPE
        started.append(
            subprocess.Popen([*launcher, *words], cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out, text=True)
        )
        return started[0], tmp_path / "run"

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.fault("F5")
def test_a_token_that_cannot_be_is_named_with_its_file_and_place(run, tmp_path):
    tokens = np.random.default_rng(7).integers(0, 64, SAMPLES * LENGTH + 1)
    sample = int(sample_indices(30, 1, SAMPLES, SPEC["seed"])[0])  # is soon read
    place = sample * LENGTH + 5
    tokens[place] = 64
    np.save(tmp_path / "tokens.npy", tokens)
    process, folder = run()
    errors = process.communicate(timeout=120)[1]
    ended = json.loads((folder / "exit.json").read_text())
    assert ended["code"] == 2 and f"token {place} of {tmp_path}/tokens.npy is 64" in ended["reason"], (ended, errors)
    assert errors.count(ended["reason"]) == 1 and "scaling/train.py" not in errors, "no traceback but the launcher's"


@pytest.mark.fault("F5")
def test_a_file_that_is_cut_off_ends_the_run_with_the_rank_and_the_cause(run, tmp_path):
    """A memory-mapped file has no other way to say so: the kernel kills who reads beyond the end."""
    np.save(tmp_path / "tokens.npy", np.random.default_rng(7).integers(0, 64, SAMPLES * LENGTH + 1))
    process, folder = run()
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    with open(tmp_path / "tokens.npy", "r+b") as file:
        file.truncate(4096)
    began = time.monotonic()
    process.communicate(timeout=120)
    ended = json.loads((folder / "exit.json").read_text())
    assert ended["code"] == 9 and "Bus error" in ended["reason"] and ended["rank"] in (0, 1), ended
    assert time.monotonic() - began < 20
