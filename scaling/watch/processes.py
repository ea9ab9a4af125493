"""What the kernel says about processes (Linux; elsewhere unknown)."""

import os
from pathlib import Path
from typing import NamedTuple

_LAUNCHER_PROGRAMS = {"torchrun", "deepspeed", "deepspeed.pt", "ds"}
_LAUNCHER_MODULES = {
    "torch.distributed.run",
    "torch.distributed.launch",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
}
_MODULE_FILES = tuple(name.replace(".", "/") + ".py" for name in _LAUNCHER_MODULES)
_GENERATIONS = 12


class Status(NamedTuple):
    """One line of /proc/PID/stat."""

    state: str
    """One letter: R runs, S sleeps, D waits for a device, T stopped by a signal, t by a debugger, Z dead."""
    parent: int
    started: int
    """Ticks since boot; with the pid it names a process for good."""
    exit_status: int | None
    """As os.wait gives it, for a dead process that its parent has not collected yet."""


class Launcher(NamedTuple):
    """A process above a rank that launches ranks."""

    pid: int
    started: int
    name: str

    def is_alive(self) -> bool:
        """Whether it still runs."""
        status = process_status(self.pid)
        return status is not None and status.started == self.started and status.state not in "ZX"


def process_status(pid: int) -> Status | None:
    """What is known of a process; None if it is gone, or the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name before it may hold anything
    status = int(fields[49]) if fields[0] in "ZX" and len(fields) > 49 else None
    return Status(fields[0], int(fields[1]), int(fields[19]), status)


def launchers_of(pid: int) -> list[Launcher]:
    """The launchers among the ancestors of a process, nearest first.

    DeepSpeed has two of them above a rank: the one on each machine, and `deepspeed` itself.
    """
    found: list[Launcher] = []
    for _ in range(_GENERATIONS):
        status = process_status(pid)
        if status is None or status.parent <= 1:
            break
        pid = status.parent
        above, name = process_status(pid), launcher_name(pid)
        if above is not None and name is not None:
            found.append(Launcher(pid, above.started, name))
    return found


def launcher_name(pid: int) -> str | None:
    """What launcher a process is, from its command line; None if it is none."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:5]
    except OSError:
        return None
    for before, word in zip(["", *words], words, strict=False):
        if before == "-m" and word in _LAUNCHER_MODULES:
            return word
        if os.path.basename(word) in _LAUNCHER_PROGRAMS or word.endswith(_MODULE_FILES):
            return os.path.basename(word)
    return None


def waits_in(pid: int) -> str | None:
    """The place in the kernel where the main thread of a process waits."""
    try:
        return Path(f"/proc/{pid}/wchan").read_text().strip("0\n") or None
    except OSError:
        return None


def killed_for_memory() -> int:
    """How many processes the kernel has killed since boot because there was no memory left."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except OSError:
        pass
    return 0
