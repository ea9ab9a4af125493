"""What a measurement was made on, and how much others used of it meanwhile."""

import functools
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

BUSY = 0.05
"""Share of all cores, and of a GPU's time, from which on what others take may show in a figure."""
GPU_TAKEN_MIB = 1024
"""What others may hold of a GPU, in the driver's unit, before it is said: less is what a display takes."""


@dataclass(frozen=True)
class Device:
    """What ranks run on here."""

    kind: str
    """"gpu" or "cpu"."""
    name: str
    """As the driver or the kernel calls it."""
    count: int
    """GPUs, or cores."""


@functools.cache
def device() -> Device:
    """The GPUs of this machine, or its processor. Imports torch."""
    import torch

    if gpus := torch.cuda.device_count():
        return Device("gpu", torch.cuda.get_device_name(0), gpus)
    return Device("cpu", _processor(), cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def ran_on(here: Device, ranks: int, *, rehearsed: bool) -> dict[str, Any]:
    """What a row says of where it comes from. A CPU, or a rehearsal, stands in its words, whatever else is read."""
    if rehearsed:
        place = f"one {here.name}" if here.kind == "gpu" else f"a CPU ({here.name}), no GPU"
        words = f"rehearsed: rank 0 of {ranks} alone on {place}"
    elif here.kind == "gpu":
        words = f"{ranks} x {here.name}"
    else:
        words = f"{ranks} CPU rank{'' if ranks == 1 else 's'} ({here.name}, {here.count} cores), no GPU"
    return {"kind": here.kind, "device": here.name, "ranks": ranks, "rehearsed": rehearsed, "words": words}


class Others:
    """How many cores are kept busy by what is neither this process nor a child of it that has ended."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), _busy_seconds(), _own_seconds()

    def cores(self) -> float | None:
        """The mean since this object was made, over all cores of the machine; None where the kernel does not tell."""
        busy, seconds = _busy_seconds(), time.perf_counter() - self._began
        if busy is None or self._busy is None or seconds <= 0:
            return None
        return max(0.0, (busy - self._busy - (_own_seconds() - self._own)) / seconds)


def load(seconds: float = 1.0) -> dict[str, Any]:
    """What others do while this process waits so long, on the cores and on the GPUs."""
    others = Others()
    time.sleep(seconds)
    return {"others_cores": others.cores(), "load_average": os.getloadavg()[0], "gpus": _gpus()}


def _gpus() -> list[dict[str, float]]:
    """Share of time that each GPU is busy and MiB that are taken, of which this process takes none; empty without."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        pairs = [line.split(",") for line in lines]
        return [{"busy": float(busy) / 100, "taken_mib": float(taken)} for busy, taken in pairs]
    except (OSError, ValueError, subprocess.SubprocessError):
        return []


def taken_gpus(gpus: list[dict[str, float]]) -> int:
    """How many of them others are at work on."""
    return sum(gpu["busy"] > BUSY or gpu["taken_mib"] > GPU_TAKEN_MIB for gpu in gpus)


def end_on_sigterm() -> None:
    """End as sys.exit does, so that what was started is ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def run_within(
    limit_s: float, words: Sequence[str], *, cwd: Path, env: Mapping[str, str], output: IO[str]
) -> int | None:
    """Run a command; its exit code, or None where it took longer, and was ended with all that it had started."""
    started = subprocess.Popen(words, cwd=cwd, env=env, stdout=output, stderr=output, start_new_session=True)
    try:
        return started.wait(limit_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGTERM)
            _end(started)


def _end(started: "subprocess.Popen[bytes]") -> None:
    """Wait for what was asked to end, and end what does not."""
    try:
        started.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def is_busy(others_cores: float | None) -> bool:
    """Whether others take so much of this machine that a figure may show it."""
    return others_cores is not None and others_cores > BUSY * (os.cpu_count() or 1)


def _own_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _busy_seconds() -> float | None:
    """Core-seconds since the machine started that were neither idle nor waiting for a disk (proc_stat(5))."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
