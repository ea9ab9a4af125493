"""What a torch.profiler trace says of a device: intervals, made traces of GPUs in Kineto's form, and a real one."""

import datetime
import gzip
import itertools
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from scaling.profile import trace
from scaling.profile.trace import SECONDS, analyse, analyse_events, clip, length, read_events, subtract, union

NCCL = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GEMM = "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel"


# ---------------------------------------------------------------- intervals


def cells(spans):
    """The unit lengths that whole-numbered spans cover."""
    return {cell for begin, end in spans for cell in range(begin, end)}


def scattered(dice, count=12, room=40):
    starts = [dice.randrange(room) for _ in range(dice.randrange(count))]
    return [(start, start + dice.randrange(8)) for start in starts]


@pytest.mark.parametrize("seed", range(300))
def test_intervals_agree_with_counting(seed):
    dice = random.Random(seed)
    some, others = scattered(dice), scattered(dice)
    one, other = union(some), union(others)
    assert cells(one) == cells(some)
    assert all(a < b for a, b in one) and all(a[1] < b[0] for a, b in itertools.pairwise(one))
    rest = subtract(one, other)
    assert cells(rest) == cells(some) - cells(others) and union(rest) == rest
    begin, end = sorted((dice.randrange(50), dice.randrange(50)))
    inside = clip(one, begin, end)
    assert cells(inside) == {cell for cell in cells(one) if begin <= cell < end}
    assert length(one) == len(cells(some)) and length(rest) == len(cells(rest)) and length(inside) == len(cells(inside))


# ---------------------------------------------------------------- GPUs


def kernel(begin, duration, name=GEMM, *, launched=None, stream=7, device=0, category="kernel"):
    """What a device did, with the call that launched it."""
    correlation = kernel.count = getattr(kernel, "count", 0) + 1
    arguments = {"device": device, "context": 1, "stream": stream, "correlation": correlation, "External id": 5}
    done = {"ph": "X", "cat": category, "name": name, "pid": device, "tid": stream, "ts": begin, "dur": duration}
    call = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 99, "tid": 99, "dur": 1}
    launched = begin if launched is None else launched
    return [{**done, "args": arguments}, {**call, "ts": launched, "args": {"cbid": 211, "correlation": correlation}}]


def region(name, begin, end):
    """A record_function on the host, and what Kineto makes of it on the device."""
    of = {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "args": {"External id": 3}}
    return [
        {**of, "cat": "user_annotation", "pid": 99, "tid": 99},
        {**of, "cat": "gpu_user_annotation", "pid": 0, "tid": 7},
    ]


def microseconds(found):
    return {name: round(found[name] * 1e6, 3) for name in SECONDS}


def test_communication_is_exposed_where_nothing_is_computed():
    found = analyse_events(
        [
            {"ph": "M", "name": "process_name", "ts": 0, "pid": 0, "tid": 0, "args": {"name": "python"}},
            *kernel(100, 50),
            *kernel(120, 20, stream=9),  # two kernels at once are one moment of computing
            *kernel(130, 60, NCCL, stream=20),  # 150 to 190 with nobody beside it
            *kernel(180, 30, "Memcpy HtoD (Pinned -> Device)", category="gpu_memcpy", stream=13),  # 190 to 210 alone
            *kernel(230, 20, "Memset (Device)", category="gpu_memset"),
            *kernel(240, 60),
            {"ph": "i", "name": "Iteration Start: PyTorch Profiler", "s": "g", "pid": "Traces", "ts": 0},
        ]
    )
    assert found["steps"] is None and found["per_step"] == []
    assert microseconds(found) == {
        "device_seconds": 200,
        "compute_seconds": 50 + 60,
        "communication_seconds": 60,
        "exposed_communication_seconds": 40,
        "exposed_copy_seconds": 20 + 10,
        "idle_seconds": 20,
    }


def test_a_step_is_what_was_launched_in_it():
    found = analyse_events(
        [
            *kernel(5, 1, launched=1),  # before the first step
            *region("step", 10, 20),
            *region("forward", 11, 12),
            *kernel(30, 40, launched=12),
            *region("step", 20, 40),
            *kernel(75, 10, NCCL, launched=19, stream=20),
            *kernel(100, 50, launched=25),  # 85 to 100 nothing
            *kernel(160, 10, launched=41),  # after the last step
        ]
    )
    assert found["steps"] == 2
    first, second = map(microseconds, found["per_step"])
    assert first["device_seconds"] == 70 and first["compute_seconds"] == 40
    assert first["exposed_communication_seconds"] == 10 and first["idle_seconds"] == 20
    assert second["device_seconds"] == second["compute_seconds"] == 50 and second["idle_seconds"] == 0
    assert microseconds(found)["device_seconds"] == 120


def test_the_time_between_two_regions_is_the_step_before():
    events = [*region("step", 10, 20), *region("step", 50, 60), *kernel(12, 10), *kernel(30, 5), *kernel(51, 9)]
    first, second = map(microseconds, analyse_events(events)["per_step"])
    assert first["device_seconds"] == 39 and first["compute_seconds"] == 15 and first["idle_seconds"] == 24
    assert second["device_seconds"] == 9


def test_a_step_without_kernels_has_no_time():
    found = analyse_events([*region("step", 0, 10), *region("step", 10, 20), *kernel(2, 5)])
    assert [one["device_seconds"] for one in found["per_step"]] == [pytest.approx(5e-6), 0]


def test_devices_are_added_up():
    both = [*kernel(0, 10), *kernel(0, 20, NCCL, device=1), *kernel(20, 10, device=1), *kernel(10, 5)]
    found = microseconds(analyse_events(both))
    assert found["device_seconds"] == 15 + 30 and found["compute_seconds"] == 15 + 10
    assert found["exposed_communication_seconds"] == 20


@pytest.mark.parametrize("seed", range(100))
def test_a_made_up_gpu_agrees_with_counting(seed):
    dice = random.Random(seed)
    names = {"compute": GEMM, "communication": NCCL, "copy": "Memcpy DtoH (Device -> Pinned)"}
    did = {kind: [(begin, end) for begin, end in scattered(dice) if begin < end] for kind in names}
    did["compute"].append((0, 1))
    events = [
        event
        for kind, spans in did.items()
        for begin, end in spans
        for event in kernel(begin, end - begin, names[kind], category="gpu_memcpy" if kind == "copy" else "kernel")
    ]
    dice.shuffle(events)
    found = microseconds(analyse_events(events))
    compute, communication, copy = (cells(did[kind]) for kind in names)
    total = max(end for spans in did.values() for _, end in spans)
    assert found == {
        "device_seconds": total,
        "compute_seconds": len(compute),
        "communication_seconds": len(communication),
        "exposed_communication_seconds": len(communication - compute),
        "exposed_copy_seconds": len(copy - compute - communication),
        "idle_seconds": total - len(compute | communication | copy),
    }


# ---------------------------------------------------------------- files


def test_a_file_is_read_in_pieces(tmp_path, monkeypatch):
    """Events across the borders of what is read at a time, with names that no parser likes."""
    events = [{"ph": "X", "name": f'aten::\u00fc {i} \\ " ] }} {"x" * (i % 97)}', "ts": i} for i in range(2000)]
    events.insert(7, {"ph": "X", "name": "long", "args": {"stack": "y" * 3000}})
    whole = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "[GPU]"}], "traceEvents": events}
    text = json.dumps(whole | {"traceName": "t"}, ensure_ascii=False, indent=1)
    monkeypatch.setattr(trace, "CHUNK", 1000)
    (tmp_path / "a.json").write_text(text)
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write(text)
    (tmp_path / "list.json").write_text(json.dumps(events))
    for name in ("a.json", "a.json.gz", "list.json"):
        assert list(read_events(tmp_path / name)) == events


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"not a trace",
        b'{"traceEvents": [{"ph": "X"',
        b'{"traceEvents": [{"ph": "X"}, ',
        b'{"traceEvents": [{"ph": nonsense}]}',
        gzip.compress(b'{"traceEvents": []}', mtime=0)[:-9],
    ],
)
def test_what_is_no_whole_trace_is_refused(tmp_path, content):
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"trace\.json is no whole trace"):
        analyse(tmp_path / "trace.json")


def test_a_trace_of_nothing_says_nothing(tmp_path):
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    assert analyse(tmp_path / "trace.json") == {"steps": None, **dict.fromkeys(SECONDS), "per_step": []}


# ---------------------------------------------------------------- a real one


@pytest.fixture
def pair():
    """Two ranks of gloo in this process: a call that reduces as rank 0, rank 1 being late by so many seconds."""
    store = dist.HashStore()

    def join(rank):
        return dist.ProcessGroupGloo(store, rank, 2, datetime.timedelta(seconds=60))

    with ThreadPoolExecutor(1) as other:
        joining = other.submit(join, 1)
        mine, theirs = join(0), joining.result()

        def late(seconds):
            time.sleep(seconds)
            theirs.allreduce([torch.ones(64)]).wait()

        def reduce(tensor, seconds):
            work = mine.allreduce([tensor])
            time.sleep(0.1)  # on a busy machine its thread may begin to wait later than this one goes on
            done = other.submit(late, seconds)
            work.wait()
            done.result()

        yield reduce


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_real_trace_of_a_cpu_shows_waiting_for_another_rank(pair, tmp_path, name):
    model = nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    late_s = (0.05, 0.2, 0.1)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for seconds in late_s:
            with record_function("step"):
                with record_function("forward"):
                    loss = model(torch.ones(32, 64)).square().sum()
                with record_function("backward"):
                    loss.backward()
                pair(model.bias.grad, seconds)
                optimizer.step()
    profiler.export_chrome_trace(str(tmp_path / name))
    found = analyse(tmp_path / name)
    assert found["steps"] == len(found["per_step"]) == 3
    for one, seconds in zip(found["per_step"], late_s, strict=True):
        assert seconds < one["communication_seconds"] < one["device_seconds"]
        assert one["idle_seconds"] is None is one["exposed_communication_seconds"]
    regions = [event.time_range for event in profiler.events() if event.name == "step"]
    whole_us = max(one.end for one in regions) - min(one.start for one in regions)
    assert found["device_seconds"] == pytest.approx(whole_us / 1e6, rel=1e-3)
