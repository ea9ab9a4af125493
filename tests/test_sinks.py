"""Where records go: what stands there, and that no place for them can stop or slow training."""

import http.client
import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
from made_runs import GiB, event, step, validation
from processes import ENVIRONMENT, ROOT

from scaling.errors import UserError
from scaling.profile.sinks import (
    InBackground,
    JsonLines,
    Memory,
    Prometheus,
    TensorBoard,
    Terminal,
    WandB,
    build_sinks,
    check_tracking,
    guarded,
)
from scaling.profile.sinks.scalars import step_scalars, validation_scalars
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.spec import load_spec
from scaling.spec.sections import Wandb

RANKS = {
    "count": 8,
    "of": {"busy": {"min": 0.9, "mean": 1.0, "max": 1.2, "lowest": 0, "highest": 3}},
    "slowest": {"rank": 3, "host": "node-2", "device": "cuda:3", "seconds": 1.2},
    "fastest": {"rank": 0, "host": "node-1", "device": "cuda:0", "seconds": 0.9},
}


def record(number, **changes):
    return StepRecord(**step(number, **changes))


def checked(number):
    return ValidationRecord(**validation(number))


def happened(name, number, **details):
    return Event(**event(name, 40.0, number, **details))


def tell_all(sink, steps=3):
    """A whole small run."""
    sink.begin(0, steps)
    sink.event(happened("start", 0, world_size=8))
    for number in range(1, steps + 1):
        sink.step(record(number, ranks=RANKS))
    sink.validation(checked(steps))
    sink.event(happened("checkpoint", steps, seconds=2.0, bytes=GiB, stall_seconds=0.1))
    sink.close()


def warnings_in(caplog):
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


# ---------------------------------------------------------------- files


def test_events_have_a_file_of_their_own_with_strict_json_and_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY0000000000")
    sink = JsonLines(tmp_path)
    sink.event(happened("start", 0, world_size=2, hosts=["a", "b"]))
    sink.event(happened("end", 7, code=1, reason="refused: hf_CANARY0000000000", share=math.nan))
    sink.close()
    first, last = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert list(first) == ["event", "wall_time", "step", "details"] and first["details"]["hosts"] == ["a", "b"]
    assert last["details"] == {"code": 1, "reason": "refused: ***", "share": None}


def test_memory_keeps_events_too():
    kept = Memory()
    tell_all(kept)
    assert [one.event for one in kept.events] == ["start", "checkpoint"]
    assert len(kept.steps) == 3 and len(kept.validations) == 1


# ---------------------------------------------------------------- guards


class Failing:
    """Fails in one method; notes all calls."""

    def __init__(self, method, how=None):
        self.method, self.how, self.calls = method, how or OSError("No space left on device"), []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append(name)
            if name == self.method:
                raise self.how

        return call


@pytest.mark.parametrize("method", ["begin", "step", "validation", "event", "close"])
@pytest.mark.parametrize("place", [guarded, lambda sink: InBackground(sink, patience_s=5)])
def test_a_sink_that_fails_is_told_once_and_left_out(method, place, caplog):
    sink = Failing(method)
    tell_all(place(sink))
    (told,) = warnings_in(caplog)
    assert told == "WARNING: Failing is left out from now on: No space left on device; training goes on"
    assert sink.calls.count(method) == 1, "once it has failed it is called no more"
    assert sink.calls[-1] == "close", "and it may let go of what it holds"


def test_what_is_told_of_a_failure_is_one_line(caplog):
    tell_all(guarded(Failing("step", RuntimeError("first\nsecond"))))
    tell_all(guarded(Failing("step", KeyError())))
    assert [told.partition("on: ")[2] for told in warnings_in(caplog)] == [
        "first; training goes on",
        "KeyError; training goes on",
    ]


class Stuck:
    """Hangs in one method until it is let go."""

    def __init__(self, method):
        self.method, self.go = method, threading.Event()

    def __getattr__(self, name):
        return lambda *arguments: self.go.wait(60) if name == self.method else None


@pytest.mark.parametrize("method", ["begin", "step", "close"])
def test_a_sink_that_hangs_stops_nobody(method, caplog):
    stuck = Stuck(method)
    sink = InBackground(stuck, patience_s=0.2)
    began = time.monotonic()
    tell_all(sink)
    seconds = time.monotonic() - began
    stuck.go.set()
    assert 0.2 <= seconds < 2
    (told,) = warnings_in(caplog)
    assert "it was not done after 0 s" in told


def test_records_that_wait_for_a_sink_that_hangs_are_not_kept_without_end(caplog):
    stuck = Stuck("begin")
    sink = InBackground(stuck, patience_s=5)
    sink.begin(0, 10)
    taken = record(1)
    for _ in range(1500):
        sink.step(taken)
    began = time.monotonic()
    sink.close()
    stuck.go.set()
    assert time.monotonic() - began < 1, "one that was given up is not waited for"
    (told,) = warnings_in(caplog)
    assert "1000 records wait for it" in told


def test_in_the_background_all_comes_in_order():
    kept = Memory()
    sink = InBackground(kept, patience_s=5)
    tell_all(sink, steps=50)
    assert [one.step for one in kept.steps] == list(range(1, 51))


# ---------------------------------------------------------------- numbers


def test_scalars_are_numbers_alone_in_groups():
    found = step_scalars(record(10, ranks=RANKS, lr={"a": 1e-3, "b": 1e-4}))
    assert all(type(value) is float for value in found.values())
    assert found["train/loss"] == record(10).loss and found["lr/b"] == 1e-4
    assert found["time/forward"] == 0.3 and found["pause/checkpoint"] == 0.0
    assert found["memory/fragmentation"] == 0.05 and found["memory_by_phase/backward"] == 60 * GiB
    assert found["device/power_watts"] == 640.0 and found["energy/joules_per_step"] == 5120.0
    assert found["device/throttled"] == 0.0 and found["ranks/busy_max"] == 1.2
    assert "time/communication" not in found and "speed/mfu_of_mamf" not in found, "what is not known has no name"
    slowed = step_scalars(record(10, device={"throttle": ["power"]}))
    assert slowed["device/throttled"] == 1.0


def test_tensorboard_gets_all_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell_all(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    wanted = step_scalars(record(1, ranks=RANKS)).keys() | validation_scalars(checked(1)).keys()
    assert set(events.Tags()["scalars"]) == wanted
    assert [one.step for one in events.Scalars("speed/mfu")] == [1, 2, 3]
    assert events.Scalars("train/loss")[0].wall_time == record(1).wall_time


def test_tensorboard_shows_no_step_twice_that_a_crash_made_the_run_repeat(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, second = TensorBoard(tmp_path / "a"), TensorBoard(tmp_path / "b")
    for sink, begun, steps in ((first, 0, (1, 2, 3)), (second, 1, (2, 3))):
        sink._folder.mkdir()
        sink.begin(begun, 3)
        for number in steps:
            sink.step(record(number, loss=float(begun)))
        sink.close()
    # One run's files are in one folder, and read in the order of their names, which hold the second of their start.
    for place, folder in enumerate("ab"):
        (file,) = (tmp_path / folder).iterdir()
        assert file.name.startswith("events.out.tfevents.")
        file.rename(tmp_path / f"events.out.tfevents.000000000{place}.x")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(one.step, one.value) for one in events.Scalars("train/loss")] == [(1, 0.0), (2, 1.0), (3, 1.0)]


DISK_TEST = """
import logging, resource, sys, time
from pathlib import Path
sys.path.insert(0, "tests")
from test_sinks import InBackground, TensorBoard, record
logging.basicConfig(level=logging.WARNING, format="%(message)s")
if sys.argv[2] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
sink = InBackground(TensorBoard(Path(sys.argv[1])), patience_s=30)
sink.begin(0, 200)
slowest, taken = 0.0, record(1)
for number in range(200):
    began = time.perf_counter()
    sink.step(taken)
    slowest = max(slowest, time.perf_counter() - began)
    time.sleep(0.001)
began = time.perf_counter()
sink.close()
print(f"went on; slowest {slowest:.3f} closing {time.perf_counter() - began:.3f}")
"""


@contextmanager
def full_disk(folder):
    """Another file system, with room for 64 KiB; skips where nobody may mount one."""
    if os.geteuid() != 0:
        pytest.skip("no right to mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def tensorboard_where_no_room_is(folder, limit):
    command = [sys.executable, "-c", DISK_TEST, str(folder), str(limit)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    slowest, closing = map(float, re.fullmatch(r"went on; slowest (\S+) closing (\S+)\n", done.stdout).groups())
    assert slowest < 0.5 and closing < 10
    (told,) = done.stderr.splitlines()
    assert told.startswith("WARNING: TensorBoard is left out from now on: [Errno")


def test_event_files_on_a_full_disk_stop_nobody(tmp_path):
    with full_disk(tmp_path):
        tensorboard_where_no_room_is(tmp_path, limit=0)


def test_event_files_that_may_not_grow_stop_nobody(tmp_path):
    tensorboard_where_no_room_is(tmp_path, limit=20_000)


# ---------------------------------------------------------------- prometheus

SAMPLE = re.compile(r'([a-z][a-z0-9_]*)\{((?:[a-z]+="(?:[^"\\\n]|\\["\\n])*",?)*)\} (NaN|[+-]Inf|[-+0-9.e]+)')


def parsed(page):
    """{(name, labels): value} of a page, each line of which must be as the format has it."""
    kinds, helped, found, current = {}, set(), {}, None
    assert page.endswith("\n")
    for line in page.splitlines():
        if line.startswith("# HELP "):
            current = line.split(" ")[2]
            assert current not in helped, "the lines of one metric stand together"
            helped.add(current)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current and kind in ("gauge", "counter")
            assert name.endswith("_total") == (kind == "counter")
            kinds[name] = kind
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert name == current and name in kinds and name.startswith("scaling_")
            assert (name, labels) not in found
            found[name, labels] = float(value)
    return found


@pytest.fixture
def served():
    sink = Prometheus(0, run="a-run")
    sink.begin(0, 3)
    yield sink
    sink.close()


def ask(sink, method="GET", path="/metrics", timeout=5):
    connection = http.client.HTTPConnection("127.0.0.1", sink.port, timeout=timeout)
    connection.request(method, path)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_prometheus_is_told_the_newest_record(served):
    answer, page = ask(served)
    assert answer.status == 200 and answer.getheader("Content-Type").startswith("text/plain; version=0.0.4")
    assert parsed(page)["scaling_last_step", 'run="a-run"'] == 3
    for number in (1, 2):
        served.step(record(number, ranks=RANKS, pauses={"checkpoint": 1.5}, device={"xid_errors": 1}))
    served.validation(checked(2))
    served.event(happened("checkpoint", 2, seconds=2.0, bytes=GiB))
    found = parsed(ask(served)[1])
    run = 'run="a-run"'
    assert found["scaling_step", run] == 2 and found["scaling_loss", run] == record(2).loss
    assert found["scaling_learning_rate", f'{run},group="all"'] == record(2).lr["all"]
    assert found["scaling_pause_seconds_total", f'{run},reason="checkpoint"'] == 3.0
    assert found["scaling_energy_joules_total", run] == 2 * 10 * 5120.0
    assert found["scaling_gpu_xid_errors_total", run] == 2
    assert found["scaling_memory_bytes", f'{run},kind="device_used"'] == 68 * GiB
    assert found["scaling_rank_phase_seconds", f'{run},phase="busy",over="max"'] == 1.2
    assert found["scaling_slowest_rank", run] == 3 and found["scaling_gpu_clock_hertz", f'{run},clock="now"'] == 1.9e9
    assert found["scaling_validation_loss", run] == found["scaling_validation_best_loss", run] == checked(2).loss
    assert found["scaling_checkpoint_step", run] == 2 and found["scaling_checkpoints_total", run] == 1
    assert not any(name == "scaling_mfu_of_mamf_ratio" for name, _ in found), "what is not known is not said"


def test_prometheus_is_told_what_is_not_finite_and_odd_names_as_its_format_has_them(served, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_CANARY0000000000")
    lr = {'a "b" \\ c\nd': 1e-3, "hf_CANARY0000000000": 1.0}
    served.step(record(1, loss=math.nan, grad_norm=math.inf, lr=lr, skipped=True))
    page = ask(served)[1]
    found = parsed(page)
    assert (
        math.isnan(found["scaling_loss", 'run="a-run"']) and found["scaling_gradient_norm", 'run="a-run"'] == math.inf
    )
    assert found["scaling_skipped_steps_total", 'run="a-run"'] == 1
    assert ("scaling_learning_rate", r'run="a-run",group="a \"b\" \\ c\nd"') in found
    assert "CANARY" not in page and "node-" not in page


def test_prometheus_says_nothing_else(served):
    served.step(record(1))
    page = ask(served)[1]
    head, nothing = ask(served, "HEAD")
    assert head.status == 200 and nothing == "" and int(head.getheader("Content-Length")) == len(page)
    assert ask(served, path="/")[1].startswith("<!doctype html>")
    for path in (
        "/metrics/",
        "/../metrics.jsonl",
        "/metrics.jsonl",
        "/%2e%2e/etc/passwd",
        "/" + "x" * 9000,
    ):
        answer, body = ask(served, path=path)
        assert (answer.status, body) == (404, "404 Not Found\n"), path
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE"):
        answer, body = ask(served, method)
        assert answer.status == 501 and "<" not in body
    assert answer.getheader("Server") == "scaling", "and not which Python"


@pytest.mark.parametrize(
    "sent", [b"", b"GET /metrics HTTP/1.1\r\nHost: x\r\n", b"x" * 20_000, b"\x16\x03\x01\x00\xff\r\n\r\n"]
)
def test_a_client_that_sends_nonsense_or_nothing_holds_up_no_step_and_other_clients_for_two_seconds(served, sent):
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        slow.sendall(sent)
        time.sleep(0.05)
        began = time.monotonic()
        served.step(record(1))
        served.validation(checked(1))
        assert time.monotonic() - began < 0.1
        assert ask(served)[0].status == 200
        assert time.monotonic() - began < 4


def test_a_client_that_sends_a_byte_at_a_time_is_cut_off(served):
    with socket.create_connection(("127.0.0.1", served.port)) as slow:
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 10:
                slow.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - began < 5
    assert ask(served)[0].status == 200


def test_a_client_that_asks_without_pause_takes_little(served):
    served.step(record(1, ranks=RANKS))
    began, answers = time.process_time(), 0
    until = time.monotonic() + 1
    while time.monotonic() < until:
        answers += ask(served)[0].status == 200
    assert 5 <= answers <= 50
    assert time.process_time() - began < 0.5, "the client is part of it"


def test_a_port_that_is_taken_is_told_once_and_no_matter(caplog):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        tell_all(guarded(Prometheus(port, run="r")))
    (told,) = warnings_in(caplog)
    assert told == (
        f"WARNING: Prometheus (127.0.0.1 port {port}) is left out from now on: Address already in use; training goes on"
    )


@pytest.mark.parametrize("host", ["203.0.113.7", "no such host", "a..b"])
def test_an_address_that_is_not_ours_is_told_once_and_no_matter(host, caplog):
    tell_all(guarded(Prometheus(0, host, run="r")))
    (told,) = warnings_in(caplog)
    assert "is left out" in told


def test_prometheus_listens_to_this_machine_alone_and_lets_its_port_go(served, caplog):
    port = served.port
    rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    assert [row[1] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"] == [f"0100007F:{port:04X}"]
    served.close()
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_the_log_says_which_port_is_free(caplog):
    with caplog.at_level(logging.INFO, logger="scaling"):
        sink = Prometheus(0, run="r")
        sink.begin(0, 1)
        sink.close()
    assert f"http://127.0.0.1:{sink.port}/metrics" in caplog.text


# ---------------------------------------------------------------- W&B


class FakeClient(types.ModuleType):
    """W&B's client, as far as it is used."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.codes = [], [], []
        self.disabled = False
        self.Settings = lambda **settings: settings

    def init(self, **arguments):
        self.started.append(arguments)
        return types.SimpleNamespace(
            url="https://wandb.example.org/run",
            dir="somewhere",
            disabled=self.disabled,
            define_metric=lambda *names, **more: None,
            log=self.logged.append,
            finish=lambda exit_code: self.codes.append(exit_code),
        )


@pytest.fixture
def client(monkeypatch):
    fake = FakeClient()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.__spec__ = types.SimpleNamespace(origin="wandb/__init__.py")
    return fake


def test_wandb_gets_scalars_and_the_spec_without_secrets(client, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "CANARY1111111111")
    settings = Wandb(project="p", tags=["a"])
    sink = WandB(settings, tmp_path, name="a-run", config={"objective": {"token": "CANARY1111111111"}, "seed": 1})
    tell_all(sink)
    (started,) = client.started
    assert started["config"] == {"objective": {"token": "***"}, "seed": 1}
    assert (started["project"], started["name"], started["tags"]) == ("p", "a-run", ["a"])
    assert (started["mode"], started["resume"], started["dir"]) == ("online", "allow", str(tmp_path))
    said = started["settings"]
    assert said["console"] == "off" and said["save_code"] is False
    assert all(said[name] for name in ("disable_git", "disable_code", "x_disable_meta", "x_disable_stats"))
    assert [one["step"] for one in client.logged] == [1, 2, 3, 3]
    assert client.logged[0]["train/loss"] == record(1).loss and client.logged[-1]["validation/loss"] == checked(3).loss
    assert client.codes == [0]


def test_a_run_that_goes_on_goes_on_at_wandb(client, tmp_path):
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path, tmp_path / "other"):
        tell_all(WandB(Wandb(project="p"), folder, name="a-run", config={}))
    first, second, other = (started["id"] for started in client.started)
    assert first == second != other and len(first) == 8


def test_wandb_knows_how_the_run_ended(client, tmp_path):
    sink = WandB(Wandb(project="p", mode="offline"), tmp_path, name="a-run", config={})
    sink.begin(0, 3)
    sink.event(happened("end", 2, code=4, reason="not finite"))
    sink.close()
    assert client.codes == [4] and client.started[0]["resume"] is None


def test_without_a_key_wandb_is_left_out(client, tmp_path, caplog):
    client.disabled = True
    tell_all(guarded(WandB(Wandb(project="p"), tmp_path, name="a-run", config={})))
    (told,) = warnings_in(caplog)
    assert "run `wandb login`" in told


WITH_WANDB = ['tracking={"tensorboard": false, "wandb": {"project": "p", "mode": "offline"}}']


@pytest.mark.parametrize("leftover", [False, True])
def test_a_client_that_is_not_installed_is_a_mistake_of_the_spec(leftover, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "path", [str(tmp_path), *(path for path in sys.path if not (Path(path) / "wandb").exists())]
    )
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if leftover:  # what its client writes where it is started
        (tmp_path / "wandb").mkdir()
    spec = load_spec(str(ROOT / "tests/specs/gpt-parity.json"), WITH_WANDB)
    for check in (check_tracking, lambda spec: build_sinks(spec, tmp_path, {}, plain=True)):
        with pytest.raises(UserError) as caught:
            check(spec)
        assert "`tracking.wandb` must be null" in str(caught.value) and "pip install" in str(caught.value)
        assert caught.value.code == 2
    check_tracking(load_spec(str(ROOT / "tests/specs/gpt-parity.json")))


def test_the_real_client_keeps_a_run_offline_and_no_secret(tmp_path):
    pytest.importorskip("wandb", reason="W&B's client (25 MB) is no part of the development environment")
    import getpass

    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests'); from test_sinks import *\n"
        "sink = InBackground(WandB(Wandb(project='p', mode='offline'), Path(sys.argv[1]), name='a-run', "
        "config={'token': os.environ['HF_TOKEN']}), patience_s=60)\n"
        "logging.basicConfig(level=logging.WARNING, format='%(message)s')\n"
        "tell_all(sink, steps=20)\n"
    )
    secrets = {"HF_TOKEN": "hf_CANARY0000000000", "WANDB_API_KEY": "CANARY" + "1" * 34}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), "--CANARY"],
            cwd=ROOT,
            env={**ENVIRONMENT, **secrets},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    runs = [path.name for path in files if path.suffix == ".wandb"]
    assert len(runs) == 2 and len(set(runs)) == 1, "one id for both starts"
    for path in files:
        held = path.read_bytes()
        assert b"CANARY" not in held, path
        assert socket.gethostname().encode() not in held, path
        assert getpass.getuser() == "root" or getpass.getuser().encode() not in held, path
    (written, _) = (path.read_bytes() for path in files if path.suffix == ".wandb")
    assert b"train/loss" in written


# ---------------------------------------------------------------- all of them


def test_the_runs_own_record_comes_first_and_what_is_not_asked_for_is_not_there(tmp_path, client):
    tracking = {"tensorboard": True, "wandb": {"project": "p"}, "prometheus": {"port": 0}}
    spec = load_spec(str(ROOT / "tests/specs/gpt-parity.json"), [f"tracking={json.dumps(tracking)}"])
    sinks = build_sinks(spec, tmp_path, {}, plain=False)
    assert isinstance(sinks[0], JsonLines), "its errors alone are the run's"
    names = [sink.name for sink in sinks[1:]]
    assert names == ["Terminal", "TensorBoard", "WandB", "Prometheus"]
    for sink in sinks:
        tell_all(sink)
    bare = load_spec(str(ROOT / "tests/specs/gpt-parity.json"), ['tracking={"tensorboard": false}'])
    assert [sink.name for sink in build_sinks(bare, tmp_path, {}, plain=False)[1:]] == ["Terminal"]


def test_a_package_that_is_there_and_broken_is_no_matter(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    spec = load_spec(str(ROOT / "tests/specs/gpt-parity.json"))
    assert [sink.name for sink in build_sinks(spec, tmp_path, {}, plain=True)[1:]] == ["Terminal"]
    (told,) = warnings_in(caplog)
    assert "TensorBoard is left out" in told


def test_lines_of_the_log_say_a_step_and_a_validation(caplog):
    with caplog.at_level(logging.INFO, logger="scaling"):
        tell_all(Terminal(), steps=1)
    first, second = caplog.messages
    assert first.startswith("step 1/1  loss ") and "MFU 45.0%" in first and "60 GiB" in first
    assert second.startswith("validation after step 1: loss ")
