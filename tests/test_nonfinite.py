"""What `on_nonfinite` makes of a sample whose loss is NaN, through the real command line of one process."""

import json
from pathlib import Path

import pytest
import torch
from test_resume import SPEC, curve, state

from scaling.data.build import build_datasets
from scaling.data.order import sample_indices
from scaling.spec.sections import Spec
from scaling.train import main

DATA = SPEC["data"] | {"samples": 1000}
MORE = {"validation": None, "max_steps": 8, "data": DATA}


def sample(place: int) -> list[int]:
    """The tokens at a place in the order of the data."""
    spec = Spec.model_validate_json(json.dumps(SPEC | MORE))
    dataset, _ = build_datasets(spec)
    return dataset.read(sample_indices(place, 1, len(dataset), spec.seed)).inputs[0].tolist()


def train(folder: Path, places: list[int], **changes: object) -> int:
    """Train with NaN at these places of the order; returns the exit code."""
    objective = {"kind": "factory", "target": "own_objectives:poisoned"}
    objective["arguments"] = {"samples": [sample(place) for place in places]}
    path = folder.with_suffix(".json")
    path.write_text(json.dumps(SPEC | MORE | {"objective": objective} | changes))
    return main(["--spec", str(path), "--run-dir", str(folder), "--allow-import", "own_objectives"])


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy") / "run"
    assert train(folder, []) == 0
    return folder


# The global batch is 6 and the micro-batch 3: place 24 is in the first micro-batch of step 5, place 29 in its last.
@pytest.mark.parametrize("place", [24, 29])
def test_stop_ends_with_4_and_changes_nothing(tmp_path, healthy, capsys, place):
    folder = tmp_path / "run"
    assert train(folder, [place]) == 4
    error = capsys.readouterr().err
    assert "at step 5 the loss of rank 0 is not finite" in error and "(24 and on in the order of the data)" in error
    assert curve(folder)[:4] == curve(healthy)[:4]
    bad = rows(folder)[4]
    assert bad["skipped"] and bad["loss"] is None and (bad["step"], bad["first_sample"]) == (5, 24)
    assert bad["bad_ranks"] == [0]
    assert json.loads((folder / "exit.json").read_text())["step"] == 5
    kept = state(folder, 4)
    assert all(bool(torch.isfinite(value).all()) for value in kept.values())


def test_skip_goes_on_without_the_update(tmp_path, healthy):
    folder = tmp_path / "run"
    assert train(folder, [24], on_nonfinite="skip") == 0
    assert [row["skipped"] for row in rows(folder)] == [step == 5 for step in range(1, 9)]
    assert curve(folder)[:4] == curve(healthy)[:4]
    assert [row["first_sample"] for row in rows(folder)] == list(range(0, 48, 6))
    last = json.loads((folder / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert last["counters"]["updates"] == 7 and last["step"] == 8


def test_skip_leaves_the_weights_as_they_are(tmp_path):
    """Without dropout, the step after a skipped first one has the loss of the first weights on the second batch."""
    skipped, passed = tmp_path / "skipped", tmp_path / "passed"
    model = SPEC["model"] | {"dropout": 0.0}
    assert train(skipped, [0], on_nonfinite="skip", model=model) == 0
    assert train(passed, [0], on_nonfinite="rollback", model=model) == 0
    assert rows(skipped)[1]["loss"] == rows(passed)[1]["loss"] is not None
    assert rows(skipped)[1]["step"] == 2 and rows(passed)[1]["step"] == 1


def test_skip_gives_up_at_the_limit(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, [6, 12, 18], on_nonfinite="skip", nonfinite_limit=2) == 4
    assert [row["skipped"] for row in rows(folder)] == [False, True, True, True]


def test_rollback_goes_back_and_passes_over_the_batch(tmp_path, healthy):
    folder = tmp_path / "run"
    assert train(folder, [24], on_nonfinite="rollback") == 0
    found = rows(folder)
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert curve(folder)[:4] == curve(healthy)[:4]
    assert [row["first_sample"] for row in found] == [0, 6, 12, 18, 24, 30, 36, 42, 48]
    assert [row["samples_seen"] for row in found][-1] == 54
    assert [row["skipped"] for row in found].count(True) == 1


def test_rollback_repeats_what_lies_between(tmp_path, healthy):
    folder = tmp_path / "run"
    assert train(folder, [30], on_nonfinite="rollback") == 0  # in step 6; the checkpoint is of step 4
    found = curve(folder)
    assert [row[0] for row in found] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert found[4] == found[6] == curve(healthy)[4]


def test_rollback_before_the_first_checkpoint_goes_back_to_the_start(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, [0], on_nonfinite="rollback") == 0
    assert [row["first_sample"] for row in rows(folder)][:3] == [0, 6, 12]


def test_rollback_gives_up_at_the_limit(tmp_path):
    folder = tmp_path / "run"
    assert train(folder, [24, 30, 36], on_nonfinite="rollback", nonfinite_limit=2) == 4
    assert [row["first_sample"] for row in rows(folder) if row["skipped"]] == [24, 30, 36]


def test_what_was_passed_over_is_remembered_by_a_restart(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert train(whole, [30], on_nonfinite="rollback") == 0
    objective = {"kind": "factory", "target": "own_objectives:poisoned", "arguments": {"samples": [sample(30)]}}
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC | MORE | {"objective": objective, "on_nonfinite": "rollback"}))
    command = ["--spec", str(path), "--run-dir", str(folder), "--allow-import", "own_objectives"]
    assert main([*command, "--stop-after", "6"]) == 0 and main(command) == 0
    assert curve(folder) == curve(whole)
