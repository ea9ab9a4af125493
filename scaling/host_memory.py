"""How much host memory this process may have, as the kernel tells it (Linux; elsewhere unknown)."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ADDRESS_SPACE = "the address space that `ulimit -v` gives"
COPY_BYTES = 2**28
"""Host memory for the copy of the state that is saved is taken in pieces of this size, and used as the copy needs it:
CHUNK_BYTES of scaling/checkpoint/format.py."""
_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60
"""cgroup v1 writes "no limit" as a number near 2^63."""


class Limit(NamedTuple):
    """One bound on what this process may take."""

    name: str
    """What sets it, in words."""
    limit_bytes: int
    free_bytes: int
    """What is left of it."""
    shared: bool
    """Other ranks of this machine draw on it too."""


def limits() -> list[Limit]:
    """All bounds that are known, the tightest first."""
    found = [*_of_process(), *_of_cgroup(), *_of_machine()]
    return sorted(found, key=lambda limit: limit.free_bytes)


def resident_bytes() -> int | None:
    """What this process has in memory."""
    sizes = _statm()
    return None if sizes is None else sizes[1]


def _of_process() -> Iterator[Limit]:
    sizes = _statm()
    bound = resource.getrlimit(resource.RLIMIT_AS)[0]
    if sizes is not None and bound != resource.RLIM_INFINITY:
        yield Limit(ADDRESS_SPACE, bound, max(0, bound - sizes[0]), False)


def _of_cgroup() -> Iterator[Limit]:
    """Of the control group and of those around it, in version 2, then in version 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            root = _CGROUPS if not controllers else _CGROUPS / "memory"
            names = ("memory.max", "memory.current") if not controllers else _V1
            own = root / path.lstrip("/")
            for folder in (own, *own.parents):
                if limit := _of_group(folder, *names):
                    yield limit
                if folder == root:
                    break


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _of_group(folder: Path, most: str, current: str) -> Limit | None:
    try:
        bound, used = (folder / most).read_text().strip(), int((folder / current).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not bound.isdigit() or int(bound) > _UNLIMITED:
        return None
    # Pages of files that nobody has used lately go before anything fails.
    kept = max(0, used - int(stat.get("inactive_file", stat.get("total_inactive_file", 0))))
    return Limit("the memory limit of the control group", int(bound), max(0, int(bound) - kept), True)


def _of_machine() -> Iterator[Limit]:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    if "MemAvailable" in sizes:
        yield Limit("the memory of this machine", sizes["MemTotal"], sizes["MemAvailable"], True)


def _statm() -> tuple[int, int] | None:
    """Bytes of the address space, and of it in memory."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = file.read().split()
    except OSError:
        return None
    page = os.sysconf("SC_PAGE_SIZE")
    return int(pages[0]) * page, int(pages[1]) * page
