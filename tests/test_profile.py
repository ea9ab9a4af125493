"""What a run says of itself: records, sinks, and how a non-finite step is told."""

import json
import logging
import math
import re
import threading

import pytest
import torch
from processes import ROOT

from benchmarks import profiler
from scaling.engine.process import Process
from scaling.errors import NonFinite
from scaling.nonfinite import GoBack, NonFinitePolicy
from scaling.profile.clock import PHASES, Clock, Timings
from scaling.profile.memory import MemoryMonitor
from scaling.profile.nvml import UNKNOWN, DeviceMonitor
from scaling.profile.observers import Tracer
from scaling.profile.ranks import PLACES, own_numbers, told, total_energy
from scaling.profile.recorder import Recorder, StepResult, Yardsticks
from scaling.profile.sinks import JsonLines, Memory, TensorBoard, Terminal
from scaling.profile.waits import NullWaits, Waits
from scaling.records import BatchPlan, Progress, ValidationRecord

CPU = torch.device("cpu")
PLAN = BatchPlan(global_batch=8, micro_batch=2, accumulation=2, world_size=2, sequence_length=16)


ALONE = Process(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)


def recorder(*sinks, interval=2, last_step=5, peak_flops=None, gemm_flops=None, process=ALONE, waits=None):
    sticks = Yardsticks(1e6, peak_flops, gemm_flops)
    return Recorder(sinks, PLAN, process, sticks, interval=interval, first_step=0, last_step=last_step, waits=waits)


def take(taker, step, loss=2.0, norm=1.0, losses=None, loss_scale=1.0):
    result = StepResult(torch.tensor([0.0, 0.0, *(losses or (4 * loss, 0.0))]), 4.0, torch.tensor(norm))
    progress = Progress(step, step * 8, step * 8 * 16)
    (landed,) = taker.step(progress, (step - 1) * 8, result, lr={"all": 0.1}, loss_scale=loss_scale)
    return landed


@pytest.mark.parametrize("terms", [8.0, torch.tensor(8.0)], ids=["known", "counted"])
def test_the_loss_is_the_mean_over_the_terms_of_all_ranks(terms):
    kept = Memory()
    taker = recorder(kept, interval=1)
    result = StepResult(torch.tensor([0.0, 0.0, 3.0, 1.0]), terms, torch.tensor(2.0))
    (landed,) = taker.step(Progress(1, 8, 128), 0, result, lr={"all": 0.1}, loss_scale=1.0)
    assert (landed.loss, landed.grad_norm, result.loss.item()) == (0.5, 2.0, 0.5)


def test_every_interval_and_the_last_step_are_recorded():
    kept = Memory()
    taker = recorder(kept)
    for step in range(1, 6):
        take(taker, step, loss=float(step))
    assert [record.step for record in kept.steps] == [2, 4, 5]
    assert [record.loss for record in kept.steps] == [2.0, 4.0, 5.0]
    last = kept.steps[-1]
    assert last.samples_seen == 5 * 8 and last.tokens == 5 * 8 * 16
    assert last.tokens_per_second == pytest.approx(8 * 16 / last.step_seconds)
    assert last.tokens_per_second_per_device == pytest.approx(last.tokens_per_second / 2)
    assert last.mfu is None, "no peak is known, so none is guessed"


def test_mfu_is_per_device():
    kept = Memory()
    take(recorder(kept, interval=1, peak_flops=1e12, gemm_flops=5e11), 1)
    (record,) = kept.steps
    assert record.mfu == pytest.approx(record.tokens_per_second_per_device * 1e6 / 1e12)
    assert record.mfu_of_mamf == pytest.approx(2 * record.mfu), "of what was measured, which is half of the peak"


def test_pauses_are_left_out_of_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("scaling.profile.recorder.time.perf_counter", lambda: now[0])
    kept = Memory()
    taker = recorder(kept, interval=2)
    now[0] = 1.0
    take(taker, 1)
    with taker.pause("validation"):
        now[0] = 100.0
    now[0] = 101.0
    take(taker, 2)
    assert kept.steps[0].step_seconds == pytest.approx(1.0)
    assert kept.steps[0].pauses == {"validation": 99.0, "checkpoint": 0.0, "profiling": 0.0}
    now[0] = 103.0
    take(taker, 3)
    now[0] = 104.0
    take(taker, 4)
    assert not any(kept.steps[1].pauses.values()), "of this record's steps alone"
    assert (kept.steps[1].step_seconds, kept.steps[1].window_steps) == (pytest.approx(1.5), 2)


def test_the_first_two_steps_of_a_start_are_left_out_of_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("scaling.profile.recorder.time.perf_counter", lambda: now[0])
    kept = Memory()
    taker = recorder(kept, interval=4, last_step=8)
    for step, seconds in enumerate([60.0, 20.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0], 1):
        now[0] += seconds
        take(taker, step)
    assert [record.step_seconds for record in kept.steps] == [pytest.approx(1.5), pytest.approx(1.0)]
    assert [(record.window_steps, record.warm_up) for record in kept.steps] == [(2, False), (4, False)]
    short = Memory()
    taker = recorder(short, interval=1)
    now[0] += 1.0
    take(taker, 1)
    assert short.steps[0].warm_up, "recorded within the warm-up, which it says"


@pytest.mark.parametrize(
    ("values", "told", "rank"),
    [
        (
            {"norm": float("nan"), "losses": (1.0, float("nan"))},
            "the loss of rank 1 is not finite",
            1,
        ),
        (
            {"norm": float("nan"), "losses": (float("inf"), float("nan"))},
            "the loss of ranks 0, 1 is not finite",
            0,
        ),
        ({"norm": float("nan")}, "the gradient is not finite (norm nan) though the loss of every rank is", None),
    ],
)
def test_a_step_that_is_not_finite_is_recorded_and_told_with_step_rank_and_samples(values, told, rank):
    kept, policy = Memory(), NonFinitePolicy("stop", limit=5)
    taker = recorder(kept, interval=100)
    policy.take(take(taker, 1), is_main=True)
    with pytest.raises(NonFinite) as caught:
        policy.take(take(taker, 2, **values), is_main=True)
    assert told in str(caught.value) and "at step 2" in str(caught.value) and "(8 and on in" in str(caught.value)
    assert (caught.value.code, caught.value.step, caught.value.rank) == (4, 2, rank)
    (record,) = kept.steps
    assert record.skipped and (record.step, record.first_sample) == (2, 8)
    assert record.bad_ranks == [r for r, own in enumerate(values.get("losses", ())) if not math.isfinite(own)]


def test_an_overflow_under_a_loss_scale_is_no_matter_for_the_policy():
    kept, policy = Memory(), NonFinitePolicy("stop", limit=5)
    taker = recorder(kept, interval=100)
    policy.take(take(taker, 1, norm=float("inf"), loss_scale=2.0), is_main=True)
    assert [record.skipped for record in kept.steps] == [True]
    with pytest.raises(NonFinite):  # a scale of 1 cannot be lowered
        policy.take(take(taker, 2, norm=float("inf"), loss_scale=1.0), is_main=True)
    with pytest.raises(NonFinite):  # no scale mends a loss
        policy.take(take(taker, 3, norm=float("nan"), losses=(math.inf, 1.0), loss_scale=2.0), is_main=True)


def test_skip_gives_up_after_the_limit_in_a_row():
    policy, taker, nan = NonFinitePolicy("skip", limit=2), recorder(), float("nan")
    for step, norm in enumerate([nan, nan, 1.0, nan, nan], 1):
        policy.take(take(taker, step, norm=norm), is_main=True)
    with pytest.raises(NonFinite, match="3 such steps in a row"):
        policy.take(take(taker, 6, norm=nan), is_main=True)


def test_rollback_counts_on_over_steps_that_are_done_again():
    policy, taker, nan = NonFinitePolicy("rollback", limit=2), recorder(), float("nan")
    policy.take(take(taker, 3), is_main=True)
    for _ in range(2):
        with pytest.raises(GoBack) as back:
            policy.take(take(taker, 4, norm=nan), is_main=True)
        assert (back.value.step, back.value.first_sample) == (4, 24)
        policy.take(take(taker, 3), is_main=True)  # again, after going back
    with pytest.raises(NonFinite):
        policy.take(take(taker, 4, norm=nan), is_main=True)


def test_files_have_one_strict_json_object_a_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    sink = JsonLines(tmp_path)
    taker = recorder(sink, interval=1)
    take(taker, 1, loss=1 / 3)
    take(taker, 2, norm=float("nan"), loss_scale=4.0)
    sink.validation(ValidationRecord(step=2, loss=1.5, bits_per_byte=None, tokens=10, seconds=0.1, wall_time=1.0))
    taker.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2], "appended, not written over"
    assert rows[1]["loss"] == torch.tensor(1 / 3).item(), "in full precision"
    assert rows[2]["grad_norm"] is None and rows[2]["skipped"] is True
    assert json.loads((tmp_path / "validation.jsonl").read_text())["loss"] == 1.5


def test_tensorboard_gets_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    taker = recorder(TensorBoard(tmp_path), interval=1)
    take(taker, 1, loss=2.5)
    taker.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("train/loss")[0].value == 2.5
    assert events.Scalars("lr/all")[0].value == pytest.approx(0.1)


def test_the_terminal_gets_plain_lines_where_it_is_none(caplog):
    with caplog.at_level(logging.INFO, logger="scaling"):
        taker = recorder(Terminal(), interval=1)
        take(taker, 1, loss=2.5)
        taker.close()
    (line,) = caplog.messages
    assert line.startswith("step 1/5  loss 2.5000  lr 1.00e-01  grad norm 1.000")


def test_the_clock_adds_up_phases_and_begins_anew_each_lap():
    clock = Clock(CPU)
    for _ in range(2):
        with clock.phase("forward"):
            sum(range(1000))
    seconds = clock.lap().seconds()
    assert seconds.keys() == {*PHASES, "communication"} and seconds["forward"] > 0 and seconds["backward"] == 0
    assert seconds["communication"] is None, "nobody watches collectives"
    assert clock.lap().seconds()["forward"] == 0


class Watching(NullWaits):
    watching = True


def test_what_was_waited_for_others_is_taken_out_of_the_phases(monkeypatch):
    now, waits = [0.0], Watching()
    monkeypatch.setattr("scaling.profile.waits.time.perf_counter", lambda: now[0])
    clock, timings = Clock(CPU, waits=waits), Timings()
    for _ in range(2):
        with clock.phase("forward"):
            now[0] += 5.0
            waits.seen.append((now[0] - 2.0, now[0]))
        now[0] += 1.0
        waits.seen.append((now[0] - 0.5, now[0]))  # between phases
        timings.add(clock.lap())
    found = timings.mean()
    assert (found["forward"], found["communication"], found["data"]) == (3.0, 2.5, 0.0)


class FakeGpu:
    """Streams by the time that their work until now takes."""

    def __init__(self, monkeypatch):
        class Stream:
            def __init__(self):
                self.reached = 0.0

            def wait_event(self, event):
                self.reached = max(self.reached, event.at)

        class Event:
            def __init__(_, **_more):
                pass

            def record(event, stream=None):
                event.at = (stream or self.current).reached

            def elapsed_time(event, later):
                return 1000 * (later.at - event.at)

        class Work:
            def wait(work):
                self.current.reached = max(self.current.reached, work.at)

        self.computation = self.current = Stream()
        self.other, self.Event, self.Work = Stream(), Event, Work
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr("scaling.profile.waits.dist.Work", Work)

    def event(self, at):
        event = self.Event()
        event.at = at
        return event

    def work(self, at):
        work = self.Work()
        work.at = at
        return work


def test_on_a_gpu_the_stream_of_the_computation_tells_how_long_it_stands_still(monkeypatch):
    gpu = FakeGpu(monkeypatch)
    waits = Waits(torch.device("cuda:0"), below_python=False)
    clock = Clock(torch.device("cuda:0"), waits=waits)
    try:
        with clock.phase("forward"):
            gpu.computation.reached += 1.0
            gpu.computation.wait_event(gpu.event(at=4.0))  # of an all-gather, 3 s later
            gpu.other.wait_event(gpu.event(at=50.0))
            gpu.current = gpu.other
            gpu.work(at=60.0).wait()  # holds that stream, not the computation
            gpu.computation.wait_event(gpu.event(at=4.5))  # half a second more, told while another is the current one
            gpu.current = gpu.computation
            writer = threading.Thread(target=gpu.work(at=0.0).wait)  # of a checkpoint: its thread does not compute
            writer.start()
            writer.join()
            gpu.computation.reached += 2.0
        gpu.work(at=7.0).wait()  # half a second between phases
        told = clock.lap()
        assert told.needs_device and told.seconds() == {
            **dict.fromkeys(PHASES, 0.0),
            "forward": 3.0,
            "communication": 4.0,
        }
        assert len(told._waits) == 3
        waits.watching = False
        with clock.phase("forward"):
            gpu.computation.wait_event(gpu.event(at=9.0))
        unwatched = clock.lap().seconds()
        assert unwatched["forward"] == 2.0 and unwatched["communication"] is None
    finally:
        waits.close()
    assert "watched" not in torch.cuda.Stream.wait_event.__qualname__ + gpu.Work.wait.__qualname__


def test_on_a_gpu_waits_are_counted_in_the_steps_that_are_told_of(monkeypatch):
    monkeypatch.setattr("scaling.profile.recorder.MemoryMonitor", lambda device: MemoryMonitor(CPU))
    monkeypatch.setattr("scaling.profile.recorder.DeviceMonitor", lambda device, interval_s: DeviceMonitor(CPU))
    process = Process(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cuda:0"))
    waits, watched = Watching(), []
    taker = recorder(Memory(), interval=5, last_step=12, waits=waits, process=process)
    for step in range(1, 13):
        taker.begin(step)
        watched += [step] if waits.watching else []
    assert watched == [3, 5, 8, 10, 12]


def test_what_ranks_wait_for_to_tell_each_other_is_of_no_step():
    class Slow(Process):
        def sum_over_ranks(self, value):
            waits.seen.append((0.0, 1.0))
            return value

    waits, kept = Watching(), Memory()
    process = Slow(rank=0, world_size=1, local_rank=0, local_world_size=1, device=CPU)
    taker = recorder(kept, interval=1, process=process, waits=waits)
    for step in range(1, 4):
        take(taker, step)
    assert [record.time["communication"] for record in kept.steps] == [0.0] * 3


class SlowSink(Memory):
    """Takes 0.5 s for each record."""

    def __init__(self, now):
        super().__init__()
        self._now = now

    def step(self, record):
        super().step(record)
        self._now[0] += 0.5


def test_writing_a_record_is_a_part_of_the_next_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("scaling.profile.recorder.time.perf_counter", lambda: now[0])
    kept = SlowSink(now)
    taker = recorder(kept, interval=1, last_step=8)
    for step in range(1, 5):
        now[0] += 1.0
        take(taker, step)
    assert [one.step_seconds for one in kept.steps[2:]] == [1.5, 1.5], "as a stopwatch has it"


class Slowed:
    """Looks at step 3 so closely that it takes long."""

    def begin(self, step, clock):
        return step == 3

    def end(self, step):
        pass

    def close(self):
        pass


def test_a_step_that_was_traced_counts_for_no_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("scaling.profile.recorder.time.perf_counter", lambda: now[0])
    for interval, wanted in (
        (4, [(4, 1.0, 1, False)]),
        (1, [(1, 1.0, 1, True), (2, 1.0, 1, True), (3, 50.0, 1, True), (4, 1.0, 1, False)]),
    ):
        kept = Memory()
        taker = Recorder([kept], PLAN, ALONE, Yardsticks(1e6), interval=interval, first_step=0, last_step=8,
                         observers=[Slowed()])  # fmt: skip
        for step, seconds in enumerate([1.0, 1.0, 50.0, 1.0], 1):
            taker.begin(step)
            now[0] += seconds
            take(taker, step)
        found = [(one.step, one.step_seconds, one.window_steps, one.warm_up) for one in kept.steps]
        assert found == wanted
    assert kept.steps[2].pauses["profiling"] == 0, "there is no other step to tell of"


def test_a_trace_that_a_resume_falls_into_is_of_what_is_left(tmp_path):
    tracer, clock = Tracer(tmp_path, 0, CPU, first=3, last=4), Clock(CPU)
    assert [tracer.begin(2, clock), tracer.begin(5, clock)] == [False, False]
    assert tracer.begin(4, clock)
    with clock.phase("forward"):
        torch.ones(4).sum()
    tracer.end(4)
    summary = json.loads((tmp_path / "traces" / "rank0-steps-3-4.summary.json").read_text())
    assert summary["steps"] == 1 and not tracer.begin(5, clock)


class FakeMonitor:
    """A GPU that uses 100 W."""

    def __init__(self, now):
        self._now, self._read_at = now, now[0]

    def read(self):
        joules, self._read_at = 100 * (self._now[0] - self._read_at), self._now[0]
        return {**UNKNOWN, "energy_joules": joules, "power_watts": 100.0}

    def close(self):
        pass


def test_energy_is_that_of_steps_and_not_of_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("scaling.profile.recorder.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("scaling.profile.recorder.DeviceMonitor", lambda device, interval_s: FakeMonitor(now))
    kept = Memory()
    taker = recorder(kept, interval=2, last_step=8)
    for step in range(1, 5):
        now[0] += 2.0
        take(taker, step)
        if step == 3:
            with taker.pause("validation"):
                now[0] += 1000.0
    assert kept.steps[1].energy == {"joules_per_step": 200.0, "joules_per_million_tokens": 200.0 / 128 * 1e6}
    assert kept.steps[1].device["power_watts"] == 100.0 and "energy_joules" not in kept.steps[1].device


def test_ranks_are_told_apart_by_what_each_does_itself():
    rows = [dict.fromkeys(PLACES, math.nan) | {"data": 0.1, "forward": 1.0, "backward": 2.0, "optimizer": 0.5}] * 3
    rows = [row | {"communication": waited} for row, waited in zip(rows, (1.0, 0.0, 0.9), strict=True)]
    rows[1] = rows[1] | {"backward": 3.0, "temperature_c": 90.0, "energy_joules": 5.0}
    names = [("a", "cuda:0"), ("a", "cuda:1"), ("b", "cuda:0")]
    found = told([[row[name] for name in PLACES] for row in rows], names)
    assert found["slowest"] == {"rank": 1, "host": "a", "device": "cuda:1", "seconds": pytest.approx(4.6)}
    assert found["fastest"]["seconds"] == pytest.approx(3.6) and found["count"] == 3
    assert found["of"]["backward"] == {"min": 2.0, "mean": pytest.approx(7 / 3), "max": 3.0, "lowest": 0, "highest": 1}
    assert "temperature_c" not in found["of"], "one rank alone knows it"
    assert total_energy([own_numbers(row) for row in rows]) is None, "not of all"
    unknown = [[row[name] for name in PLACES] for row in (row | {"communication": math.nan} for row in rows)]
    assert told(unknown, names)["slowest"] is None, "each waits for the slowest within its own phases"
    assert told(unknown[:1], names[:1]) is None


def test_what_a_cpu_cannot_say_is_none():
    assert DeviceMonitor(CPU).read() == UNKNOWN
    memory = MemoryMonitor(CPU).read()
    assert memory["allocated_peak_bytes"] is None and memory["host_rss_bytes"] > 1e6


def test_what_stands_for_the_recorder_in_its_benchmark_has_all_that_training_asks_of_it() -> None:
    source = (ROOT / "scaling" / "loop.py").read_text(encoding="utf-8")
    asked = set(re.findall(r"(?:recorder|clock)\.([a-z_]+)", source))
    asked.remove("validation")  # which the benchmark has none of
    assert asked >= {"step", "clock"} and all(hasattr(profiler._Nothing(), name) for name in asked), asked
