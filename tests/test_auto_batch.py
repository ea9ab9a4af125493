"""A micro-batch and an accumulation that are both open: what fits, found when training starts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from processes import TINY_MODEL, run

from scaling.batch import is_open, legal_world_sizes, resolve_batch
from scaling.errors import UserError
from scaling.fit import smallest, with_micro
from scaling.plan import main as plan
from scaling.render import render
from scaling.spec import load_spec
from scaling.spec.__main__ import validate
from scaling.units import MiB

LAUNCH = "benchmarks/faults/launch.py"
SPEC = {
    "name": "tiny",
    "model": TINY_MODEL,
    "data": {"kind": "synthetic", "samples": 64, "sequence_length": 16},
    "batch": {"global_batch_size": 8, "micro_batch_size": "auto", "gradient_accumulation_steps": "auto"},
    "optimizer": {"lr": 1e-2},
    "param_groups": [{"name": "all", "match": ["*"]}],
    "schedule": {"kind": "constant"},
    "precision": "fp32",
    "backend": {"kind": "ddp"},
    "max_steps": 3,
    "checkpoint": {"interval": 2, "asynchronous": False},
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "spec.json").write_text(json.dumps(SPEC))
    return str(tmp_path / "spec.json")


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def curve(folder: Path) -> list[tuple[int, float, float, int]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"], row["samples_seen"]) for row in rows]


# ---------------------------------------------------------------- what needs numbers, and what does not


def test_both_sizes_may_be_open_where_the_global_batch_is_given(path):
    spec = load_spec(path)
    assert is_open(spec.batch) and not is_open(load_spec(path, ["batch.micro_batch_size=2"]).batch)
    assert legal_world_sizes(spec, 10) == (1, 2, 4, 8)
    assert "world size 1, 2, 4, 8" in validate(path, [])
    in_tokens = {"global_batch_tokens": 128, "micro_batch_size": "auto"}
    assert legal_world_sizes(load_spec(path, [f"batch={json.dumps(in_tokens)}"]), 10) == (1, 2, 4, 8)
    for sizes in ({"micro_batch_size": 2}, {}, {"global_batch_size": "auto", "gradient_accumulation_steps": 2}):
        with pytest.raises(UserError, match=r"`batch.global_batch_size` must be a number, or both .*; set one of them"):
            load_spec(path, [f"batch={json.dumps(sizes)}"])


def test_rendering_wants_numbers_and_says_which(path):
    spec = load_spec(path)
    with pytest.raises(UserError, match=r"set `batch.micro_batch_size`, or take the numbers of `python -m"):
        render(spec, 2)
    with pytest.raises(UserError, match="must be a multiple of world size = 3, but is 8; the nearest that work: 9 ="):
        resolve_batch(spec, 3)
    assert resolve_batch(smallest(spec, 2), 2).sentence == "8 = 1 micro x 2 ranks x 4 accumulation"
    assert resolve_batch(with_micro(spec, 2, 4), 2).sentence == "8 = 2 micro x 2 ranks x 2 accumulation"


def test_the_planner_fills_them_in(tmp_path, capsys):
    batch = 'batch={"global_batch_size": 64, "micro_batch_size": "auto"}'
    out = tmp_path / "tuned.json"
    assert plan(["--spec", "gpt2-124m", "--set", batch, "--gpus", "8xH100-80GB", "--json", "--write", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["as_written"] is None and found["candidates"][0]["fits"]
    assert {candidate["global_batch_size"] for candidate in found["candidates"]} == {64}
    tuned = resolve_batch(load_spec(str(out)), 8)
    assert tuned.micro_batch == found["candidates"][0]["micro_batch_size"] and tuned.global_batch == 64


# ---------------------------------------------------------------- real runs


def train(path: str, folder: Path, ranks: int, *flags: str, fault: str = "", more: tuple[str, ...] = ()) -> Any:
    launcher = ("python",)
    if ranks > 1:
        launcher = ("torchrun", f"--nproc_per_node={ranks}", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0")
    settings = [word for flag in flags for word in ("--set", flag)]
    environment = ("env", f"FAULT_MEMORY={fault}") if fault else ()
    return run(*environment, *launcher, LAUNCH, "--spec", path, "--run-dir", str(folder), *settings, *more)


def test_one_process_takes_what_a_step_has_confirmed(path, tmp_path):
    """The curve is that of the same spec written out by hand, and the run folder says what was found."""
    found, written = tmp_path / "found", tmp_path / "written"
    done = train(path, found, 1, "backend.kind=single")
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"micro-batch 8 x 1 accumulation: \S+ KiB of \S+ GiB predicted, confirmed by a step \(\S+ KiB of tensors"
    assert re.search(line, done.stdout), done.stdout
    spec, rendered, predicted = (read(found, f"{name}.json") for name in ("spec", "rendered", "plan"))
    assert spec["batch"] == {
        "global_batch_size": 8, "global_batch_tokens": None, "micro_batch_size": 8, "gradient_accumulation_steps": 1
    }  # fmt: skip
    assert "auto" not in json.dumps(rendered) and predicted["micro_batch_size"] == 8
    sizes = ("batch.micro_batch_size=8", "batch.gradient_accumulation_steps=1")
    assert train(path, written, 1, "backend.kind=single", *sizes).returncode == 0
    assert curve(found) == curve(written), "the step that was tried has left no trace"


@pytest.mark.parametrize(
    ("backend", "limit"), [pytest.param(*one, marks=pytest.mark.long) for one in (("ddp", 280_000), ("fsdp", 240_000))]
)
def test_a_rank_that_runs_out_makes_all_take_the_next_smaller(path, tmp_path, backend, limit):
    """Rank 1 has room for two sequences at a time: both take two, and the global batch stays; then it goes on so."""
    found, written = tmp_path / "found", tmp_path / "written"
    settings = (f"backend.kind={backend}",)
    done = train(path, found, 2, *settings, "max_steps=2", fault=f"1:trial:{limit}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"micro-batch 4 x 1 .*, but rank 1 ran out of memory in a step, .*; a smaller one is", done.stdout)
    assert re.search(r"micro-batch 2 x 2 accumulation: .*, confirmed by a step", done.stdout)
    assert read(found, "spec.json")["batch"]["micro_batch_size"] == 2
    assert read(found, "plan.json")["gradient_accumulation_steps"] == 2
    sizes = ("batch.micro_batch_size=2", "batch.gradient_accumulation_steps=2")
    assert train(path, written, 2, *settings, *sizes).returncode == 0
    assert curve(found) == curve(written)[:2]
    # Without the limit it goes on with four at a time, to rounding as before.
    assert train(path, found, 2, *settings).returncode == 0
    assert read(found, "spec.json")["batch"]["micro_batch_size"] == 4
    assert [row[0] for row in curve(found)] == [1, 2, 3] and curve(found)[2][3] == 24
    assert curve(found)[2] == pytest.approx(curve(written)[2], rel=1e-5)


@pytest.mark.long  # in CI: test_postmortem.py
def test_where_nothing_fits_the_run_ends_with_the_post_mortem(path, tmp_path):
    folder = tmp_path / "run"
    done = train(path, folder, 1, "backend.kind=single", "batch.global_batch_size=2", fault=f"0:trial:{MiB // 64}")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and read(folder, "exit.json")["code"] == 3
    tried = re.findall(r"micro-batch (\d) x (\d) accumulation: .* ran out of memory", done.stdout)
    assert tried == [("2", "1"), ("1", "2")]
    found = read(folder, "oom.json")
    assert found["place"] == "build" and found["suggestions"] == []
    assert read(folder, "spec.json")["batch"]["micro_batch_size"] == 1
