"""What may differ between a checkpoint and the job that goes on from it."""

import copy

import pytest
from processes import SPECS

from scaling.checkpoint.compare import compare
from scaling.spec import load_spec

SPEC = load_spec(str(SPECS / "gpt-parity.json")).to_json()
SAVED = {
    "spec": SPEC,
    "shapes": {"a": [2, 3], "b": [4]},
    "trainable": ["a"],
    "global_batch": 12,
    "sequence_length": 32,
    "seed": 7,
    "data": "digest",
}


def changed(path: str, value: object, **identity: object) -> dict:
    today = copy.deepcopy(SAVED) | identity
    *parents, last = path.split(".")
    place = today["spec"]
    for name in parents:
        place = place[name]
    place[last] = value
    return today


def test_nothing_changed():
    found = compare(SAVED, copy.deepcopy(SAVED), ())
    assert (found.harmless, found.continues, found.allowed, found.impossible) == ([], [], [], [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("profile.interval", 99),
        ("name", "other"),
        ("backend", {"kind": "ddp"}),
        ("checkpoint", None),
        ("batch.micro_batch_size", 1),
        ("compile", True),
        ("data.train", ["elsewhere"]),
    ],
)
def test_harmless(path, value):
    found = compare(SAVED, changed(path, value), ())
    assert len(found.harmless) == 1 and not (found.continues or found.impossible)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.lr", 0.5),
        ("max_steps", 77),
        ("schedule", {"kind": "constant"}),
        ("precision", "bf16"),
        ("data.sequence_curriculum", {"min_length": 8, "steps": 9}),
    ],
)
def test_goes_on_otherwise(path, value):
    found = compare(SAVED, changed(path, value), ())
    assert len(found.continues) == 1 and not (found.harmless or found.impossible)


@pytest.mark.parametrize(
    ("path", "value"),
    [("model.hidden_size", 4096), ("model.activation", "relu"), ("model.kind", "vla"), ("objective.kind", "dpo")],
)
def test_impossible(path, value):
    (message,) = compare(SAVED, changed(path, value), ()).impossible
    assert message.startswith(f"`{path}` must be as in the checkpoint (") and "; put it back, or " in message


@pytest.mark.parametrize(
    ("identity", "field"),
    [
        ({"global_batch": 24}, "batch.global_batch_size"),
        ({"sequence_length": 64}, "data.sequence_length"),
        ({"seed": 8}, "seed"),
        ({"data": "other"}, "data"),
    ],
)
def test_another_order_of_the_data_is_refused_unless_allowed(identity, field):
    today = SAVED | identity
    (message,) = compare(SAVED, today, ()).impossible
    assert f"`{field}` must" in message and f"`--allow-change {field}`" in message
    found = compare(SAVED, today, (field,))
    assert [change.field for change in found.allowed] == [field] and not found.impossible


def test_other_parameters_are_refused():
    (message,) = compare(SAVED, SAVED | {"shapes": {"a": [2, 3]}}, ()).impossible
    assert "`model`" in message and "'b'" in message
    (message,) = compare(SAVED, SAVED | {"trainable": ["a", "b"]}, ()).impossible
    assert "`param_groups`" in message and "b" in message
