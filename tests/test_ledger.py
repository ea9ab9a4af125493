"""The ledger against live tensors on configurations drawn by benchmarks/ledger.py: a slice of its 200."""

import json

import pytest
from processes import SPECS, python

from benchmarks.ledger import BACKENDS, MEDIAN, PART, STEPS_3, WORST, compare, draw, summary

CHECKED = ("single", "fsdp", "zero2-small", "zero3", "zero2-offload")
"""Of the backends there, one configuration each."""


FOUND = {  # what draws have found: the ledger was off by 1 to 19 %
    "ZeRO-3 frees what recomputation keeps a copy of": (
        *("llama-parity", 8, "zero3-small"),
        {"activation_checkpointing": "full", "batch": {"global_batch_size": 16, "micro_batch_size": 2}},
    ),
    "torch's linear layer keeps a view of a weight that ZeRO-3 frees": (
        *("llama-parity", 64, "zero3"),
        {
            "activation_checkpointing": "selective",
            "objective.cross_entropy": "plain",
            "precision": "bf16",
            "model.hidden_size": 128,
            "model.vocab_size": 4099,
            "model.tie_word_embeddings": True,
            "batch": {"global_batch_size": 64, "micro_batch_size": 1},
        },
    ),
    "gradients larger than the bucket, on their way to the host": (
        *("gpt-parity", 3, "zero1-offload"),
        {
            "precision": "bf16",
            "model.hidden_size": 256,
            "model.vocab_size": 4099,
            "batch": {"global_batch_size": 6, "micro_batch_size": 2},
        },
    ),
    "stage 1 offloads after the last micro-step alone": (
        *("llama-parity", 64, "zero1-offload"),
        {"batch": {"global_batch_size": 128, "micro_batch_size": 1}},
    ),
    "recomputation keeps frozen parameters themselves, which ZeRO-3 frees, and adapters are gathered as all others": (
        *("gpt-parity", 3, "zero3-small"),
        {
            "precision": "bf16",
            "activation_checkpointing": "full",
            "model.hidden_size": 192,
            "model.intermediate_size": 774,
            "lora": {"rank": 33, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]},
            "batch": {"global_batch_size": 12, "micro_batch_size": 4},
        },
    ),
}

ADAPTERS = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear"}
FOUND |= {
    f"frozen parts whole on every rank: {backend} {precision}, checkpointing {mode}": (
        *("gpt-parity" if precision == "bf16" else "llama-parity", 4, backend),
        {
            "lora": ADAPTERS,
            "precision": precision,
            "activation_checkpointing": mode,
            "model.hidden_size": 192,
            "batch": {"global_batch_size": 8, "micro_batch_size": 1},
        },
    )
    for backend in ("fsdp-replicate", "zero3-replicate")
    for precision, mode in (("bf16", "none"), ("fp32", "full"))
}

CHAT = {"data": {"kind": "chat", "train": ["python-stdlib"], "sequence_length": 64}, "objective": {"kind": "sft"}}
FOUND |= {
    "pairs, and ZeRO-3": (
        *("llama-parity", 4, "zero3"),
        {
            "data": {"kind": "preference", "train": ["python-stdlib"], "sequence_length": 64},
            "objective": {"kind": "dpo"},
            "precision": "bf16",
        },
    ),
    "packed, rotary positions and ZeRO-3": ("llama-parity", 4, "zero3", {**CHAT, "precision": "bf16"}),
    "packed, recomputed": ("llama-parity", 2, "fsdp", {**CHAT, "activation_checkpointing": "selective"}),
    "packed, learned positions, logits of all tokens": (
        *("gpt-parity", 2, "ddp"),
        {**CHAT, "objective": {"kind": "sft", "cross_entropy": "plain"}, "precision": "bf16"},
    ),
}


PPO = {
    "model.value_head": True,
    "data": {"kind": "chat", "train": ["python-stdlib"], "sequence_length": 64, "packing": False},
    "objective": {"kind": "ppo", "reward": {"kind": "overlap"}, "max_new_tokens": 6, "rollout_steps": 2},
    "param_groups": [{"name": "all", "match": ["*"]}],
}


@pytest.mark.parametrize(
    ("backend", "precision"),
    [
        ("zero2", "bf16"),
        pytest.param("zero3", "bf16", marks=pytest.mark.long),
        pytest.param("single", "bf16", marks=pytest.mark.long),
        pytest.param("ddp", "fp32", marks=pytest.mark.long),
        pytest.param("fsdp", "bf16", marks=pytest.mark.long),
    ],
)
def test_rollouts_and_the_steps_after_them_are_counted_as_played(backend, precision):
    """Rank 0 answers, scores with the model and the reference, and trains."""
    world_size = 1 if backend == "single" else 2
    batch = {"global_batch_size": 4 * world_size, "micro_batch_size": 2}
    changes = {"backend": BACKENDS[backend], "precision": precision, "batch": batch} | PPO
    settings = [f"{field}={json.dumps(value)}" for field, value in changes.items()]
    cell = {"spec": str(SPECS / "llama-parity.json"), "world_size": world_size, "set": settings, "steps": STEPS_3}
    (row,) = compare([{**cell, "name": f"ppo {backend}"}])
    assert "error" not in row, row
    assert abs(row["off"]) <= 0.01 and row["worst_part"] <= 0.02, row
    assert all(abs(row["by_phase"][phase]) <= 0.01 for phase in ("forward", "backward")), row
    # Under ZeRO-3 a rollout has held 7.5 % more than is played; a step's peak is above it either way.
    assert abs(row["by_phase"]["rollout"]) <= (0.1 if backend == "zero3" else 0.05), row


@pytest.fixture(scope="module", params=["decoder", pytest.param("vla", marks=pytest.mark.long)])
def rows(request, tmp_path_factory):
    return list(compare(list(draw(len(CHECKED), 11, list(CHECKED), tmp_path_factory.mktemp("drawn"), request.param))))


LONG = {name for name, (_, world_size, *_) in FOUND.items() if world_size > 4 or "replicate fp32" in name}


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.long) if one in LONG else one for one in FOUND])
def test_what_was_mended_stays_so(name):
    spec, world_size, backend, changes = FOUND[name]
    settings = [f"{field}={json.dumps(value)}" for field, value in ({"backend": BACKENDS[backend]} | changes).items()]
    cell = {"spec": str(SPECS / f"{spec}.json"), "world_size": world_size, "set": settings, "steps": STEPS_3}
    (row,) = compare([{**cell, "name": f"found {name}"}])
    assert "error" not in row, row
    assert abs(row["off"]) <= 0.005 and row["worst_part"] <= 0.005, row


@pytest.mark.parametrize("backend", CHECKED)
def test_the_played_peak_is_the_counted_one(rows, backend):
    mine = [row for row in rows if row["name"].split()[1] == backend]
    assert len(mine) == 1
    for row in mine:
        assert "error" not in row, row
        assert abs(row["off"]) <= WORST and row["worst_part"] <= PART, row


def test_the_median_over_all_is_close(rows):
    assert summary(rows)["median"] <= MEDIAN


def test_a_draw_is_made_of_its_seed(tmp_path):
    first, again, other = ([cell["name"] for cell in draw(20, seed, list(CHECKED), tmp_path)] for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 20


def test_a_matrix_has_a_row_for_each_cell_and_failures_are_rows(tmp_path):
    spec, out, cells = str(SPECS / "gpt-parity.json"), tmp_path / "out.json", tmp_path / "cells.json"
    ddp, wrong = 'backend={"kind":"ddp"}', "model.hidden_size=33"
    cells.write_text(
        json.dumps(
            [
                {"spec": spec, "world_size": 2, "set": [ddp]},
                {"spec": spec, "world_size": 2, "set": [ddp, wrong]},
                {"spec": spec, "world_size": 1},
            ]
        )
    )
    done = python("-m", "scaling.rehearse", "--matrix", str(cells), "--steps", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr
    first, second, third = json.loads(out.read_text())
    assert first["world_size"] == 2 and third["world_size"] == 1
    assert min(found["memory"]["peak_allocated_bytes"] for found in (first, third)) > 1e6
    assert "model.hidden_size" in second["error"] and len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("text", ["{", "3", "[3]", '[{"spec": "x"}]', '[{"spec": "x", "world_size": 1, "sets": []}]'])
def test_a_matrix_that_is_none_is_told_in_one_line(tmp_path, text):
    (tmp_path / "cells.json").write_text(text)
    done = python("-m", "scaling.rehearse", "--matrix", str(tmp_path / "cells.json"))
    assert done.returncode == 2 and "`--matrix` must be" in done.stderr and "Traceback" not in done.stderr
