"""Memory of this process: the allocator's peaks on a GPU, the resident set on the host."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from scaling.host_memory import resident_bytes


class MemoryMonitor:
    """Peaks since the last reading. The allocator counts when it is asked for memory: nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._peaks: dict[str, int] = {}
        self._phases: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Note the allocated peak of what is inside under `name`."""
        if not self._on_gpu:
            yield
            return
        self._turn()
        yield
        self._phases[name] = max(self._turn()["allocated_bytes.all.peak"], self._phases.get(name, 0))

    def read(self) -> dict[str, Any]:
        """What `StepRecord.memory` says but for "device_used_bytes"; the allocator's figures are None on a CPU."""
        found: dict[str, Any] = dict.fromkeys(
            (
                *("allocated_peak_bytes", "active_peak_bytes", "reserved_peak_bytes", "fragmentation"),
                *("allocation_retries", "out_of_memory_count", "host_pinned_bytes", "phases"),
            )
        )
        if self._on_gpu:
            stats, peaks = self._turn(), self._peaks
            found |= {f"{name}_peak_bytes": peak for name, peak in peaks.items()}
            found |= {
                "fragmentation": 1 - peaks["active"] / peaks["reserved"] if peaks["reserved"] else None,
                "allocation_retries": stats["num_alloc_retries"],
                "out_of_memory_count": stats["num_ooms"],
                "host_pinned_bytes": torch.cuda.host_memory_stats().get("allocated_bytes.current"),
                "phases": self._phases or None,
            }
            self._peaks, self._phases = {}, {}
        return {**found, "host_rss_bytes": resident_bytes()}

    def _turn(self) -> dict[str, Any]:
        """Begin to count peaks anew; returns what the allocator has counted until now."""
        stats = torch.cuda.memory_stats(self._device)
        for name in ("allocated", "active", "reserved"):
            self._peaks[name] = max(stats[f"{name}_bytes.all.peak"], self._peaks.get(name, 0))
        torch.cuda.reset_peak_memory_stats(self._device)
        return stats
