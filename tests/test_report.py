"""What a run did beside what was predicted: from the files of its folder, and of a real run."""

import json

import pytest
from processes import SPECS, python

from scaling.errors import UserError
from scaling.report import run_report

GiB = 2**30


def line(step, seconds, allocated, loss=1.0, mfu=0.4):
    memory = {"allocated_peak_bytes": allocated, "reserved_peak_bytes": None, "device_used_bytes": None}
    return {
        "step": step,
        "loss": loss,
        "step_seconds": seconds,
        "mfu": mfu,
        "tokens_per_second_per_device": 100 / seconds,
        "memory": {**memory, "host_rss_bytes": 5},
    }


def run_folder(folder, lines, **plan):
    memory = {"peak_allocated_bytes": 10 * GiB, "peak_reserved_bytes": 11 * GiB, "device_used_bytes": 12 * GiB}
    duration = {"step_seconds": 2.0, "tokens_per_second_per_gpu": 50.0, "mfu": 0.5}
    plan = {"device": "NVIDIA H200", "world_size": 8, "memory": memory, "time": duration, **plan}
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


def test_predicted_and_measured_stand_side_by_side(tmp_path):
    # The first two warm up; step 4 was taken again after a crash; the last line is still being written.
    lines = [line(1, 9, 8 * GiB), line(2, 9, 8 * GiB), line(3, 2, 9 * GiB), line(4, 7, 9 * GiB), line(4, 3, 11 * GiB)]
    folder = run_folder(tmp_path, [*lines, line(5, 4, 9 * GiB, loss=0.5)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    found = run_report(folder)
    assert found["measured"]["step_seconds"] == 3 and found["measured_to_predicted"]["step_seconds"] == 1.5
    assert found["measured"]["peak_allocated_bytes"] == 11 * GiB
    assert found["measured_to_predicted"]["peak_allocated_bytes"] == pytest.approx(1.1)
    assert found["measured_to_predicted"]["mfu"] == pytest.approx(0.8)
    assert found["measured"]["device_used_bytes"] is None is found["measured_to_predicted"]["device_used_bytes"]
    assert found["logged_steps"] == found["last_step"] == 5 and found["loss"] == {"first": 1.0, "last": 0.5}


def test_what_is_not_known_is_null(tmp_path):
    folder = run_folder(tmp_path, [line(1, 2, None, loss=None, mfu=None)], time=None)
    found = run_report(folder)
    assert found["predicted"]["step_seconds"] is None is found["measured"]["step_seconds"]
    assert found["measured"]["peak_allocated_bytes"] is None is found["exit"]
    told = python("-m", "scaling.report", str(folder)).stdout
    assert "loss not finite -> not finite" in told and "it has not ended, or was killed" in told


def test_a_real_run(tmp_path):
    folder = tmp_path / "run"
    spec = ["--spec", str(SPECS / "gpt-parity.json"), "--set", "backend.kind=single", "--set", "max_steps=6"]
    done = python("-m", "scaling.train", *spec, "--set", "profile.interval=1", "--run-dir", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    one = json.loads(python("-m", "scaling.report", str(folder), "--json").stdout)
    assert one["exit"]["code"] == 0 and one["last_step"] == 6 and one["measured"]["step_seconds"] > 0
    assert one["predicted"]["peak_allocated_bytes"] > 0 and one["device"] == "cpu"
    told = python("-m", "scaling.report", str(folder), str(folder)).stdout
    assert told.count("measured / predicted") == 2 and "`python -m scaling.rehearse` counts live tensors" in told


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    for write, message in ((False, "has no plan.json"), (True, "has no logged step in metrics.jsonl")):
        if write:
            run_folder(tmp_path, [])
        with pytest.raises(UserError, match=message):
            run_report(tmp_path)
    (tmp_path / "plan.json").write_text("[1]")
    done = python("-m", "scaling.report", str(tmp_path))
    assert done.returncode == 2 and "must hold a JSON object" in done.stderr and "Traceback" not in done.stderr
