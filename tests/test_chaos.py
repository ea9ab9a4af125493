"""The short form of benchmarks/faults/chaos.py: a few kills for two backends. The long form is run by hand."""

import json

import pytest

from benchmarks.faults import chaos


@pytest.mark.long
@pytest.mark.parametrize("backend", ["fsdp", "zero2"])
def test_kills_leave_no_trace(tmp_path, backend):
    out = tmp_path / "result.json"
    arguments = ["--backend", backend, "--kills", "2", "--steps", "20", "--limit-s", "120", "--out", str(out)]
    assert chaos.main(arguments) == 0
    result = json.loads(out.read_text())
    assert (result["kills"], result["runs_finished"], result["failures"]) == (2, 1, 0), result
