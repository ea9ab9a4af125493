"""Units: bytes, seconds and counts inside; GiB and thousands only where a person reads."""

GiB = 2**30
MiB = 2**20
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element, by precision."""
ALLOCATION_BYTES = 512
"""CUDA's caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.cpp, kMinBlockSize)."""


def format_bytes(count: float) -> str:
    """`count` bytes as GiB, MiB or bytes, three significant digits: "3.72 GiB"."""
    for name, size in (("GiB", GiB), ("MiB", MiB), ("KiB", 1024)):
        if abs(count) >= size:
            return f"{count / size:.3g} {name}" if abs(count) < 1000 * size else f"{count / size:,.0f} {name}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """A count as people say it: 124.5M, 8.03B, 512."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:.4g}{suffix}"
    return f"{count:.4g}"


def format_seconds(seconds: float) -> str:
    """A duration: "0.42 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
