"""The live view of a run on a terminal: what is on it, on terminals of all sizes, and how it leaves them."""

import fcntl
import io
import json
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from made_runs import GiB, event, step, validation
from processes import ENVIRONMENT, ROOT, SPECS

from scaling.profile.sinks import Live
from scaling.profile.sinks.build import about, can_show_view
from scaling.profile.sinks.live import earlier_losses
from scaling.profile.sinks.screen import About, Story, lines, plain
from scaling.profile.sinks.series import Series, chart
from scaling.records import Event, StepRecord, ValidationRecord
from scaling.spec import load_spec

PREDICTED = {"peak_allocated_bytes": 58 * GiB, "peak_reserved_bytes": 67 * GiB, "device_used_bytes": 69 * GiB}
ABOUT = About(
    name="gpt2-124m",
    place="fsdp on 8 x NVIDIA H100 80GB HBM3, bf16",
    predicted=PREDICTED,
    capacity_bytes=79 * GiB,
    clip=1.0,
    checkpoint_interval=100,
)
RANKS = {
    "count": 8,
    "of": {},
    "slowest": {"rank": 3, "host": "node-2", "device": "cuda:3", "seconds": 1.2},
    "fastest": {"rank": 0, "host": "node-1", "device": "cuda:0", "seconds": 0.9},
}
LABELS = ("loss", "validation", "grad norm", "speed", "time", "memory", "lr", "device", "ranks", "checkpoint")


def record(number, **changes):
    return StepRecord(**step(number, **{"ranks": RANKS, **changes}))


def told(story=None, until=400, **changes):
    """A run of 4000 steps at step `until`, begun 432 s ago; the time is that of its last record."""
    story = story or Story(ABOUT)
    story.first_step, story.last_step = 0, 4000
    for number in range(10, until + 1, 10):
        story.step(record(number, **changes))
    story.began = story.record.wall_time - 432
    story.validate(ValidationRecord(**validation(300, 2.5)))
    story.event(Event(**event("checkpoint", 330 + 10, 300, seconds=12.5, bytes=GiB, stall_seconds=0.1)))
    return story


def shown(story, width=100, height=40, **options):
    now = story.record.wall_time if story.record else story.began
    return plain(lines(story, width, height, now, **options)).splitlines()


def labels_of(view):
    return [label for label in LABELS if any(line.startswith(label + " ") for line in view)]


def line_of(view, label):
    (found,) = [line for line in view if line.startswith(label + " ")]
    return found


# ---------------------------------------------------------------- what is on it


def test_a_large_terminal_shows_all():
    story = told()
    story.warnings.append("12:00:00 WARNING: something")
    view = shown(story)
    assert labels_of(view) == list(LABELS)
    assert view[0].startswith("── gpt2-124m  fsdp on 8 x NVIDIA H100 80GB HBM3, bf16 ───")
    assert view[1].startswith("step 400/4,000  10.0%  ████") and view[1].endswith("7 min 12 s elapsed  1 h 00 min left")
    assert "best 2.2854 at 400" in line_of(view, "loss") and "first 9.3604" in line_of(view, "loss")
    assert "2.5000  at 300  best 2.5000 at 300" in line_of(view, "validation")
    assert "limit 1  clipped in 15% of records" in line_of(view, "grad norm")
    assert "524.3k tokens/s  MFU 45.0%  median 524.3k  1 s a step" in line_of(view, "speed")
    assert "data 0.4%  forward 30.0%  backward 60.0%" in line_of(view, "time")
    assert "allocated   60 GiB" in line_of(view, "memory") and "predicted 58 GiB  of 79 GiB" in line_of(view, "memory")
    assert any("reserved    66 GiB" in line for line in view) and any("host         4 GiB" in line for line in view)
    assert "all 0.0006" in line_of(view, "lr")
    assert "97% busy  640 W  62 °C  1900 MHz" in line_of(view, "device")
    assert "slowest 3: 1.2 s (node-2, cuda:3)  fastest 0: 0.9 s" in line_of(view, "ranks")
    assert "step 300 saved 1 min 30 s ago, 1 GiB in 12.5 s" in line_of(view, "checkpoint")
    assert view[-1] == "12:00:00 WARNING: something"
    assert all(len(line) <= 100 for line in view)


@pytest.mark.parametrize(("width", "height"), [(100, 26), (80, 20), (59, 11), (59, 8), (39, 8), (200, 60)])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_what_does_not_fit_is_left_out_by_its_importance(width, height, ascii_only):
    story = told()
    story.warnings.append("12:00:00 WARNING: something")
    view = shown(story, width, height, ascii_only=ascii_only)
    assert len(view) <= height
    own = [line for line in view if not line.startswith(("──", "--", "12:00"))]
    assert width < 59 or all(len(line) <= width for line in own), "names and warnings alone are cut at the edge"
    assert "12:00:00 WARNING: something" in view, "whatever else is left out"
    kept = labels_of(view)
    assert kept[0] == "loss" and "speed" in kept
    assert ("ranks" in kept) == (height >= 20) and ("validation" in kept) == (height >= 9 or len(kept) > 4)
    if ascii_only:
        assert all(line.isascii() for line in view)


def test_before_the_first_record_it_says_what_it_waits_for():
    story = Story(ABOUT)
    story.last_step = 4000
    view = shown(story)
    assert view[1].startswith("step 0/4,000  0.0%") and "the first record comes" in view[2] and "none yet" in view[3]


def test_on_a_cpu_it_shows_the_process_and_says_what_was_predicted_of_tensors():
    nothing = dict.fromkeys(step(1)["memory"]) | {"host_rss_bytes": 3 * GiB}
    story = Story(About("x", "single on 1 x cpu, fp32", {"peak_allocated_bytes": GiB}, None, None, None))
    view = shown(told(story, memory=nothing, device=dict.fromkeys(step(1)["device"]), mfu=None, ranks=None))
    assert "3 GiB of the process  predicted 1 GiB of tensors" in line_of(view, "memory")
    assert "device" not in labels_of(view) and "ranks" not in labels_of(view) and "MFU" not in line_of(view, "speed")
    assert "not clipped" in line_of(view, "grad norm") and "none are kept" in line_of(view, "checkpoint")


def test_memory_beyond_the_prediction_is_red():
    story = told(Story(replace(ABOUT, predicted={**PREDICTED, "peak_allocated_bytes": 50 * GiB})))
    view = lines(story, 100, 40, 0.0)
    rows = {name: row for row in view for name in ("allocated", "reserved") if name in plain([row])}
    assert any(style == "red" and text for text, style in rows["allocated"]), "60 GiB, and 50 were predicted"
    assert not any(style == "red" and text for text, style in rows["reserved"]), "66 GiB of 67"


def test_what_is_wrong_is_seen():
    story = told(loss=float("nan"), skipped=True, device={"throttle": ["power"], "xid_errors": 1})
    story.event(Event(**event("checkpoint_failed", 400, 400)))
    view = shown(story)
    assert "not finite" in line_of(view, "loss")
    assert "slowed: power  1 XID errors" in line_of(view, "device")
    assert "saving step 400 FAILED  step 300 saved" in line_of(view, "checkpoint")
    story.step(record(410))
    assert "40 refused: not finite" in line_of(shown(story), "loss")


def test_many_groups_are_counted():
    rates = {f"group-{number}": 1e-4 for number in range(30)}
    assert line_of(shown(told(lr=rates)), "lr").endswith("more")


def test_a_series_keeps_the_whole_run_in_little_memory():
    series = Series(most=64)
    for number in range(10_000):
        series.add(10_000.0 - number)
    series.add(float("nan"))
    assert series.first == 10_000.0 and series.last == 1.0
    columns = series.columns(20)
    assert len(columns) == 20 and columns == sorted(columns, reverse=True)
    assert columns[0] == pytest.approx(9750, abs=100) and columns[-1] == pytest.approx(250, abs=250)
    assert len(series._means) < 64
    assert Series().columns(10) == [] and len(series.columns(500)) == 500


def test_a_chart_has_the_lowest_and_the_highest_in_it():
    assert chart([1, 2, 3, 4, 5, 6, 7, 8], 1) == ["▁▂▃▄▅▆▇█"]
    assert chart([0, 1], 2) == [" █", "▁█"]
    assert chart([5, 5], 1) == ["▁▁"] and chart([], 2) == ["", ""]


def test_losses_of_earlier_starts_are_part_of_the_curve(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": number, "loss": 1.0 * number}) for number in range(1, 3001)]
    path.write_text("\n".join([*rows[:1500], '{"step": 1', "[]", *rows[1500:]]))
    found = earlier_losses(path, until=2000)
    assert 250 < len(found) < 500 and found[0] == (1.0, 1) and max(step for _, step in found) <= 2000
    assert earlier_losses(tmp_path / "none", until=3) == []


def test_what_it_knows_before_the_run_begins():
    spec = load_spec(str(SPECS / "gpt-parity.json"), ["checkpoint.interval=7"])
    predicted = {"device": "NVIDIA H100 80GB HBM3", "world_size": 2, "memory": PREDICTED}
    found = about(spec, predicted)
    assert found.place == "single on 2 x NVIDIA H100 80GB HBM3, fp32"
    assert found.capacity_bytes == pytest.approx(79.11 * GiB, rel=1e-3) and found.clip == 0.5
    assert about(spec, {}).capacity_bytes is None


# ---------------------------------------------------------------- how it is drawn


class Tty(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def draw(*records, encoding="utf-8", columns=100, rows=30, **settings):
    """What a view of these records writes, and the log's lines."""
    from rich.console import Console

    file = Tty()
    file.encoding = encoding
    live = Live(ABOUT, console=Console(file=file, width=columns, height=rows, force_terminal=True, **settings))
    live.begin(0, 4000)
    for one in records:
        live.step(one)
    live.close()
    return file.getvalue()


def test_drawing_shows_the_last_record_and_leaves_the_cursor_alone(caplog):
    with caplog.at_level(logging.INFO, logger="scaling"):
        written = draw(*map(record, (10, 20)))
    assert "step 20/4,000" in written and "\x1b[?1049h" not in written
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    assert [message[:12] for message in caplog.messages] == ["step   10/40", "step   20/40"], "for train.log"


def test_no_color_and_other_encodings_are_kept_to(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[36m" in draw(record(10), color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", draw(record(10), color_system="standard"))
    written = draw(record(10), encoding="ascii")
    assert written.isascii() and "step 10/4,000" in written


def test_a_name_cannot_move_the_cursor():
    written = draw(record(10, lr={"a\x1b[2Jb\rc": 1e-3}))
    assert "a?[2Jb?c 0.001" in written


def test_a_record_takes_the_training_thread_no_time():
    from rich.console import Console

    live = Live(ABOUT, console=Console(file=Tty(), width=100, height=30, force_terminal=True))
    live.begin(0, 4000)
    records, seconds = [record(number, wall_time=1.0) for number in range(1, 201)], []
    for one in records:
        began = time.perf_counter()
        live.step(one)
        seconds.append(time.perf_counter() - began)
        time.sleep(0.001)
    live.close()
    assert sorted(seconds)[len(seconds) // 2] < 0.001


def test_where_it_cannot_draw_the_lines_come_to_the_terminal(caplog, monkeypatch):
    def fails(*arguments, **settings):
        raise OSError("Input/output error")

    stdout = sys.stdout
    console_handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("scaling")
    logger.addHandler(console_handler)
    caplog.set_level(logging.INFO, logger="scaling")
    try:
        monkeypatch.setattr("scaling.profile.sinks.live.SHORTEST_S", 0.01)
        from rich.console import Console

        live = Live(ABOUT, console=Console(file=Tty(), width=100, height=30, force_terminal=True))
        live.begin(0, 4000)
        monkeypatch.setattr("scaling.profile.sinks.live.lines", fails)
        live.step(record(10))
        until = time.monotonic() + 10
        while "left out" not in console_handler.stream.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        live.step(record(20))
        live.close()
    finally:
        logger.removeHandler(console_handler)
    lines_told = console_handler.stream.getvalue().splitlines()
    assert lines_told[0].startswith("WARNING: the live view is left out from now on: Input/output error")
    assert lines_told[1].startswith("step   20/4000")
    assert sys.stdout is stdout


# ---------------------------------------------------------------- on a real terminal

PROGRAM = """
import logging, os, sys, time
sys.path.insert(0, "tests")
from pathlib import Path
from test_live_view import *
from scaling.profile.sinks import build_sinks
from scaling.train import _Stdout
logger = logging.getLogger("scaling")
logger.setLevel(logging.INFO)
logger.addHandler(_Stdout())
spec = load_spec(str(SPECS / "gpt-parity.json"), ['tracking={"tensorboard": false}'])
folder = Path(sys.argv[1])
sinks = build_sinks(spec, folder, {"device": "cpu", "world_size": 1, "memory": PREDICTED}, plain=sys.argv[2] == "plain")
for sink in sinks:
    sink.begin(0, 40)
try:
    for number in range(1, 41):
        for sink in sinks:
            sink.step(record(number))
        if number == 20:
            print("a print")
            print("an error", file=sys.stderr)
            logger.warning("WARNING: mind the gap")
            time.sleep(0.6)
            if "raise" in sys.argv[2]:
                raise RuntimeError("a bug")
            if "kill" in sys.argv[2]:
                os.kill(os.getpid(), 9)
finally:
    for sink in sinks:
        sink.close()
print("done")
"""


def on_a_terminal(command, columns=100, rows=30, interrupt_at=None, **environment):
    """Run `command` on a pseudo-terminal; returns what it wrote, how it ended, and the terminal's settings before and
    after.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    before = termios.tcgetattr(slave)
    variables = {**ENVIRONMENT, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **environment}
    variables.setdefault("OMP_NUM_THREADS", "1")
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        if name not in environment:
            variables.pop(name, None)
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    written = b""
    until = time.monotonic() + 300
    while time.monotonic() < until:
        if select.select([master], [], [], 0.1)[0]:
            written += os.read(master, 65536)
        elif process.poll() is not None:
            break
        if interrupt_at and interrupt_at in written:
            interrupt_at = None
            process.send_signal(signal.SIGINT)
    else:
        process.kill()
    after = termios.tcgetattr(slave)
    os.close(slave)
    os.close(master)
    return written.decode("utf-8", "replace"), process.wait(), before, after


def text_of(written):
    """Without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)


def program(folder, how, **settings):
    return on_a_terminal([sys.executable, "-c", PROGRAM, str(folder), how], **settings)


def sane(written):
    """The cursor is seen, the screen is the usual one, and no attribute is left set."""
    assert written.rfind("\x1b[?25h") >= written.rfind("\x1b[?25l")
    assert "\x1b[?1049" not in written and "\x1b[?47" not in written


@pytest.mark.parametrize(("columns", "rows"), [(100, 30), (60, 15)])
def test_on_a_terminal_the_view_stands_below_the_lines_of_the_log(tmp_path, columns, rows):
    written, code, before, after = program(tmp_path, "view", columns=columns, rows=rows)
    assert code == 0 and before == after, written
    sane(written)
    view = text_of(written).rpartition("gpt-parity  single on 1 x cpu")[2]
    assert "step 40/40  100.0%" in view and "checkpoint" in view, "the last view stays"
    for line in ("a print", "an error", "WARNING: mind the gap"):
        assert line in written
    assert "loss 9" not in written, "the lines of steps are in the view"
    assert written.count("step 40/40") <= 3, "drawn on records and by the clock, at most twice a second"
    assert written.rstrip().endswith("done")


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"COLUMNS": "30"}, {}])
def test_plain_lines_where_they_are_asked_for_or_the_terminal_is_no_good(tmp_path, environment):
    how = "view" if environment else "plain"
    written, code, _, _ = program(tmp_path, how, **environment)
    assert code == 0, written
    sane(written)
    assert "step 20/40  loss" in text_of(written) and "gpt-parity  single" not in text_of(written)


def test_after_an_exception_or_a_kill_the_terminal_is_as_before(tmp_path):
    written, code, before, after = program(tmp_path, "raise")
    assert code == 1 and before == after
    sane(written)
    assert "RuntimeError: a bug" in written.rpartition("checkpoint")[2], "below the view"
    written, code, before, after = program(tmp_path, "kill")
    assert code == -9 and before == after
    sane(written)


def test_without_a_terminal_there_is_no_view(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not can_show_view()


def real_run(folder, *settings, **terminal):
    command = [sys.executable, "launch/train.py", "--spec", str(SPECS / "gpt-parity.json"), "--run-dir", str(folder)]
    for setting in ("profile.interval=1", "tracking.tensorboard=false", *settings):
        command += ["--set", setting]
    return on_a_terminal(command, **terminal)


def test_a_real_run_shows_the_view(tmp_path):
    written, code, before, after = real_run(tmp_path / "run", "max_steps=3", "schedule.warmup_steps=1")
    assert code == 0 and before == after, written
    sane(written)
    assert "gpt-parity  single on 1 x cpu, fp32" in text_of(written) and "step 3/3  100.0%" in text_of(written)
    log = (tmp_path / "run" / "train.log").read_text()
    assert len(re.findall(r" step \d/3  loss ", log)) == 3, "the lines are in the log in any case"
    assert f"done: {tmp_path / 'run'}" in written.splitlines()[-1]


def test_ctrl_c_in_a_real_run_saves_and_leaves_the_terminal_as_it_was(tmp_path):
    written, code, before, after = real_run(tmp_path / "run", "max_steps=100000", interrupt_at=b"grad norm")
    assert code == 75 and before == after, written
    sane(written)
    assert "SIGINT: the run stops after this step" in written and "run the same command again" in written
