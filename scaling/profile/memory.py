"""Memory of this process: the allocator's peaks on a GPU, the resident set on the host."""

import os

import torch


class MemoryMonitor:
    """Peaks since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> dict[str, int | None]:
        """Bytes; the allocator's figures are None on a CPU."""
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        return {
            "allocated_peak_bytes": allocated,
            "reserved_peak_bytes": reserved,
            "host_rss_bytes": _resident_bytes(),
        }


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None  # no /proc on this system
