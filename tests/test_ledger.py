"""The ledger against live tensors on configurations drawn by benchmarks/ledger.py: a slice of its 200."""

import json

import pytest
from processes import SPECS, python

from benchmarks.ledger import MEDIAN, PART, WORST, compare, draw, summary

CHECKED = ("single", "fsdp", "hsdp", "zero1", "zero2-small", "zero3", "zero2-offload", "fsdp-offload")
"""Of the backends there, one configuration each."""


@pytest.fixture(scope="module", params=["decoder", "vla"])
def rows(request, tmp_path_factory):
    cells = list(draw(len(CHECKED), 11, list(CHECKED), tmp_path_factory.mktemp("drawn"), request.param))
    return list(compare(cells))


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
