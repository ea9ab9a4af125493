"""The record of predictions beside measurements: what is gathered, what is scored."""

import json

import pytest
from processes import ROOT

from benchmarks.calibration import read_rows, rows_of, table, write_rows
from benchmarks.calibration.__main__ import MATRIX, RESULTS, ROWS
from benchmarks.published import FITTED_ON
from scaling import parity
from scaling.errors import UserError
from scaling.run import resolve
from scaling.spec import load_spec


def run_folder(tmp_path, *, peaks, seconds, predicted_seconds):
    (tmp_path / "spec.json").write_text(
        json.dumps(
            {
                "name": "mine",
                "backend": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
                "activation_checkpointing": "full",
                "precision": "bf16",
            }
        )
    )
    plan = {"memory": {"peak_allocated_bytes": 900}, "world_size": 4, "micro_batch_size": 2, "device": "NVIDIA H200"}
    plan["time"] = predicted_seconds and {"step_seconds": predicted_seconds}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "environment.json").write_text(json.dumps({"versions": {"torch": "2.13.0"}}))
    lines = [
        {"memory": {"allocated_peak_bytes": peak}, "step_seconds": second}
        for peak, second in zip(peaks, seconds, strict=True)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_run_on_a_gpu_is_a_row(tmp_path):
    folder = run_folder(tmp_path, peaks=[800, 1000, 1000], seconds=[9.0, 2.0, 2.2], predicted_seconds=2.0)
    (row,) = rows_of(folder)
    assert (row["backend"], row["world_size"], row["device"]) == ("zero2-offload", 4, "NVIDIA H200")
    assert row["predicted"]["bytes"] == 900 and row["measured"]["bytes"] == 1000
    assert row["measured"]["seconds"] == pytest.approx(2.1), "the first line has the warm-up in it"
    assert row["versions"] == {"torch": "2.13.0"} and not row["fitted"]
    memory, speed = table([row])
    assert (memory["quantity"], memory["of"], memory["rows"]) == ("memory", "zero2-offload", 1)
    assert memory["bias"] == pytest.approx(-0.1) and memory["worst"] == pytest.approx(0.1)
    assert speed["bias"] == pytest.approx(0.05), "5 % too fast"


def test_a_run_on_a_cpu_measured_nothing_that_was_predicted(tmp_path):
    assert rows_of(run_folder(tmp_path, peaks=[None, None], seconds=[2.0, 2.0], predicted_seconds=None)) == []


def test_fitted_rows_are_never_scored():
    rows = rows_of(RESULTS / "published.json")
    timed = [row for row in rows if row["origin"] == "published, time"]
    fitted = {row["id"] for row in timed if row["fitted"]}
    assert fitted == set(FITTED_ON) and len(timed) > len(fitted)
    lines = {(line["fitted"], line["origin"]): line for line in table(rows)}
    assert lines[True, "published, time"]["rows"] == len(fitted)
    scored = lines[False, "published, time"]
    assert scored["rows"] == len(timed) - len(fitted)
    assert scored["median"] == pytest.approx(json.loads((RESULTS / "published.json").read_text())["summary"][
        "scored, grade A"
    ]["median"])  # fmt: skip


def test_categories_are_shares_of_the_whole():
    row = {"origin": "trace", "what": "x", "backend": "fsdp", "fitted": False}
    row["predicted"] = {"bytes": 110, "parts": {"optimizer": 60, "logits": 50}, "seconds": None}
    row["measured"] = {"bytes": 100, "parts": {"optimizer": 40, "logits": 60}, "seconds": None}
    found = {line["of"]: line["bias"] for line in table([row]) if line["quantity"] == "category"}
    assert found == pytest.approx({"optimizer": 0.2, "logits": -0.1})
    assert all(line["quantity"] != "category" for line in table([row | {"fitted": True}]))


def test_the_last_of_rows_with_one_id_is_kept(tmp_path):
    row = {"id": "a", "origin": "run", "what": "x", "measured": 1}
    write_rows(tmp_path / "rows", [row, row | {"id": "b"}, row | {"measured": 2}])
    assert [(row["id"], row["measured"]) for row in read_rows(tmp_path / "rows")] == [("a", 2), ("b", 1)]


def test_the_rows_of_this_repository_stand():
    rows = read_rows(ROWS)
    traced = [row for row in rows if row["origin"] == "trace"]
    assert len(traced) >= 10 and all(row["device"] == "fake tensors, cpu kernels" for row in traced)
    for row in traced:
        assert abs(row["predicted"]["bytes"] / row["measured"]["bytes"] - 1) <= 0.03, row["what"]
    assert len(rows_of(RESULTS / "ledger-cpu.json")) >= 200


@pytest.mark.parametrize("name", ["README.md", "scaling", "none.json", "scaling/spec/schema.json"])
def test_what_is_no_source_is_told(name):
    with pytest.raises(UserError, match="a source must be"):
        rows_of(ROOT / name)


@pytest.mark.parametrize(("recipe", "backend", "ranks", "mode"), MATRIX)
def test_every_cell_of_the_matrix_can_be_run(recipe: str, backend: str, ranks: int, mode: str) -> None:
    settings = [f"backend={json.dumps(parity.BACKENDS[backend])}", f"activation_checkpointing={mode}"]
    assert resolve(load_spec(recipe, settings), ranks).plan.world_size == ranks
