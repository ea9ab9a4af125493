"""The runner of benchmarks and the suite for one GPU, for real: processes that train."""

import json

import pytest
from processes import ROOT, python, started

from benchmarks import cell as one
from benchmarks import gpu_suite
from benchmarks.machine import Device
from benchmarks.matrix import Cell
from benchmarks.run import KIND
from scaling.errors import run_command
from scaling.plan import main as plan_main

SHORT = ['data={"kind": "synthetic", "sequence_length": 32}', "compile=false"]
WEAK = 'batch={"micro_batch_size": 1, "gradient_accumulation_steps": 2}'
LACKING = 1000
"""Ranks that no machine of the tests has cores for."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Runs of a small model on one rank, and one that cannot begin."""
    small = {"spec": "gpt2-tiny", "backends": ["single"], "options": {"weak": [*SHORT, WEAK]}}
    broken = {"spec": "gpt2-tiny", "backends": ["single"], "options": {"broken": ["initialize_from=/nowhere"]}}
    return measure(tmp_path_factory.mktemp("benchmarks"), small, broken)


def measure(folder, *parts):
    """The result of this matrix on 1 and 8 of something, and what was told meanwhile."""
    matrix, out = folder / "matrix.json", folder / "result.json"
    matrix.write_text(json.dumps({"cpu": parts}))
    words = ["--gpus", "1,8", "--repeats", "1", "--steps", "6", "--warm-up", "2", "--rehearse"]
    words += ["--matrix", str(matrix), "--out", str(out)]
    done = python("-c", f"from benchmarks import machine, run; machine.cores = lambda: 1; run.main({words!r})")
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text()), done.stdout


def test_without_a_gpu_ranks_stand_for_gpus_and_rows_say_so(measured):
    document, told = measured
    assert document["kind"] == KIND and document["machine"]["kind"] == "cpu"
    assert "no GPU here: ranks on the CPU's cores (1) stand for GPUs" in told
    row = {row["name"]: row for row in document["rows"]}["gpt2-tiny single x1 weak"]
    assert row["status"] == "ok" and row["ran_on"]["words"].endswith("no GPU") and row["mfu"] is None
    assert row["tokens_per_step"] == 64 and row["runs"][0]["steps"] == 4, "the first two do not count"
    step = row["step_seconds"]
    assert 0 < step["low"] <= step["median"] <= step["high"]
    assert row["tokens_per_second"] == pytest.approx(64 / step["median"], rel=1.0)
    assert row["memory"]["measured_to_predicted"] == pytest.approx(1, abs=0.05)
    assert document["environment"]["versions"]["torch"] and document["environment"]["commit"]


def test_ranks_that_the_machine_lacks_are_skipped(tmp_path):
    matrix, out = tmp_path / "matrix.json", tmp_path / "result.json"
    matrix.write_text(json.dumps({"cpu": [{"spec": "gpt2-tiny", "backends": ["ddp"], "options": {"weak": [WEAK]}}]}))
    words = ("--gpus", str(LACKING), "--matrix", str(matrix), "--out", str(out))
    done = python("-m", "benchmarks.run", *words)
    assert done.returncode == 0 and f"cores for {LACKING} ranks: skipped" in done.stdout, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "skipped" and row["ran_on"] is None and "this machine has no GPU" in row["reason"]


def test_a_run_that_fails_is_a_row(measured):
    row = next(row for row in measured[0]["rows"] if "broken" in row["name"])
    assert row["status"] == "failed" and "initialize_from" in row["reason"] and row["runs"][0]["exit_code"] == 5


@pytest.mark.long
def test_plan_rehearsal_and_benchmark_agree_on_gpt2_on_eight_ranks(tmp_path, capsys):
    """Tokens, batch, FLOPs and memory of one job, by all three, under the same names."""
    whole = {"spec": "gpt2-124m", "backends": ["hsdp"], "options": {"short": [*SHORT, WEAK]}}  # from 4 ranks on
    rows = measure(tmp_path, whole)[0]["rows"]
    row = next(row for row in rows if row["name"] == "gpt2-124m hsdp x8 short")
    assert row["status"] == "ok" and row["ran_on"]["rehearsed"] and row["tokens_per_second"] is None
    sets = [word for setting in row["settings"] for word in ("--set", setting)]
    out, rates = tmp_path / "rehearsed.json", tmp_path / "cpu.json"
    done = python("-m", "scaling.rehearse", "--spec", "gpt2-124m", "--world-size", "8", "--json", str(out), *sets)
    assert done.returncode == 0, done.stderr[-2000:]
    rehearsed = json.loads(out.read_text())
    some = ("bf16_matmul_flops", "bf16_attention_flops", "hbm_bytes_per_s", "all_gather_bytes_per_s")
    speeds = dict.fromkeys((*some, "all_reduce_bytes_per_s"), 1e11)
    rates.write_text(json.dumps({"name": "cpu", "measured": {"device_type": "cpu", **speeds}}))
    words = ("--spec", "gpt2-124m", "--gpus", "8xcpu", "--hardware", str(rates), "--as-written", "--json", "-", *sets)
    assert plan_main(words) == 0
    planned = json.loads(capsys.readouterr().out)
    written = planned["as_written"]
    for name in ("global_batch_size", "micro_batch_size", "gradient_accumulation_steps", "tokens_per_step"):
        assert row[name] == rehearsed[name] == written[name], name
    assert row["tokens_per_step"] == 8 * 1 * 2 * 32
    assert row["flops_per_token"] == rehearsed["flops_per_token"] == planned["model"]["flops_per_token"]
    assert row["parameters"] == planned["model"]["parameters"]
    predicted = row["memory"]["predicted_bytes"]
    assert predicted == rehearsed["predicted"]["peak_allocated_bytes"]
    assert written["memory"]["peak_allocated_bytes"] == pytest.approx(predicted, rel=1e-3)
    assert row["memory"]["measured_bytes"] == rehearsed["memory"]["peak_allocated_bytes"]
    assert rehearsed["measured_to_predicted"] == pytest.approx(1, abs=0.01)


@pytest.mark.long
def test_eight_real_ranks_are_the_job_that_was_planned(tmp_path):
    cell = Cell("gpt2-124m", "hsdp", "", 8, (*SHORT, WEAK, 'backend={"kind": "fsdp", "replicate": 2}'))
    here = Device("cpu", "x", 8)
    found = one.measure(cell, tmp_path / "run", 4, 2, here, 600, ROOT)
    facts = one.facts(one.resolved(cell))
    assert found["status"] == "ok", found
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["tokens"] == 4 * facts["tokens_per_step"] and last["samples_seen"] == 4 * facts["global_batch_size"]
    assert found["memory"]["peak_allocated_bytes"] == pytest.approx(
        found["predicted"]["memory"]["peak_allocated_bytes"], rel=0.05
    )


def test_the_suite_at_tiny_size(tmp_path):
    """Every command of it, but for the peers, which have tests of their own."""
    names = [cell.name for cell in gpu_suite.cells(tmp_path, tiny=True) if cell.name != "peers"]
    done = started("-m", "benchmarks.gpu_suite", "--tiny", "--only", ",".join(names), "--out", str(tmp_path))
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [(state["name"], state["status"]) for state in found["cells"]] == [(name, "done") for name in names], found
    assert done.returncode == 0 and "a trial of the commands, no measurement" in (tmp_path / "summary.md").read_text()
    rows = json.loads((tmp_path / "recipes.json").read_text())["rows"]
    assert [row["status"] for row in rows] == ["ok"] * 5
    page = (tmp_path / "RESULTS.md").read_text()
    assert "Not yet measured on a GPU." in page and "rehearsed: rank 0 of 512 alone on a CPU" in page
    sizes = json.loads((tmp_path / "largest.json").read_text())["rows"]
    assert all(row["certain"] and abs(row["found_blocks"] - row["predicted_blocks"]) <= 1 for row in sizes), sizes


def test_the_suite_wants_a_gpu(tmp_path, capsys):
    pytest.importorskip("torch")
    if gpu_suite.device().kind == "gpu":
        pytest.skip("there is one")
    assert run_command(lambda: gpu_suite.main(["--out", str(tmp_path)])) == 2
    assert "`--tiny`" in capsys.readouterr().err
    assert run_command(lambda: gpu_suite.main(["--tiny", "--only", "none", "--out", str(tmp_path)])) == 2
