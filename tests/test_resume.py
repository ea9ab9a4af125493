"""Going on where a run stopped, through the real command line of one process; several ranks are test_chaos.py's."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import TINY_MODEL

from scaling.checkpoint.format import Reader
from scaling.checkpoint.store import Store
from scaling.train import main

SPEC = {
    "name": "tiny",
    "seed": 7,
    "model": TINY_MODEL | {"dropout": 0.2},
    "data": {"kind": "synthetic", "samples": 20, "sequence_length": 16, "validation_samples": 6},
    "batch": {"global_batch_size": 6, "micro_batch_size": 3},
    "optimizer": {"lr": 1e-2},
    "param_groups": [
        {"name": "frozen", "match": ["layers.0.mlp.*"], "freeze": True},
        {"name": "slow", "match": ["embed*"], "lr": 1e-3},
        {"name": "rest", "match": ["*"]},
    ],
    "schedule": {"kind": "cosine", "warmup_steps": 2},
    "precision": "fp32",
    "backend": {"kind": "single"},
    "max_steps": 9,
    "validation": {"interval": 4, "batches": 1},
    "checkpoint": {"interval": 2, "keep_last": 3},
    "profile": {"interval": 1},
    "tracking": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    path = tmp_path_factory.mktemp("spec") / "spec.json"
    path.write_text(json.dumps(SPEC))
    return str(path)


@pytest.fixture
def train(spec, capsys):
    """Runs the command; returns exit code, standard output and standard error."""

    def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
        code = main(["--spec", spec, "--run-dir", str(folder), *arguments])
        captured = capsys.readouterr()
        assert json.loads((folder / "exit.json").read_text())["code"] == code or code in (2, 6)
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def whole(spec, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["--spec", spec, "--run-dir", str(folder)]) == 0
    return folder


def curve(folder: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["grad_norm"], r["lr"], r["samples_seen"], r["tokens"]) for r in rows]


def state(folder: Path, step: int = 9) -> dict[str, torch.Tensor]:
    reader = Reader(Store(folder / "checkpoints").path(step))
    return {key: reader.read(key, 0, elements) for key, elements in reader.elements.items()}


def same(first: Path, second: Path) -> bool:
    one, other = state(first), state(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def damage(folder: Path, step: int) -> Path:
    path = Store(folder / "checkpoints").path(step) / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_run_that_stopped_goes_on_as_if_it_had_not(train, whole, tmp_path):
    folder = tmp_path / "run"
    code, out, _ = train(folder, "--stop-after", "3")
    assert code == 0 and len(curve(folder)) == 3
    code, out, _ = train(folder)
    assert code == 0 and f"resuming from {folder}/checkpoints/step-00000003" in out
    assert curve(folder) == curve(whole) and same(folder, whole)


def test_the_plan_knows_the_size_of_a_checkpoint(whole):
    """Frozen and tied parameters included: what is in it, to the byte."""
    planned = json.loads((whole / "plan.json").read_text())["memory"]["checkpoint_bytes"]
    assert planned == sum(4 * tensor.numel() for tensor in state(whole).values())


def test_steps_that_are_done_again_have_equal_values(train, whole, tmp_path):
    folder = tmp_path / "run"
    train(folder, "--stop-after", "7")
    shutil.rmtree(Store(folder / "checkpoints").path(7))  # as if killed after step 7 was logged
    assert train(folder)[0] == 0
    rows = curve(folder)
    assert [row[0] for row in rows] == [*range(1, 8), *range(7, 10)]
    assert all(row in curve(whole) for row in rows) and same(folder, whole)


def test_a_finished_run_has_nothing_to_do(train, whole):
    before = curve(whole)
    assert train(whole)[0] == 0 and curve(whole) == before


def test_never_is_for_new_folders(train, whole, tmp_path):
    before = (whole / "metrics.jsonl").read_bytes()
    code, _, err = train(whole, "--resume", "never")
    assert code == 6 and "without a run in it" in err and (whole / "metrics.jsonl").read_bytes() == before
    assert train(tmp_path / "new", "--resume", "never", "--stop-after", "1")[0] == 0


def test_a_damaged_checkpoint_is_passed_over_and_named(train, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    path = damage(folder, 9)
    code, out, _ = train(folder)
    assert code == 0 and same(folder, whole)
    (warning,) = [line for line in out.splitlines() if "WARNING" in line]
    assert str(path) in warning and "SHA-256" in warning and "step-00000008" in out


def test_where_all_are_damaged_nothing_starts_afresh(train, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    for step in Store(folder / "checkpoints").steps():
        damage(folder, step)
    before = curve(folder)
    code, _, err = train(folder)
    assert code == 5 and "all 3 are damaged" in err and curve(folder) == before
    shutil.rmtree(folder / "checkpoints" / "step-00000004", ignore_errors=True)
    for path in (folder / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    code, _, err = train(folder)
    assert code == 5 and "that" in err and "latest names" in err


def test_a_named_checkpoint_of_another_run_is_gone_on_from(train, whole, tmp_path):
    folder, path = tmp_path / "branch", Store(whole / "checkpoints").path(6)
    assert train(folder, "--resume", str(path), "--stop-after", "8")[0] == 0
    code, out, _ = train(folder, "--resume", str(path))  # the same command again
    assert code == 0 and f"resuming from {folder}/checkpoints/step-00000008" in out
    assert curve(folder) == curve(whole)[6:] and same(folder, whole)
    code, _, err = train(folder, "--resume", str(Store(whole / "checkpoints").path(8)))
    assert code == 5 and "did not begin there" in err


def test_a_run_folder_and_a_pointer_can_be_named(train, whole, tmp_path):
    code, out, _ = train(tmp_path / "a", "--resume", str(whole))
    assert code == 0 and "step-00000009" in out
    code, out, _ = train(tmp_path / "b", "--resume", str(whole / "checkpoints" / "best"))
    best = (whole / "checkpoints" / "best").read_text().strip()
    assert code == 0 and best in out
    code, _, err = train(tmp_path / "c", "--resume", str(tmp_path / "nothing"))
    assert code == 5 and "nothing is none" in err


def test_going_back_within_a_run_sets_later_checkpoints_aside(train, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    code, out, _ = train(folder, "--resume", str(Store(folder / "checkpoints").path(8)))
    assert code == 0 and same(folder, whole) and "set aside" in out
    assert len(list((folder / "checkpoints").glob("set-aside-step-00000009-*"))) == 1


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("model.hidden_size=32", "model.hidden_size"),
        ("batch.global_batch_size=12", "batch.global_batch_size"),
        ("data.samples=21", "data"),
        ("seed=8", "seed"),
        ('param_groups=[{"name":"all","match":["*"]}]', "param_groups"),
    ],
)
def test_what_cannot_go_on_is_refused_with_the_field(train, whole, tmp_path, change, field):
    folder = shutil.copytree(whole, tmp_path / "run")
    code, _, err = train(folder, "--set", change, "--set", "max_steps=12")
    assert code == 5 and f"`{field}` must" in err and "Traceback" not in err
    assert curve(folder) == curve(whole)


def test_an_allowed_change_goes_on_at_the_same_sample(train, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    change = ("--set", "batch.global_batch_size=12", "--set", "max_steps=11")
    code, out, _ = train(folder, *change, "--allow-change", "batch.global_batch_size")
    assert code == 0 and "changed, as allowed" in out
    assert [row[4] for row in curve(folder)[9:]] == [54 + 12, 54 + 24]


def test_what_changed_is_listed_by_what_it_means(train, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    changes = [*("--set", "max_steps=10", "--set", "profile.interval=2", "--set", 'backend={"kind":"fsdp"}')]
    code, out, _ = train(folder, *changes)
    assert code == 0 and "changed, harmless: profile.interval 1 -> 2" in out
    assert "changed: the curve goes on otherwise: max_steps 9 -> 10" in out
    assert "changed, harmless: backend.kind 'single' -> 'fsdp'" in out


def test_best_is_kept_beside_the_last(train, tmp_path):
    folder = tmp_path / "run"
    # The LR explodes after the first validation, so that no later one is better.
    more = ["--set", "checkpoint.keep_last=1", "--set", 'schedule={"kind":"constant","warmup_steps":9}']
    assert train(folder, *more, "--set", "optimizer.lr=50")[0] == 0
    losses = [json.loads(line)["loss"] for line in (folder / "validation.jsonl").read_text().splitlines()]
    best = {4: 4, 8: 8, 9: 9}[[4, 8, 9][losses.index(min(losses))]]
    store = Store(folder / "checkpoints")
    assert best < 9 and store.steps() == [best, 9] and (store.pointed("best"), store.pointed("latest")) == (best, 9)
    assert json.loads((store.path(9) / "state.json").read_text())["best"] == {"step": best, "loss": min(losses)}


def test_nothing_is_saved_where_the_spec_says_so(train, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "--set", "checkpoint=null", "--stop-after", "2")[0] == 0
    assert not (folder / "checkpoints").exists()
    code, _, err = train(folder, "--set", "checkpoint=null")
    assert code == 6 and "no checkpoint to go on from" in err


def test_a_run_killed_before_its_first_checkpoint_begins_again_and_says_so(train, whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0}\n{"step": 2, "lo')
    code, out, _ = train(folder)
    assert code == 0 and "no checkpoint yet" in out
    (folder / "metrics.jsonl").write_text("".join((folder / "metrics.jsonl").read_text().splitlines(True)[1:]))
    assert curve(folder) == curve(whole)


@pytest.mark.fault("F9")
def test_the_same_failure_again_and_again_ends_with_7(train, tmp_path):
    folder, poison = tmp_path / "run", ("--set", "model.initializer_range=1e6", "--set", "precision=fp16")
    codes = [train(folder, *poison)[0] for _ in range(5)]
    assert codes == [4, 4, 4, 7, 7]


STILL = ("--set", "optimizer.lr=1e-9", "--set", 'param_groups=[{"name": "all", "match": ["*"]}]')


def test_weights_alone_are_taken_from_another_run(train, whole, tmp_path):
    """With a fresh optimizer, from the first sample on; the run's own checkpoint counts more once there is one."""
    folder, source = tmp_path / "tuned", ("--set", f"initialize_from={json.dumps(str(whole))}")
    code, out, _ = train(folder, *source, *STILL, "--stop-after", "1")
    assert code == 0 and f"weights from {whole}/checkpoints/step-00000009, with a fresh optimizer" in out
    weights = {key: value for key, value in state(whole).items() if key.startswith("master/")}
    tuned = state(folder, 1)
    assert all(torch.allclose(tuned[key], value, atol=1e-7) for key, value in weights.items())
    saved = json.loads((Store(folder / "checkpoints").path(1) / "state.json").read_text())
    assert saved["counters"]["updates"] == 1 and saved["samples_seen"] == 6
    code, out, _ = train(folder, *source, *STILL, "--stop-after", "2")
    assert code == 0 and "weights from" not in out and "step-00000001" in out


def test_weights_of_another_model_are_refused(train, whole, tmp_path):
    source = ("--set", f"initialize_from={json.dumps(str(whole))}")
    code, _, err = train(tmp_path / "a", *source, "--set", "model.hidden_size=32")
    assert (
        code == 5
        and "`model.head_dim` must be as in the weights of `initialize_from`" in err
        and "Traceback" not in err
    )
    code, _, err = train(tmp_path / "b", "--set", 'initialize_from="nowhere"')
    assert code == 5 and "nowhere does not exist" in err


def test_an_export_is_what_transformers_computes_with_and_can_be_gone_on_from(train, whole, tmp_path):
    from scaling.export import main as export

    assert export([str(whole), "--to", str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == "llama"
    source = ("--set", f"initialize_from={json.dumps(str(tmp_path / 'hf'))}")
    assert train(tmp_path / "tuned", *source, *STILL, "--stop-after", "1")[0] == 0
    weights = {key: value for key, value in state(whole).items() if key.startswith("master/")}
    tuned = state(tmp_path / "tuned", 1)
    assert all(torch.allclose(tuned[key], value, atol=1e-7) for key, value in weights.items())
