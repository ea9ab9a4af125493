"""The run folder between two starts: whose it is, how often it was tried, what a broken line becomes."""

import json
import os
import subprocess
import sys
import time

import pytest
from processes import ROOT

from scaling.errors import NoProgress, StorageError
from scaling.run_folder import LOCK, METRICS, RESTARTS, RunLock, count_start, mend_lines, open_run_folder, write_exit

HOLD = "import sys, time\nfrom pathlib import Path\nfrom scaling.run_folder import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)\n"


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / LOCK], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_holds_is_refused_at_once_with_its_name(tmp_path, holder):
    began = time.monotonic()
    with pytest.raises(StorageError, match=f"held by process {holder.pid} on {os.uname().nodename} since 20"):
        open_run_folder(tmp_path, resume="auto", saves=True)
    assert time.monotonic() - began < 1


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.kill()
    open_run_folder(tmp_path, resume="auto", saves=True).close()
    holder.wait()
    open_run_folder(tmp_path, resume="auto", saves=True).close()


def test_of_many_at_once_one_gets_the_lock(tmp_path):
    code = HOLD.replace("time.sleep(60)", "sys.stdin.read()")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / LOCK],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for _ in range(12)
    ]
    first = {process.stdout.readline() for process in processes}
    outcomes = [process.communicate() for process in processes]
    assert first == {b"held\n", b""} and sum(b"held by process" in error for _, error in outcomes) == 11


def test_a_lock_file_that_nobody_holds_means_nothing(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": os.uname().nodename, "since": "once"}))
    RunLock(tmp_path / LOCK).close()
    (tmp_path / LOCK).write_text("garbage")
    RunLock(tmp_path / LOCK).close()


@pytest.mark.parametrize(
    ("resume", "saves", "refused"), [("auto", True, False), ("never", True, True), ("auto", False, True)]
)
def test_a_run_is_entered_to_go_on_and_never_written_over(tmp_path, resume, saves, refused):
    (tmp_path / METRICS).write_text('{"step": 1}\n')
    if refused:
        with pytest.raises(StorageError, match="without a run in it"):
            open_run_folder(tmp_path, resume=resume, saves=saves)
        open_run_folder(tmp_path, resume="auto", saves=True).close()
    else:
        open_run_folder(tmp_path, resume=resume, saves=saves).close()
    assert (tmp_path / METRICS).read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("path", ["file", "file/below", "/proc/none", "x" * 300, "nul\0"])
def test_a_folder_that_cannot_be_is_refused_in_one_line(tmp_path, path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError) as refusal:
        open_run_folder(tmp_path / path, resume="auto", saves=True)
    assert "\n" not in str(refusal.value) and "`--run-dir`" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "mended"),
    [(b"", b""), (b"a\n", b"a\n"), (b"a\nb", b"a\n"), (b"half", b""), (b"a\n" + b"x" * 5000, b"a\n")],
)
def test_a_line_that_was_broken_off_is_cut_off(tmp_path, text, mended):
    (tmp_path / METRICS).write_bytes(text)
    mend_lines(tmp_path / METRICS)
    assert (tmp_path / METRICS).read_bytes() == mended


def start(folder, newest, limit=3, spec="a"):
    count_start(folder, newest=newest, limit=limit, spec={"name": spec})


@pytest.mark.fault("F9")
def test_the_third_restart_without_progress_is_refused(tmp_path):
    for _ in range(3):
        start(tmp_path, 10)
    with pytest.raises(NoProgress, match="started again 3 times with step 10 as its newest checkpoint") as refusal:
        start(tmp_path, 10)
    assert refusal.value.code == 7
    with pytest.raises(NoProgress):  # and again
        start(tmp_path, 10)
    (tmp_path / RESTARTS).unlink()
    start(tmp_path, 10)


@pytest.mark.fault("F9")
def test_progress_another_spec_a_good_end_and_no_limit_begin_the_count_anew(tmp_path):
    for newest in (None, None, 2, 2, 2, 4, 4):
        start(tmp_path, newest)
    for _ in range(2):
        start(tmp_path, 4, spec="b")
    for _ in range(5):
        write_exit(tmp_path, code=75, reason="a signal", rank=0, step=4)
        start(tmp_path, 4, spec="b")
    for _ in range(5):
        start(tmp_path, 4, limit=None)
    (tmp_path / RESTARTS).write_text("garbage")
    start(tmp_path, 4)
