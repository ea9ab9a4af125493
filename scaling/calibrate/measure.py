"""Timing on this rank's device, all ranks at once: products, attention, memory, copies to the host, collectives.

All ranks do the same at the same time, as in training, so that they share power, memory and buses as they will there.
A figure's repeats are of equally many calls on every rank; its seconds are gathered from all of them.
"""

import datetime
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scaling.calibrate.result import CPU_SIZES, GPU_SIZES, Figure, Found, Sizes, figure
from scaling.engine.precision import DTYPES
from scaling.engine.process import Process
from scaling.errors import UserError
from scaling.run_folder import environment
from scaling.units import MiB, format_bytes

WARM_UP = 0.2
"""Share of a figure's time that goes before its repeats: libraries load, pages are touched, clocks settle."""
LEAST_REPEATS, MOST_REPEATS = 3, 10
LEAST_CALLS = 3 + LEAST_REPEATS
"""Of a figure: the first, one that tells how long it takes, one to warm up, and the repeats."""
ROOM = 1 / 16
"""Of the memory that is free, the most that one buffer takes; there are up to three, and collectives have their own."""
NOT_ON_A_CPU = "not tried on a CPU: few have fp16 units, and without them one product would take all of the time"


@dataclass(frozen=True)
class Work:
    """Something to repeat."""

    amount: float
    """FLOPs or bytes, as its rate counts them."""
    of: str
    """In words."""
    prepare: Callable[[], Callable[[], object]]
    """Makes the buffers and returns the call that is timed."""
    alone: bool = True
    """Of this rank alone; else a collective, whose failure is never one rank's."""


def measure(process: Process, seconds: float, sizes: Sizes | None, tell: Callable[[str, int], None]) -> Found:
    """Every figure that this machine has, in about `seconds`; a collective call, with the same result on all ranks.

    `tell` hears the name of each figure before it is measured, and how many there are. Raises UserError where nodes
    differ in their number of ranks.
    """
    began = time.monotonic()
    sizes = sizes or (GPU_SIZES if process.device.type == "cuda" else CPU_SIZES)
    works, missing = _works(process, sizes, _node_group(process))
    figures: dict[str, Figure] = {}
    for name, choices in works.items():
        tell(name, len(works))
        best, problem = _best(process, choices, seconds / len(works))
        if best is not None:
            figures[name] = best
        else:
            missing[name] = problem
    memory = _memory_bytes(process)
    facts = _facts(process, time.monotonic() - began)
    return Found(_device(process), process.device.type, memory, figures, missing, facts)


# ---------------------------------------------------------------- timing


def _best(process: Process, choices: Sequence[Work], share_s: float) -> tuple[Figure | None, str]:
    """The highest median among `choices`, smaller ones first, within `share_s` of time; or why there is none."""
    found: list[Figure] = []
    problem, rate = "", math.inf
    for work in choices:
        share = share_s / len(choices)
        if found and LEAST_CALLS * work.amount / rate > share:
            break
        measured, problem = _repeated(process, work, share)
        if measured is None:
            break
        found.append(measured)
        rate = measured.lowest
    return max(found, key=lambda one: one.median, default=None), problem


def _repeated(process: Process, work: Work, share_s: float) -> tuple[Figure | None, str]:
    """`work` as often as `share_s` allows, but LEAST_REPEATS at least."""
    call, once, problem = _first(process, work)
    everyone = process.gather_objects((once, problem))
    problem = next((text for _, text in everyone if text), "")
    if problem or call is None:
        return None, problem
    once = _agreed(process, _seconds(call, 1, process.device))  # the first call also loads and compiles
    _seconds(call, max(1, int(WARM_UP * share_s / once)), process.device)
    timed_s = (1 - WARM_UP) * share_s
    repeats = min(MOST_REPEATS, max(LEAST_REPEATS, int(timed_s / once)))
    calls = max(1, int(timed_s / repeats / once))
    mine = [_seconds(call, calls, process.device) for _ in range(repeats)]
    everyones = [seconds for seconds in process.gather_objects(mine) for seconds in seconds]
    return figure(work.amount, everyones, repeats, work.of), ""


def _first(process: Process, work: Work) -> tuple[Callable[[], object] | None, float, str]:
    """The prepared call and the seconds of its first time; or why it cannot be made."""
    try:
        call = work.prepare()
        return call, _seconds(call, 1, process.device), ""
    except RuntimeError as error:  # no kernel for this type, or not enough memory
        if not work.alone:
            raise
        return None, math.inf, str(error).splitlines()[0][:200]


def _agreed(process: Process, seconds: float) -> float:
    """The slowest rank's, so that all repeat equally often."""
    return max(process.gather_objects(seconds))


def _seconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    """Of one call, among `calls` one after the other; on a GPU by its own clock."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls  # it is in milliseconds
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


# ---------------------------------------------------------------- what is measured


def _works(
    process: Process, sizes: Sizes, node: dist.ProcessGroup | None
) -> tuple[dict[str, list[Work]], dict[str, str]]:
    """Field -> what to try for it; and why fields are left out."""
    device, room = process.device, _room_bytes(process)
    works: dict[str, list[Work]] = {}
    missing: dict[str, str] = {}
    for name, dtype in DTYPES.items():
        if reason := _unfit(name, device):
            missing |= {f"{name}_matmul_flops": reason, f"{name}_attention_flops": reason}
            continue
        works[f"{name}_matmul_flops"] = [_product(shape, dtype, device) for shape in sizes.matmul]
        works[f"{name}_attention_flops"] = [_attention(shape, dtype, device) for shape in sizes.attention]
    works["hbm_bytes_per_s"] = [_copy(size, device) for size in _within(sizes.copy_bytes, room)]
    if device.type == "cuda":
        for name, back in (("to_device_bytes_per_s", False), ("to_host_bytes_per_s", True)):
            works[name] = [_host_copy(size, device, back=back) for size in _within(sizes.host_bytes, room)]
    else:
        missing["host_bytes_per_s"] = "the CPU's memory is the host's"
    works |= _collectives(process, _within(sizes.message_bytes, room), node, missing)
    return works, missing


def _unfit(precision: str, device: torch.device) -> str:
    """Why `precision` is not measured here; empty where it is."""
    if device.type == "cpu":
        return NOT_ON_A_CPU if precision == "fp16" else ""
    emulated = precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "the chip has no bf16 units" if emulated else ""


def _product(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Work:
    rows, inner, columns = shape

    def prepare() -> Callable[[], object]:
        # Random numbers: zeros draw less power, and a hot chip lowers its clock.
        left, right = _random((rows, inner), dtype, device), _random((inner, columns), dtype, device)
        result = torch.empty(rows, columns, dtype=dtype, device=device)
        return lambda: torch.mm(left, right, out=result)

    return Work(2.0 * rows * inner * columns, f"[{rows}, {inner}] x [{inner}, {columns}]", prepare)


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Work:
    """With the kernel that torch chooses, as models here call it; without a mask, as `Rates.attention` counts."""
    sequences, heads, tokens, width = shape

    def prepare() -> Callable[[], object]:
        query, key, value = (_random(shape, dtype, device) for _ in range(3))

        def call() -> Tensor:
            with torch.no_grad():
                return F.scaled_dot_product_attention(query, key, value)

        return call

    of = f"{sequences} x {heads} heads of {width}, {tokens} tokens, no mask"
    return Work(4.0 * sequences * heads * tokens**2 * width, of, prepare)


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _copy(size: int, device: torch.device) -> Work:
    def prepare() -> Callable[[], object]:
        source, target = _bytes(size, device), _bytes(size, device)
        return lambda: target.copy_(source)

    return Work(2.0 * size, f"copy of {format_bytes(size)}, read and written", prepare)


def _host_copy(size: int, device: torch.device, *, back: bool) -> Work:
    def prepare() -> Callable[[], object]:
        here, there = torch.ones(size // 4, pin_memory=True), _bytes(size, device)
        source, target = (there, here) if back else (here, there)
        return lambda: target.copy_(source, non_blocking=True)

    return Work(size, f"{format_bytes(size)} of pinned memory", prepare)


def _bytes(size: int, device: torch.device) -> Tensor:
    """So many bytes, each page of which has been written: untouched ones are no memory yet."""
    return torch.ones(size // 4, device=device)


def _within(choices: Sequence[int], room: float) -> list[int]:
    """Those that there is room for, the smallest in any case."""
    return [size for i, size in enumerate(choices) if i == 0 or size <= room]


# ---------------------------------------------------------------- collectives


def _collectives(
    process: Process, messages: Sequence[int], node: dist.ProcessGroup | None, missing: dict[str, str]
) -> dict[str, list[Work]]:
    """Within a node, and between nodes where there are several; why not goes into `missing`."""
    local, nodes = process.local_world_size, process.world_size // process.local_world_size
    works: dict[str, list[Work]] = {}
    if local > 1:
        works["all_gather_bytes_per_s"] = [_gather(size, local, node, process.device) for size in messages]
        works["all_reduce_bytes_per_s"] = [_reduce(size, local, node, process.device) for size in messages]
    else:
        alone = "there was one rank on the node"
        missing |= {"all_gather_bytes_per_s": alone, "all_reduce_bytes_per_s": alone}
    if nodes > 1:
        gathers = [_gather(size, process.world_size, None, process.device, local) for size in messages]
        works["network_bytes_per_s"] = gathers
    else:
        missing["network_bytes_per_s"] = "there was one node"
    return works


def _gather(size: int, ranks: int, group: dist.ProcessGroup | None, device: torch.device, share: int = 1) -> Work:
    """All-gather to `size` bytes, in a ring that `share` ranks of a node have in common; None: of all ranks."""
    elements = max(1, size // 4 // ranks)

    def prepare() -> Callable[[], object]:
        mine, everyones = torch.ones(elements, device=device), torch.ones(ranks * elements, device=device)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
        return lambda: gather(everyones, mine, group=group)

    moved = (ranks - 1) * elements * 4 / share
    return Work(moved, f"{ranks} ranks, {format_bytes(elements * ranks * 4)}", prepare, alone=False)


def _reduce(size: int, ranks: int, group: dist.ProcessGroup | None, device: torch.device) -> Work:
    elements = max(1, size // 4)

    def prepare() -> Callable[[], object]:
        values = torch.zeros(elements, device=device)  # whose sums stay finite however often they are added up
        return lambda: dist.all_reduce(values, group=group)

    moved = 2 * (ranks - 1) / ranks * elements * 4
    return Work(moved, f"{ranks} ranks, {format_bytes(elements * 4)}", prepare, alone=False)


def _node_group(process: Process) -> dist.ProcessGroup | None:
    """The ranks of this one's node; None where those are all. A collective call."""
    local, world_size = process.local_world_size, process.world_size
    even = all(process.gather_objects(process.rank % local == process.local_rank)) and world_size % local == 0
    if not even:
        raise UserError(
            f"the ranks must be equally many on every node, but are {world_size} in all and {local} on one of them; "
            "start as many on each"
        )
    if local == world_size:
        return None
    groups = [dist.new_group(list(range(first, first + local))) for first in range(0, world_size, local)]
    found = groups[process.rank // local]
    assert isinstance(found, dist.ProcessGroup), "a rank is in the group of its node"
    return found


# ---------------------------------------------------------------- what it was measured on


def _device(process: Process) -> str:
    if process.device.type == "cuda":
        return torch.cuda.get_device_name(process.device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "cpu"


def _memory_bytes(process: Process) -> int | None:
    """The card's; of a CPU what the host has available, in equal parts: so much is a rank's own."""
    if process.device.type == "cuda":
        return torch.cuda.get_device_properties(process.device).total_memory
    available = _available_bytes()
    return None if available is None else available // process.local_world_size


def _available_bytes() -> int | None:
    """What the kernel thinks that new processes can have without swapping (proc(5)); None where it does not say."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _room_bytes(process: Process) -> float:
    """The most that one buffer may take, the same on all ranks."""
    if process.device.type == "cuda":
        free = torch.cuda.mem_get_info(process.device)[0]
    else:
        free = (_available_bytes() or 2048 * MiB) / process.local_world_size
    return min(process.gather_objects(ROOM * free))


def _facts(process: Process, seconds: float) -> dict[str, object]:
    """How it was measured."""
    ranks, local = process.world_size, process.local_world_size
    on_gpu = process.device.type == "cuda"
    clock = "CUDA events" if on_gpu else "the system's clock"
    method = (
        f"median over the repeats of all ranks, which worked at the same time; timed by {clock} after warming up; of "
        "several sizes the fastest; lowest and highest are of single repeats; FLOP/s and bytes/s, of collectives the "
        "bus bandwidth: (n - 1)/n of an all-gather's bytes, or twice that of an all-reduce's, over the time"
    )
    memory = "total memory of the card" if on_gpu else "memory available on the host over the ranks of a node"
    return {
        "device_type": process.device.type,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "ranks": ranks,
        "nodes": ranks // local,
        "threads": None if on_gpu else torch.get_num_threads(),
        "collectives": "nccl" if on_gpu else "gloo",
        "matmul_precision": torch.get_float32_matmul_precision(),
        "memory": memory,
        "method": method,
        "cuda": torch.version.cuda,
        "platform": f"{platform.system()} {platform.machine()}",
        **{key: value for key, value in environment(ranks, "").items() if key not in ("device", "world_size")},
    }
