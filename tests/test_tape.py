"""The played step against the real one: every peak, counted from live tensors, and by hand where that is easy."""

import json

import pytest
from processes import SPECS

from scaling.estimate.step import play
from scaling.estimate.tape import Leaf, Node, Split, Storage, Tape, backward
from scaling.rehearse import rehearse_all
from scaling.run import resolve
from scaling.spec import load_spec

SINGLE = ['backend={"kind": "single"}']


def test_a_storage_counts_while_somebody_refers_to_it():
    tape = Tape(rounding=1)
    with tape.during("a", "one"):
        first = Storage(tape, 100)
        second = first
        del first
        assert tape.total == 100
        del second
        assert tape.total == 0 and tape.peak.parts == {"one": 100}


def test_blocks_are_rounded_up():
    tape = Tape()
    keep = [Storage(tape, 1), Storage(tape, 512), Storage(tape, 513)]
    assert tape.total == 512 + 512 + 1024
    del keep


def gradient_sizes(tape, sizes):
    return lambda *_: [None if size is None else Storage(tape, size) for size in sizes]


def test_two_gradients_of_one_value_become_a_third():
    """x -> a, b -> sum: both send x a gradient of 10 bytes."""
    tape = Tape(rounding=1)
    leaf = Leaf(tape)
    a, b = (Node(tape, [leaf], [], gradient_sizes(tape, [10])) for _ in range(2))
    root = Node(tape, [a, b], [], lambda gradient, _: [gradient, gradient])
    with tape.during("backward", "x"):
        backward(tape, root, Storage(tape, 10))
    assert leaf.grad is not None and leaf.grad.bytes == 10 and tape.total == 10
    # The first two and their sum; the gradient of the sum is gone by then.
    assert tape.peak.bytes == 30


def test_the_parts_of_a_split_are_not_added_up():
    tape = Tape(rounding=1)
    leaf = Leaf(tape)
    split = Split(tape, [leaf], [], gradient_sizes(tape, [20]))
    ends = [Node(tape, [split], [], gradient_sizes(tape, [10])) for _ in range(2)]
    root = Node(tape, ends, [], lambda gradient, _: [gradient, gradient])
    with tape.during("backward", "x"):
        backward(tape, root, Storage(tape, 20))
    assert leaf.grad is not None and leaf.grad.bytes == 20 == tape.total


def test_a_leaf_adds_to_the_gradient_that_is_there():
    tape = Tape(rounding=1)
    leaf = Leaf(tape)
    for _ in range(2):
        backward(tape, Node(tape, [leaf], [], gradient_sizes(tape, [10])), Storage(tape, 1))
        assert tape.total == 10


def test_what_is_kept_is_gone_after_its_node():
    tape = Tape(rounding=1)
    leaf = Leaf(tape)
    inner = Node(tape, [leaf], [Storage(tape, 1000)], gradient_sizes(tape, [10]))
    outer = Node(tape, [inner], [Storage(tape, 500)], gradient_sizes(tape, [20]))
    with tape.during("backward", "x"):
        backward(tape, outer, Storage(tape, 20))
    assert tape.total == 10 and tape.peaks["backward"].bytes == 1000 + 500 + 20 + 20


CASES = {
    "gpt": ("gpt-parity", {}),
    "llama, grouped queries": ("llama-parity", {}),
    "all train": ("gpt-parity", {"param_groups": [{"name": "all", "match": ["*"]}]}),
    "embeddings frozen": (
        "llama-parity",
        {"param_groups": [{"name": "f", "match": ["embed*"], "freeze": True}, {"name": "rest", "match": ["*"]}]},
    ),
    "relu, untied, no bias": (
        "gpt-parity",
        {"model.activation": "relu", "model.tie_word_embeddings": False, "model.bias": False},
    ),
    "wide": ("llama-parity", {"model.hidden_size": 256, "model.intermediate_size": 700}),
    "long": ("gpt-parity", {"model.max_position_embeddings": 256, "data.sequence_length": 256}),
}


def cell(case, precision):
    name, changes = case
    changes = {"batch": {"global_batch_size": 6, "micro_batch_size": 3}, "precision": precision, **changes}
    assignments = [*SINGLE, *(f"{field}={json.dumps(value)}" for field, value in changes.items())]
    return {"spec": str(SPECS / f"{name}.json"), "world_size": 1, "set": assignments}


@pytest.fixture(scope="module")
def rehearsed():
    """(case, precision) -> what it holds in reality."""
    keys = [(case, precision) for case in CASES for precision in ("fp32", "bf16")]
    reports = rehearse_all([cell(CASES[case], precision) for case, precision in keys], 2)
    return dict(zip(keys, reports, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_the_played_step_is_the_real_one(rehearsed, case, precision):
    assert "error" not in rehearsed[case, precision], rehearsed[case, precision]
    real, wanted = rehearsed[case, precision]["memory"], rehearsed[case, precision]["cell"]
    job = resolve(load_spec(wanted["spec"], wanted["set"]), 1)
    played = play(job.spec, job.plan, job.groups, job.rendered)
    found = {phase: played.peaks[phase].bytes for phase in ("build", "forward", "backward")}
    assert found["build"] == real["phases"]["build"]
    assert found["forward"] == real["phases"]["forward"]
    assert found["backward"] == pytest.approx(real["phases"]["backward"], rel=0.005)
    assert played.peak.bytes == real["peak_allocated_bytes"] and played.peak.phase == real["peak_phase"]
