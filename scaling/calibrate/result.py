"""What is measured, at which sizes, and the hardware file that comes of it. No torch."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaling.hardware import CALIBRATION, GPU, Measured, gpu_from_device_name
from scaling.units import MiB


@dataclass(frozen=True)
class Sizes:
    """How large the measured work is; of each list the smaller first, since the larger is left out if it takes long."""

    matmul: tuple[tuple[int, int, int], ...]
    """Rows, inner dimension and columns of each product."""
    attention: tuple[tuple[int, int, int, int], ...]
    """Sequences, heads, tokens of a sequence, elements of a head."""
    copy_bytes: tuple[int, ...]
    """Within the device's memory: larger than any cache."""
    host_bytes: tuple[int, ...]
    """Between host and device."""
    message_bytes: tuple[int, ...]
    """All of an all-gather's result or of what an all-reduce adds up, on each rank."""


GPU_SIZES = Sizes(
    matmul=((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 8192)),
    attention=((2, 16, 8192, 128),),
    copy_bytes=(256 * MiB, 1024 * MiB),
    host_bytes=(64 * MiB, 256 * MiB),
    message_bytes=(16 * MiB, 64 * MiB, 256 * MiB),
)
CPU_SIZES = Sizes(
    matmul=((1024, 1024, 1024), (2048, 2048, 2048)),
    attention=((1, 4, 1024, 64), (1, 8, 2048, 64)),
    copy_bytes=(256 * MiB,),
    host_bytes=(),
    message_bytes=(16 * MiB, 64 * MiB, 256 * MiB),
)


@dataclass(frozen=True)
class Figure:
    """One rate: the median of its repeats over all ranks, with the slowest and the fastest of them."""

    median: float
    lowest: float
    highest: float
    repeats: int
    """On each rank."""
    of: str
    """What was done, in words."""


def figure(work: float, seconds: Sequence[float], repeats: int, of: str) -> Figure:
    """The rate of `work` (FLOPs or bytes) that took each of `seconds`."""
    rates = sorted(work / one for one in seconds)
    return Figure(statistics.median(rates), rates[0], rates[-1], repeats, of)


@dataclass(frozen=True)
class Found:
    """All that the ranks have found out."""

    device: str
    """The card's name in full, or the processor's."""
    device_type: str
    """torch's: "cuda" or "cpu"."""
    memory_bytes: int | None
    """Of one rank: the card's, or its share of what the host had available."""
    figures: Mapping[str, Figure]
    """By the fields of `Measured`; host_bytes_per_s in both directions (HOST_COPIES)."""
    not_measured: Mapping[str, str]
    """Field -> why not."""
    facts: Mapping[str, Any]
    """Whatever else tells where the figures come from: ranks, method, versions, date."""


HOST_COPIES = ("to_device_bytes_per_s", "to_host_bytes_per_s")
"""The two figures whose slower one is host_bytes_per_s."""


def hardware_file(found: Found) -> dict[str, Any]:
    """What `--hardware` reads: the card as the table knows it, or nulls, and beside it what was measured."""
    medians = {name: one.median for name, one in found.figures.items()}
    directions = [medians.pop(name) for name in HOST_COPIES if name in medians]
    if directions:
        medians["host_bytes_per_s"] = min(directions)
    on_gpu = found.device_type == "cuda"
    known = gpu_from_device_name(found.device) if on_gpu else None
    peaks: dict[str, Any] = {one.name: None for one in dataclasses.fields(GPU)}
    if known is not None:
        peaks = dataclasses.asdict(known)
    measured = Measured(device=found.device, device_type="cuda" if on_gpu else "cpu", **medians)
    return {
        **peaks,
        "name": (known.name if known else found.device) if on_gpu else "cpu",
        "device_names": [found.device] if on_gpu else [],
        "memory_bytes": found.memory_bytes,
        "measured": dataclasses.asdict(measured),
        CALIBRATION: {
            "device": found.device,
            **found.facts,
            "figures": {name: dataclasses.asdict(one) for name, one in found.figures.items()},
            "not_measured": dict(found.not_measured),
        },
    }
