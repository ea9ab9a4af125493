"""Hangs, deaths and signals, done to real ranks: tests/watch_worker.py under real launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ENVIRONMENT, ROOT

from scaling.watch.blame import Report, Waiting, blame
from scaling.watch.heartbeat import Beat, Heartbeat, HeartbeatReader, NullHeartbeat, unnamed_file
from scaling.watch.outcome import Outcome, settle, settled
from scaling.watch.peers import is_late_peer, is_lost_peer
from scaling.watch.processes import process_status

WORKER = str(ROOT / "tests" / "watch_worker.py")
LIMIT_S = 2.0
"""Time-out of a step in the worker."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of one run; afterwards nothing that it started may be left, whatever the test did."""
    before = set(os.listdir("/dev/shm"))
    yield tmp_path
    try:
        until(lambda: not any(map(alive, pids(tmp_path))), 2, "end of ranks and watchdogs")
    finally:
        for pid in filter(alive, pids(tmp_path)):
            os.kill(pid, signal.SIGKILL)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "scaling" in name} == set()


def start(*command: str, session: bool = True) -> "subprocess.Popen[str]":
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=session,
    )


def single(folder: Path, fault: str, limits: str = "{}") -> "subprocess.Popen[str]":
    return start(sys.executable, WORKER, str(folder), fault, limits)


def torchrun(folder: Path, fault: str, *options: str) -> "subprocess.Popen[str]":
    rendezvous = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *options)
    return start("torchrun", "--nproc_per_node=2", *rendezvous, WORKER, str(folder), fault)


def deepspeed(folder: Path, fault: str) -> "subprocess.Popen[str]":
    port = str(20000 + os.getpid() % 20000)
    return start("deepspeed", "--num_gpus", "2", "--master_port", port, "--no_local_rank", WORKER, str(folder), fault)


def until(condition, seconds: float, what: str) -> float:
    """Wait for a condition, and return how long it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"no {what} within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - began


def pids(folder: Path, kinds: tuple[str, ...] = ("pid", "watchdog")) -> list[int]:
    return [int(path.read_text() or 0) for kind in kinds for path in folder.glob(f"{kind}-?")]


def alive(pid: int) -> bool:
    status = process_status(pid)
    return status is not None and status.state != "Z"


def at_step(folder: Path, rank: int, step: int) -> bool:
    path = folder / f"steps-{rank}"
    return path.exists() and int(path.read_text() or 0) >= step


def exit_of(folder: Path) -> dict:
    return json.loads((folder / "exit.json").read_text())


def failure(folder: Path) -> Path:
    return folder / "failures" / "attempt-0"


@pytest.mark.fault("F6")
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("sleep", ("`data` of step 3", "rank 0 waits in all_reduce of [1] Float, the 3rd collective")),
        ("stop", ("`data` of step 3", "stopped", "rank 0 waits in all_reduce")),
        ("gil", ("`data` of step 3", "GIL", "rank 0 waits in all_reduce")),
        ("miss", ("it waits in all_reduce of [5] Float", "rank 0 waits in all_reduce of [1] Float, the 6th")),
    ],
)
def test_a_hung_rank_is_named_and_the_run_ended(folder, fault, said):
    run = torchrun(folder, fault)
    until(lambda: at_step(folder, 1, 3), 60, "third step")
    until(lambda: run.poll() is not None, LIMIT_S + 5 + (2 if fault == "miss" else 0), "end")
    assert run.stderr is not None
    errors = run.stderr.read()
    found = exit_of(folder)
    assert (found["code"], found["rank"], found["step"]) == (8, 1, 6 if fault == "miss" else 3), found
    assert all(words in found["reason"] for words in said), found["reason"]
    assert errors.count(found["reason"]) == 1
    assert found["reason"] in (folder / "train.log").read_text()
    assert errors.count("exitcode  : 8") == 2, errors
    for rank in (0, 1):
        assert "watch_worker.py" in (failure(folder) / f"stacks-rank-{rank}.txt").read_text()
        assert json.loads((failure(folder) / f"rank-{rank}.json").read_text())["rank"] == rank
    assert "go_wrong" in (failure(folder) / "stacks-rank-1.txt").read_text() or fault == "miss"


@pytest.mark.fault("F6")
def test_ranks_in_different_collectives_are_named_with_both(folder):
    run = torchrun(folder, "operation")
    until(lambda: run.poll() is not None, 60, "end")
    found = exit_of(folder)
    assert found["code"] == 8 and found["step"] == 3, found
    assert "waits in all_gather of [1] Float" in found["reason"] and "in all_reduce of [1] Float" in found["reason"]


@pytest.mark.fault("F6")
def test_ranks_with_different_shapes_end_at_once(folder):
    """gloo aborts the process."""
    run = torchrun(folder, "shape")
    until(lambda: run.poll() is not None, 60, "end")
    found = exit_of(folder)
    assert (found["code"], found["step"]) == (9, 3) and "Aborted" in found["reason"], found


@pytest.mark.fault("F6")
@pytest.mark.parametrize("fault", ["stop", "gil"])
def test_a_rank_that_is_alone_ends_with_the_code_of_a_hang(folder, fault):
    run = single(folder, fault)
    assert run.wait(LIMIT_S + 10) == 8
    found = exit_of(folder)
    assert (found["code"], found["rank"], found["step"]) == (8, 0, 3)
    until(lambda: not any(map(alive, pids(folder))), 2, "end of the watchdog")  # it writes the stacks of a stopped one
    assert "go_wrong" in (failure(folder) / "stacks-rank-0.txt").read_text()


@pytest.mark.fault("F6 control")
def test_without_a_watchdog_it_would_hang(folder):
    run = single(folder, "sleep", '{"step": 1e9}')
    until(lambda: at_step(folder, 0, 3), 20, "third step")
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(LIMIT_S + 2)
    run.kill()
    run.wait()
    until(lambda: not any(map(alive, pids(folder))), 3, "end of the watchdog")


@pytest.mark.fault("F6 control")
def test_a_slow_run_is_let_be(folder):
    """Four steps of 1.2 s each: all together longer than the time-out of one."""
    run = single(folder, "slow")
    assert run.wait(30) == 0
    assert not (folder / "exit.json").exists() and not (folder / "failures").exists()


@pytest.mark.fault("F10")
def test_a_clock_that_is_set_is_neither_a_hang_nor_hides_one(folder):
    run = single(folder, "clock")
    until(lambda: at_step(folder, 0, 3), 20, "third step")
    assert run.wait(LIMIT_S + 5) == 8
    found = exit_of(folder)
    assert found["step"] == 3
    assert abs(found["time"] - time.time()) > 3000, "the clock was not set"


@pytest.mark.fault("F6 control")
def test_a_watchdog_that_is_stopped_for_long_sees_no_hang(folder):
    """A machine that sleeps, or a job that is suspended and goes on, stops the watchdog with the rank."""
    run = single(folder, "forever")
    until(lambda: at_step(folder, 0, 3), 20, "third step")
    everyone = pids(folder)
    for pid in everyone:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(LIMIT_S + 1.5)  # what is tested is that time passes
    for pid in reversed(everyone):  # the watchdog first
        os.kill(pid, signal.SIGCONT)
    # The rank may have been stopped while it wrote its number: the file is empty then.
    until(lambda: (folder / "steps-0").read_text(), 10, "number of a step")
    step = int((folder / "steps-0").read_text() or "3")
    until(lambda: at_step(folder, 0, step + 20), 10, "going on")
    run.terminate()
    assert run.wait(10) == 75


@pytest.mark.fault("F6 control")
def test_a_watchdog_that_is_killed_does_not_matter(folder):
    run = single(folder, "blind")
    assert run.wait(20) == 0
    assert not (folder / "exit.json").exists()


@pytest.mark.fault("F7")
@pytest.mark.parametrize(
    ("fault", "cause"), [("die", "SIGKILL"), pytest.param("crash", "Segmentation fault", marks=pytest.mark.long)]
)
def test_a_dead_rank_is_named_and_the_others_end(folder, fault, cause):
    # torchrun looks every tenth of a second otherwise, and may see the death, and end rank 0, before the watchdog does.
    # It looks for the first time so long after the start, of which the ranks have used some seconds by then.
    run = torchrun(folder, fault, "--monitor-interval=8")
    until(lambda: at_step(folder, 1, 3), 60, "third step")
    until(lambda: run.poll() is not None, 10, "end")
    assert run.stderr is not None
    errors = run.stderr.read()
    found = exit_of(folder)
    assert (found["code"], found["rank"], found["step"]) == (9, 1, 3)
    assert "rank 1 died in `data` of step 3" in found["reason"]
    assert (folder / "lost-0").read_text() == found["reason"]  # what the other rank says is the same
    assert errors.count(found["reason"]) == 1
    assert "exitcode  : 9 " in errors, errors  # rank 0's
    if fault == "crash":  # how a process has died is its parent's to know; but it has dumped its stacks
        assert cause in found["reason"]
        assert "go_wrong" in (failure(folder) / "stacks-rank-1.txt").read_text()


@pytest.mark.fault("F8")
@pytest.mark.parametrize(
    ("launcher", "fault"), [(torchrun, "forever"), (torchrun, "unwatched"), (deepspeed, "forever")]
)
def test_ranks_do_not_outlive_their_launcher(folder, launcher, fault):
    run = launcher(folder, fault)
    until(lambda: at_step(folder, 0, 3) and at_step(folder, 1, 3), 90, "third step")
    ranks = pids(folder, ("pid",))
    assert all(map(alive, ranks)) and len(ranks) == 2
    run.kill()
    run.wait()
    until(lambda: not any(map(alive, pids(folder))), 5, "end of ranks and watchdogs")
    if fault == "unwatched":
        assert not (folder / "exit.json").exists()
    elif launcher is torchrun:
        assert exit_of(folder)["code"] == 9 and "torchrun died" in exit_of(folder)["reason"]
    else:  # the launcher right above them lived on, and they had the time to save
        assert (folder / "saved-0").exists() and (folder / "saved-1").exists()


@pytest.mark.fault("F8 control")
def test_without_either_guard_they_would(folder):
    run = torchrun(folder, "orphan")
    until(lambda: at_step(folder, 0, 3) and at_step(folder, 1, 3), 60, "third step")
    run.kill()
    run.wait()
    ranks = pids(folder, ("pid",))
    step = int((folder / "steps-0").read_text())
    until(lambda: at_step(folder, 0, step + 20), 10, "going on")
    assert all(map(alive, ranks))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(alive, ranks)), 3, "end")


@pytest.mark.fault("F2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_it_save(folder, number):
    run = single(folder, "forever")
    until(lambda: at_step(folder, 0, 3), 20, "third step")
    run.send_signal(number)
    run.send_signal(signal.SIGTERM)  # the launcher's echo
    assert run.wait(10) == 75
    assert (folder / "saved-0").exists() and not (folder / "exit.json").exists()


@pytest.mark.fault("F2")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_second_signal_ends_it_at_once(folder, number):
    run = single(folder, "sluggish", '{"step": 60}')
    until(lambda: at_step(folder, 0, 3), 20, "third step")
    run.send_signal(number)
    until(lambda: (folder / "saved-0").exists(), 5, "begin of the save")
    time.sleep(1.5)  # beyond the time in which signals count as echoes of the first
    run.send_signal(number)
    assert run.wait(3) == -number
    until(lambda: (folder / "exit.json").exists(), 3, "exit.json")
    assert exit_of(folder)["code"] == 128 + number
    until(lambda: not any(map(alive, pids(folder))), 3, "end of the watchdog")


@pytest.mark.fault("F3")
def test_a_forked_worker_ignores_signals_and_its_owner_does_not_hear_them():
    program = """
import os, signal, time
from scaling.watch.signals import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
with StopRequest() as stop:
    child = os.fork()
    if child == 0:
        time.sleep(600)
    time.sleep(0.2)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(child, number)
    time.sleep(0.5)
    print(os.waitpid(child, os.WNOHANG)[0], stop.requested)
    os.kill(child, signal.SIGKILL)
    print(os.waitpid(child, 0)[1])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print(stop.received.name)
print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.getsignal(signal.SIGINT).__name__)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-u", "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.stdout.splitlines() == ["0 False", "9", "SIGTERM", "True default_int_handler"], done.stderr
    assert done.returncode == -signal.SIGTERM


@pytest.mark.fault("F2")
@pytest.mark.parametrize(
    ("launcher", "number", "whole_group"),
    [
        (torchrun, signal.SIGTERM, False),
        (torchrun, signal.SIGINT, True),  # Ctrl-C
        (deepspeed, signal.SIGINT, True),
    ],
)
def test_under_a_launcher_every_rank_saves_at_the_same_step(folder, launcher, number, whole_group):
    run = launcher(folder, "forever")
    until(lambda: at_step(folder, 0, 3) and at_step(folder, 1, 3), 90, "third step")
    if whole_group:
        os.killpg(run.pid, number)
    else:
        run.send_signal(number)
    run.wait(20)
    until(lambda: not any(map(alive, pids(folder))), 10, "end of ranks and watchdogs")
    saved = [(folder / f"saved-{rank}").read_text() for rank in (0, 1)]
    assert saved[0] == saved[1]
    assert not (folder / "exit.json").exists(), exit_of(folder)


def report(rank: int, step: int, part: str = "other", wait: Waiting | None = None, **more) -> Report:
    beat = Beat(100, more.pop("phase", "step"), part, step, 0)
    joined = more.pop("joined", {wait.group: wait.sequence} if wait else {})
    settings = {"state": "S", "answers": True, **more}
    return Report(rank, "host", 1000 + rank, beat, 10.0, 5.0, kernel=None, waiting=wait, joined=joined, **settings)


def reduce(sequence: int, group: str = "0", sizes: str = "[8] Float", members=None) -> Waiting:
    return Waiting("all_reduce", group, sequence, sizes, members)


@pytest.mark.parametrize(
    ("reports", "guilty", "said"),
    [
        ([report(0, 5, wait=reduce(9)), report(1, 5, state="T")], 1, "stopped"),
        ([report(0, 5, wait=reduce(9)), report(1, 5, "data"), report(2, 5, wait=reduce(9))], 1, "(2 ranks wait)"),
        ([report(0, 6, "data"), report(1, 5, "backward"), report(2, 6, "data")], 1, "`backward` of step 5"),
        ([report(0, 5, wait=reduce(9)), report(1, 5, answers=False)], 1, "GIL"),
        ([report(0, 5, phase="validation", wait=reduce(9)), report(1, 5, phase="save")], 1, "`save` after step 5"),
        ([report(0, 5, wait=reduce(9)), report(2, 5, wait=reduce(9))], 1, "watchdog is gone"),
        (
            [
                report(0, 5, wait=reduce(9), joined={"0": 9, "1": 1}),
                report(1, 6, wait=reduce(2, "1"), joined={"0": 8, "1": 2}),
                report(2, 5, wait=reduce(9), joined={"0": 9, "1": 1}),
            ],
            1,
            "has not come to a collective",
        ),
        (
            [report(r, 5, wait=reduce(9, sizes="[9] Float" if r == 2 else "[8] Float")) for r in range(3)],
            2,
            "[9] Float",
        ),
        ([report(r, 5, wait=reduce(9)) for r in range(3)], None, "network"),
        (  # two groups of two, each waiting among itself: nobody is absent from a group that it is not in
            [report(r, 5, wait=reduce(9, "ab"[r // 2], members=[r // 2 * 2, r // 2 * 2 + 1])) for r in range(4)],
            None,
            "network",
        ),
    ],
)
def test_who_is_blamed(reports, guilty, said):
    rank, words = blame(reports, max(r.rank for r in reports) + 1)
    assert rank == guilty
    assert said in words
    assert [Report.from_json(json.loads(json.dumps(r.to_json()))) for r in reports] == reports


def test_the_first_word_stands(tmp_path):
    first, second = Outcome(8, "first", 1, 5), Outcome(9, "second", None, None)
    assert settle(tmp_path, "a", first) == (first, True)
    assert settle(tmp_path, "a", second) == (first, False)
    assert settled(tmp_path, "b") is None
    assert settle(tmp_path, "b", second) == (second, True)
    assert exit_of(tmp_path)["reason"] == "second"
    assert sorted(path.name for path in (tmp_path / "failures" / "a").iterdir()) == ["outcome.json"]


def test_a_beat_says_where_the_rank_is_and_takes_no_time():
    file = unnamed_file()
    heartbeat, reader = Heartbeat(file), HeartbeatReader(file)
    seen = []
    for step in (5, 6):
        heartbeat.beat("step", step)
        heartbeat.part("forward")
        seen.append(reader.read()[1:4])
    heartbeat.beat("save")
    seen.append(reader.read()[1:4])
    assert seen == [("first_step", "forward", 5), ("step", "forward", 6), ("save", "", 6)]
    assert reader.read().beats == 5
    seconds = min(timed(heartbeat) for _ in range(5))
    assert seconds < 2e-6
    NullHeartbeat().beat("step", 1)
    os.close(file)


def timed(heartbeat: Heartbeat) -> float:
    began = time.perf_counter()
    for step in range(2000):
        heartbeat.beat("step", step)
    return (time.perf_counter() - began) / 2000


def test_errors_that_are_a_peers_fault_are_known():
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242")
    late = RuntimeError("[unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation to complete")
    wrapped = ValueError("outer")
    wrapped.__cause__ = lost
    assert [is_lost_peer(error) for error in (lost, wrapped, late, RuntimeError("size mismatch"), ValueError())] == [
        *(True, True, False, False, False)
    ]
    assert is_late_peer(late) and not is_late_peer(lost)
