"""The checkers of the fault checks must see what they are there for: doctored runs, each with one thing wrong."""

import copy
import json
import random

import pytest
from processes import run

from benchmarks.faults import chaos, corruption, runs

LINES = [
    {"step": n, "loss": 6.0 - n / 10, "grad_norm": 1.5, "lr": {"all": 0.1 * n}, "samples_seen": 8 * n}
    | {"tokens": 80 * n, "skipped": False, "step_seconds": 0.1}
    for n in range(1, 10)
]
REFERENCE = {line["step"]: line for line in LINES}


def test_equal_curves_have_no_problem_whatever_their_speed():
    lines = [{**line, "step_seconds": 3.0} for line in LINES]
    assert runs.curve_problems([*lines, *lines[4:]], REFERENCE) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("loss", 5.5 + 1e-15),
        ("loss", None),
        ("grad_norm", 1.5000001),
        ("lr", {"all": 0.49999999}),
        ("samples_seen", 41),
        ("tokens", 0),
        ("skipped", True),
    ],
)
def test_a_step_that_differs_in_its_last_bit_is_seen(field, value):
    lines = copy.deepcopy(LINES)
    lines[4][field] = value
    [problem] = runs.curve_problems(lines, REFERENCE)
    assert problem.startswith(f"step 5: {field} is ")


def test_a_step_too_many_is_seen():
    assert len(runs.curve_problems([*LINES, {**LINES[-1], "step": 10}], REFERENCE)) == 1


def test_a_resume_must_make_progress():
    """A run that starts from scratch each time ends bit-equal too."""
    assert chaos.progress_problems([4, 5], 3, 3) == []
    assert chaos.progress_problems([1, 2], None, None) == []
    assert chaos.progress_problems([], 3, 3) == []
    assert chaos.progress_problems([1, 2, 3], None, 3) != [], "from scratch, though there was a checkpoint"
    assert chaos.progress_problems([1, 2, 3], 0, 3) != []
    assert chaos.progress_problems([4], 3, 6) != [], "from an older one"
    assert chaos.progress_problems([5, 6], 3, 3) != [], "a step left out"
    assert chaos.progress_problems([3, 4], 3, 3) != [], "a step done twice"


def test_the_end_of_a_run_is_looked_at(tmp_path):
    (tmp_path / "checkpoints" / ".incomplete-step-00000009-1").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:7]))
    problems = chaos.end_problems(tmp_path, REFERENCE, {})
    assert len(problems) == 3 and "left behind" in problems[0] and "2 steps were never logged" in problems[1], problems


def test_digests_that_differ_or_lack_are_named():
    assert runs.differing({"a": "1", "b": "2"}, {"a": "1", "b": "2"}) == []
    assert runs.differing({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c"]


def test_a_line_that_was_broken_off_is_no_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n" + json.dumps(LINES[1])[:-3])
    assert [line["step"] for line in runs.read_lines(tmp_path)] == [1]


@pytest.mark.parametrize("damage", [corruption.flip, corruption.truncate, corruption.zero_tail, corruption.delete])
def test_damages_do_damage(tmp_path, damage):
    for seed in range(20):
        (tmp_path / "file").write_bytes(bytes(50))
        damage(tmp_path / "file", random.Random(seed))
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes() != bytes(50)


def test_a_row_fails_where_one_trial_failed_or_none_was_made():
    options = runs.parser("x", "X.").parse_args([])
    good, bad, none = (runs.Row("R", name) for name in ("good", "bad", "none"))
    good.trial()
    bad.trial(["wrong"])
    assert runs.finish(options, "x", [good], 1) == 0
    assert runs.finish(options, "x", [good, bad], 1) == 1
    assert runs.finish(options, "x", [good, none], 1) == 1


def test_a_loss_is_made_nan_where_it_is_told(tmp_path):
    """The step that the checks of non-finite losses stand on, in a real run."""
    path, flags = tmp_path / "run", ("--set", "max_steps=8", "--set", "backend.kind=single")
    words = ("env", "FAULT_NAN=0:5", "python", "benchmarks/faults/launch.py", "--spec", "benchmarks/faults/spec.json")
    done = run(*words, "--run-dir", str(path), *flags)
    assert done.returncode == 4 and "at step" in done.stderr, done.stdout[-500:] + done.stderr[-2000:]
    assert any(line["bad_ranks"] == [0] for line in runs.read_lines(path))
