"""Published runs as specs: rows parse, metrics are known, and what fitted is said to fit."""

import csv

import pytest

from benchmarks.published import (
    COUNTERS,
    FITS_FROM,
    MEMORY_MEDIAN,
    ROOM,
    ROOM_FROM,
    ROWS,
    compare_memory,
    load_runs,
    memory_summaries,
    wrongly_said,
)


@pytest.fixture(scope="module")
def runs():
    return {run.row["id"]: run for run in load_runs()}


def test_every_row_becomes_a_run(runs):
    with ROWS.open(newline="", encoding="utf-8") as file:
        assert set(runs) == {row["id"] for row in csv.DictReader(file)}


def test_every_metric_is_mapped_to_a_counter(runs):
    for run in runs.values():
        for value, metric in (("mem_peak_GiB", "mem_metric"), ("mem2_GiB", "mem2_metric")):
            assert not run.row[value] or run.row[metric] in COUNTERS
        assert not run.row["mem_peak_GiB"] or COUNTERS[run.row["mem_metric"]]


def test_reserved_is_more_than_allocated(runs):
    """gt0063 published both counters, gt0399 what was allocated."""
    reserved, allocated = compare_memory([runs["gt0063"], runs["gt0399"]])
    predicted = reserved["mem_peak_GiB"] * (1 + reserved["error"])
    assert predicted == pytest.approx(ROOM * reserved["allocated"])
    assert reserved["mem2_GiB"] * (1 + reserved["error2"]) == pytest.approx(reserved["allocated"])
    assert allocated["mem_peak_GiB"] * (1 + allocated["error"]) == pytest.approx(allocated["allocated"])


def test_what_fitted_is_said_to_fit(runs):
    chosen = [runs[name] for name in ("gt0174", "gt0231", "gt0243", "gt0399", "gt1029", "gt1301", "gt1331")]
    found = compare_memory(chosen)
    assert all(row["said_to_fit"] for row in found) and not wrongly_said(found)
    too_much = dict(found[0], fitted_on_the_card=False)
    assert wrongly_said([too_much]) == [too_much]


def test_rows_a_constant_was_chosen_with_are_not_scored(runs):
    names = (*ROOM_FROM, *FITS_FROM, "gt0046", "gt0400", "gt1306")
    found = compare_memory([runs[name] for name in names])
    assert {row["id"] for row in found if row["fitted"]} == {*ROOM_FROM, *FITS_FROM}
    scored = memory_summaries(found)["memory, scored, grade A"]
    assert scored["rows"] == 3 and scored["median"] < MEMORY_MEDIAN
