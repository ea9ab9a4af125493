"""The tracer on tensors without values: against the same steps on real ones, and the ledger against it."""

import importlib.util
import json

import pytest
import torch
from processes import SPECS, python
from torch import nn

from benchmarks.ledger import BACKENDS, draw
from scaling.errors import UserError
from scaling.rehearse import apart
from scaling.run import resolve
from scaling.spec import load_spec
from scaling.trace import REAL_BYTES, fake_tensors, trace, traced

DRAWN = [name for name in BACKENDS if name not in ("zero1-small", "zero2-small")]
CHECKED = ("ddp", "fsdp")
"""Of the drawn; the others are long."""
LONG = pytest.mark.long
GPT2 = ["backend.kind=fsdp", "batch.micro_batch_size=4"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    cells = list(draw(len(DRAWN), 5, DRAWN, tmp_path_factory.mktemp("drawn")))
    return {cell["name"].split()[1]: resolve(load_spec(cell["spec"]), cell["world_size"]) for cell in cells}


@pytest.mark.parametrize("backend", [one if one in CHECKED else pytest.param(one, marks=LONG) for one in DRAWN])
def test_fake_tensors_take_what_real_ones_do(drawn, backend):
    real, fake = (apart(traced, drawn[backend], 2, None, fake) for fake in (False, True))
    peak = real["peak_allocated_bytes"]
    assert abs(fake["peak_allocated_bytes"] / peak - 1) <= 0.005
    assert fake["peak_phase"] == real["peak_phase"] and fake["parts"].keys() == real["parts"].keys()
    for part, size in real["parts"].items():
        assert abs(fake["parts"][part] - size) <= 0.005 * peak, part


@pytest.mark.parametrize("mode", ["none", pytest.param("selective", marks=LONG), pytest.param("full", marks=LONG)])
def test_the_ledger_is_the_trace_at_real_size(mode):
    found = trace(load_spec("gpt2-124m", [*GPT2, f"activation_checkpointing={mode}"]), 8)
    held, played = found["memory"], found["predicted"]
    assert held["peak_allocated_bytes"] > 1e9
    assert abs(found["predicted_to_traced"] - 1) <= 0.01 and held["peak_phase"] == played["peak_phase"]
    for part in held["parts"].keys() | played["parts"].keys():
        assert abs(held["parts"].get(part, 0) - played["parts"].get(part, 0)) <= 0.01 * held["peak_allocated_bytes"]


def test_later_micro_steps_hold_no_more_than_the_second():
    settings = ['batch={"global_batch_size": 40, "micro_batch_size": 2}', 'backend={"kind": "fsdp"}']
    job = resolve(load_spec(str(SPECS / "gpt-parity.json"), settings), 4)
    assert job.plan.accumulation == 5
    cut, whole = apart(traced, job, 2, 2), apart(traced, job, 2)
    assert cut["peak_allocated_bytes"] == whole["peak_allocated_bytes"] and cut["parts"] == whole["parts"]


def plan(*words):
    settings = ['batch={"global_batch_size": 16, "micro_batch_size": 2}', "precision=bf16", 'backend={"kind": "ddp"}']
    sets = [word for setting in settings for word in ("--set", setting)]
    path = str(SPECS / "gpt-parity.json")
    return python("-m", "scaling.plan", "--spec", path, "--gpus", "8xH100-80GB", "--as-written", *sets, *words)


def test_the_planner_shows_the_trace_beside_its_estimate():
    # Stage 1 in bf16 prints its memory on standard output.
    done = plan("--trace", "--json", "--set", 'backend={"kind": "deepspeed", "zero_stage": 1}')
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout)
    found, estimate = document["traced"], document["as_written"]["memory"]
    assert found["memory"].keys() == estimate.keys() == found["predicted"].keys()
    assert found["world_size"] == 8 and found["tensors"] == "fake" and found["kernels"] == "cpu"
    assert sum(found["memory"]["parts"].values()) == found["memory"]["peak_allocated_bytes"]
    assert found["predicted_to_traced"] == pytest.approx(1, abs=0.01)


def test_the_trace_is_a_table():
    done = plan("--trace", "--set", "compile=true")
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout[done.stdout.index("traced: rank 0 of 8") :]
    assert "fake tensors" in told and "with a CPU's kernels" in told and "traced uncompiled" in told
    assert "optimizer" in told and "H100-80GB" in told


def test_without_the_flag_nothing_is_traced():
    assert "traced" not in json.loads(plan("--json").stdout)


def test_what_only_real_tensors_can_do_is_refused_where_it_is_large():
    nvme = {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "nvme", "nvme_path": "/tmp"}
    spec = load_spec("gpt2-124m", [f"backend={json.dumps(nvme)}", "batch.micro_batch_size=16"])
    with pytest.raises(UserError, match="`--trace` must") as refused:
        trace(spec, 8)
    assert "NVMe" in str(refused.value) and f"{REAL_BYTES // 2**30} GiB" in str(refused.value)


def test_without_torch_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="must find torch installed"):
        trace(load_spec("gpt2-124m"), 8)


def test_values_that_code_must_know_are_made_up_and_all_is_put_back():
    to = nn.Module.to
    with fake_tensors():
        counted, flag = torch.zeros(3).sum(), torch.ones(3).isfinite().all()
        assert counted.item() == 1.0 and not bool(flag) and float(torch.tensor(5.0)) == 5.0
        assert nn.Module.to is not to
    assert nn.Module.to is to and torch.zeros(3).sum().item() == 0.0
