"""SIGTERM and SIGINT under each launcher: the run saves at the end of its step, and the same command goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from processes import ENVIRONMENT, ROOT
from test_resume import SPEC, curve

from scaling.checkpoint.store import Store

LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": ["torchrun", "--nproc_per_node=2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
}


def command(launcher, folder, steps):
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    backend = {"kind": "single"} if launcher == "python" else {"kind": "fsdp"}
    changes = {"backend": backend, "max_steps": steps, "checkpoint": {"interval": 10**6, "best": False}}
    folder.with_suffix(".json").write_text(json.dumps(SPEC | changes | {"validation": None}))
    more = ["--master_port", str(port)] if launcher == "deepspeed" else []
    words = ["launch/train.py", "--spec", str(folder.with_suffix(".json")), "--run-dir", str(folder)]
    return [*LAUNCHERS[launcher], *more, *words]


@pytest.mark.fault("F2")
@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        ("python", "SIGTERM", False),
        # Launchers are tried by tests/test_watch.py too.
        pytest.param("deepspeed", "SIGINT", True, marks=pytest.mark.long),
        pytest.param("torchrun", "SIGTERM", False, marks=pytest.mark.long),
    ],
)
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path, launcher, number, to_all):
    """To the launcher alone, as a scheduler sends it, or to the whole group, as Ctrl-C does."""
    folder = tmp_path / "run"
    run = subprocess.Popen(
        command(launcher, folder, 100_000),
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or (folder / "metrics.jsonl").read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline and run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(run.pid, getattr(signal, number))
    output = run.communicate(timeout=60)[0]
    ended = json.loads((folder / "exit.json").read_text())
    assert ended["code"] == 75 and "stopped by a signal after step" in ended["reason"], output
    assert launcher != "python" or run.returncode == 75
    step = ended["step"]
    assert Store(folder / "checkpoints").steps() == [step] and [row[0] for row in curve(folder)] == [
        *range(1, step + 1)
    ]

    whole = tmp_path / "whole"
    for place in (folder, whole):
        # The schedule is that of all steps: only the end is nearer.
        words = [*command(launcher, place, 100_000), "--stop-after", str(step + 2)]
        done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    assert curve(folder) == curve(whole)
    assert Store(folder / "checkpoints").steps() == [step, step + 2]


@pytest.mark.fault("F4")
def test_a_stop_without_the_time_to_save_says_so_and_keeps_the_last_checkpoint(tmp_path):
    """The disk is slowed down by what no checkpoint of this model would take."""
    folder = tmp_path / "run"
    words = command("python", folder, 100_000)
    words += ["--set", "checkpoint.interval=5", "--set", "checkpoint.grace=1.0"]
    slow = tmp_path / "slow" / "sitecustomize.py"
    slow.parent.mkdir()
    slow.write_text(
        "import os, time\nreal = os.fsync\n"
        "def fsync(descriptor):\n"
        "    time.sleep(2.0 if 'distcp' in os.readlink(f'/proc/self/fd/{descriptor}') else 0)\n"
        "    real(descriptor)\n"
        "os.fsync = fsync\n"
    )
    slowed = ENVIRONMENT | {"PYTHONPATH": str(slow.parent)}
    run = subprocess.Popen(words, cwd=ROOT, env=slowed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    store, deadline = Store(folder / "checkpoints"), time.monotonic() + 120
    while len(store.steps()) < 2:
        assert time.monotonic() < deadline and run.poll() is None, run.stdout.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output = run.communicate(timeout=60)[0]
    assert run.returncode == 143, output
    ended = json.loads((folder / "exit.json").read_text())
    assert (ended["code"], "which is not saved: saving takes" in ended["reason"]) == (143, True), ended
    assert store.steps() and store.steps()[-1] < ended["step"]
    assert "NO CHECKPOINT" not in output
