"""The command line as users start it: launchers, backends, the run folder, exit codes. Real processes over gloo."""

import json
import os
import shutil

import pytest
from processes import ROOT, SPECS, python, run, started, torchrun

TRAIN = "launch/train.py"
SPEC = str(SPECS / "llama-parity.json")
FAST = (
    *("--set", "max_steps=4", "--set", "schedule.warmup_steps=1", "--set", "profile.interval=2"),
    *("--set", "tracking.tensorboard=false"),
)
BACKENDS = {
    "single": '{"kind": "single"}',
    "ddp": '{"kind": "ddp"}',
    "fsdp": '{"kind": "fsdp"}',
    "zero1": '{"kind": "deepspeed", "zero_stage": 1}',
    "zero2": '{"kind": "deepspeed", "zero_stage": 2}',
    "zero3": '{"kind": "deepspeed", "zero_stage": 3}',
}


def train(launcher, backend, folder, *more):
    """`launcher`: "python", "torchrun" or "deepspeed" from nothing; "python-warm", "torchrun-warm"."""
    arguments = (TRAIN, "--spec", SPEC, "--run-dir", str(folder), "--set", f"backend={BACKENDS[backend]}", *FAST, *more)
    if launcher.endswith("-warm"):
        return python(*arguments) if launcher == "python-warm" else torchrun(2, *arguments)
    if launcher == "python":
        return started(*arguments)
    if launcher == "torchrun":
        return run("torchrun", "--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *arguments)
    port = str(20000 + os.getpid() % 20000)  # DeepSpeed's launcher has a fixed one, which two tests would share
    return run("deepspeed", "--num_gpus", "2", "--master_port", port, *arguments)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The last record of one plain process: what every launcher and backend must arrive at."""
    folder = tmp_path_factory.mktemp("reference") / "run"
    assert train("python-warm", "single", folder).returncode == 0
    return lines(folder / "metrics.jsonl")[-1]


@pytest.mark.parametrize(
    ("launcher", "backend"),
    # Each launcher once; the others are long.
    [
        *(("python", "fsdp"), ("torchrun", "zero2"), ("deepspeed", "zero3")),
        *(pytest.param("python", name, marks=pytest.mark.long) for name in ("ddp", "zero1")),
        *(pytest.param("torchrun", name, marks=pytest.mark.long) for name in ("ddp", "fsdp")),
        *(pytest.param("deepspeed", name, marks=pytest.mark.long) for name in ("ddp", "fsdp")),
    ],
)
def test_every_launcher_runs_every_backend(launcher, backend, tmp_path, reference):
    folder = tmp_path / "run"
    done = train(launcher, backend, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"done: {folder}" in done.stdout
    steps = lines(folder / "metrics.jsonl")
    assert [step["step"] for step in steps] == [2, 4]
    for key in ("loss", "grad_norm"):
        assert steps[-1][key] == pytest.approx(reference[key], rel=1e-5)
    assert steps[-1]["lr"] == reference["lr"]
    assert json.loads((folder / "exit.json").read_text())["code"] == 0


def test_the_run_folder_has_what_the_contract_says(tmp_path):
    folder = tmp_path / "run"
    more = ("--set", "tracking.tensorboard=true", "--set", 'validation={"interval": 2, "batches": 2}')
    done = train("torchrun-warm", "fsdp", folder, *more)
    assert done.returncode == 0, done.stderr[-3000:]

    spec = json.loads((folder / "spec.json").read_text())
    assert spec["max_steps"] == 4 and spec["backend"]["kind"] == "fsdp" and spec["model"]["norm"] == "rmsnorm"
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["device"] == "cpu" and plan["time"] is None and plan["memory"]["peak_allocated_bytes"] > 1e6
    assert sum(plan["memory"]["parts"].values()) == plan["memory"]["peak_allocated_bytes"]
    rendered = json.loads((folder / "rendered.json").read_text())
    assert rendered["mesh"] == {"dp_shard": 2}
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["world_size"] == 2 and environment["versions"]["torch"]
    assert [row["step"] for row in lines(folder / "validation.jsonl")] == [2, 4]
    assert list(folder.glob("events.out.tfevents.*"))
    assert "16 = 8 micro x 2 ranks x 1 accumulation" in (folder / "train.log").read_text()
    ended = json.loads((folder / "exit.json").read_text())
    assert ended.keys() == {"code", "reason", "rank", "step", "time"} and ended["step"] == 4

    record = lines(folder / "metrics.jsonl")[-1]
    assert record.keys() == {
        *("step", "loss", "grad_norm", "lr", "tokens", "samples_seen", "step_seconds", "tokens_per_second"),
        *("tokens_per_second_per_device", "mfu", "memory", "time", "device", "skipped"),
        *("first_sample", "bad_ranks", "samples_per_second", "mfu_of_mamf", "pauses", "energy", "ranks"),
        *("window_steps", "warm_up", "wall_time", "sequence_length", "gradient_norms"),
    }
    assert record["lr"].keys() == {"slow", "rest", "rest/undecayed"}
    assert record["samples_seen"] == 64 and record["tokens"] == 64 * 64
    assert record["mfu"] is None and record["skipped"] is False
    assert record["tokens_per_second"] == pytest.approx(16 * 64 / record["step_seconds"])
    assert record["memory"].keys() == {
        *("allocated_peak_bytes", "reserved_peak_bytes", "device_used_bytes", "host_rss_bytes"),
        *("active_peak_bytes", "process_used_bytes", "host_pinned_bytes", "fragmentation", "allocation_retries"),
        *("out_of_memory_count", "phases"),
    }
    assert record["time"].keys() == {"data", "forward", "backward", "optimizer", "communication", "other"}
    assert record["device"].keys() == {
        *("utilization", "power_watts", "temperature_c", "clock_mhz", "max_clock_mhz", "throttle", "ecc_errors"),
        "xid_errors",
    }


def test_a_non_finite_loss_ends_the_run_with_4_on_every_rank(tmp_path):
    # Weights beyond fp16's range: the first loss is NaN.
    more = ("--set", "precision=fp16", "--set", "model.initializer_range=1e6")
    for launcher, ranks in (("python", "rank 0"), ("torchrun", "ranks 0, 1")):
        folder = tmp_path / launcher
        done = train(launcher, "fsdp", folder, *more)
        assert done.returncode == (4 if launcher == "python" else 1)  # torchrun has one code for all failures
        ended = json.loads((folder / "exit.json").read_text())
        assert ended["code"] == 4 and ended["step"] == 1 and ended["rank"] == 0
        assert "at step 1" in ended["reason"] and f"the loss of {ranks} is not finite" in ended["reason"]
        assert ended["reason"] in done.stderr
        assert launcher == "torchrun" or "Traceback" not in done.stderr


def test_fp16_skips_steps_that_overflow_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    # Large logits: gradients overflow at a scale of 65,536 and fit at a lower one.
    more = ("--set", "precision=fp16", "--set", "model.initializer_range=1", "--set", "max_steps=30")
    done = train("python-warm", "single", folder, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    records = lines(folder / "metrics.jsonl")
    assert any(record["skipped"] and record["grad_norm"] is None for record in records)
    assert not records[-1]["skipped"] and records[-1]["loss"] < records[0]["loss"]


def test_dry_run_takes_a_step_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    done = train("python-warm", "fsdp", folder, "--dry-run")
    assert done.returncode == 0 and "dry run done" in done.stdout
    assert not folder.exists()


def test_a_folder_that_cannot_be_made_is_refused_by_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    done = train("torchrun-warm", "ddp", tmp_path / "file" / "run")
    assert done.returncode == 1
    assert "`--run-dir` must be a folder that can be written to" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (("--set", "optimizer.lr=-1"), "optimizer.lr"),
        (("--set", "batch.micro_batch_size=3"), "micro"),
        (("--set", 'param_groups=[{"name": "a", "match": ["layer.*"]}]'), "layers"),
        (("--set", "backend.kind=deepspee"), "deepspeed"),
        (("--frobnicate",), "--frobnicate"),
        (("--set", 'backend={"kind": "fsdp", "replicate": 2}'), "replicate"),
    ],
)
def test_what_is_wrong_is_said_before_torch_is_imported(arguments, needle):
    program = (
        "import sys\nfrom scaling.errors import run_command\nfrom scaling.train import main\n"
        "code = run_command(main)\nprint('torch' in sys.modules)\nsys.exit(code)"
    )
    done = started("-c", program, "--spec", SPEC, *arguments)
    assert done.returncode == 2
    assert needle in done.stderr and "Traceback" not in done.stderr
    assert done.stdout.strip() == "False"


def test_epochs_give_the_number_of_steps(tmp_path):
    folder = tmp_path / "run"
    more = ("--set", "max_steps=null", "--set", "epochs=1.5", "--set", "data.samples=32", "--set", "profile.interval=1")
    done = train("python-warm", "single", folder, *more)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in lines(folder / "metrics.jsonl")] == [1, 2, 3]


def test_it_runs_from_a_checkout_that_is_not_installed(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "scaling", copy / "scaling", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "launch", copy / "launch")
    done = started(str(copy / TRAIN), "--spec", SPEC, "--dry-run")
    assert done.returncode == 0, done.stderr
