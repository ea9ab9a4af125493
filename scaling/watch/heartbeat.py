"""The sign of life of a rank: where in the run it is, in memory that its watchdog reads.

Kept in an unnamed file that both processes have open: nothing to clean up, however either of them ends. There is no
time in it. The watchdog counts the seconds in which nothing has moved itself, so that neither a clock that is set nor a
machine that sleeps can look like a hang.
"""

import mmap
import os
import tempfile
from typing import NamedTuple

PHASES = ("startup", "first_step", "step", "validation", "save", "closing")
"""In the order of a run; the first step of a run compiles, and has a time-out of its own."""
PARTS = ("", "data", "forward", "backward", "optimizer", "other")
_BYTES = 64
_BEATS, _PHASE, _PART, _STEP, _STOPPING = range(5)
_PHASE_NUMBERS = {name: number for number, name in enumerate(PHASES)}
_PART_NUMBERS = {name: number for number, name in enumerate(PARTS)}


class Beat(NamedTuple):
    """Where a rank was when it last gave a sign of life."""

    beats: int
    """How many it has given."""
    phase: str
    part: str
    """Part of a step, from PARTS; "" outside of steps."""
    step: int
    """The step under way, or the last one; 0 before the first."""
    stopping: int
    """Number of the signal that has asked it to stop; 0 if none has."""


class Heartbeat:
    """The rank's end. Each call takes about a quarter of a microsecond, and fails never."""

    def __init__(self, file: int) -> None:
        """`file`: descriptor of a file from `unnamed_file`."""
        self._view = _view(file)
        self._first_step: int | None = None

    def beat(self, phase: str, step: int | None = None) -> None:
        """Enter `phase` (of PHASES), at `step` (counted from 1; the same as before if None)."""
        view = self._view
        if step is not None:
            view[_STEP] = step
            if phase == "step":
                if self._first_step is None:
                    self._first_step = step
                if step == self._first_step:
                    phase = "first_step"
        view[_PHASE] = _PHASE_NUMBERS[phase]
        view[_PART] = 0
        view[_BEATS] += 1

    def part(self, name: str = "") -> None:
        """Go on within the phase: to the part `name` (of PARTS), or one piece further."""
        view = self._view
        view[_PART] = _PART_NUMBERS[name]
        view[_BEATS] += 1

    def stopping(self, signal_number: int) -> None:
        """A signal has asked this rank to stop."""
        self._view[_STOPPING] = signal_number


class NullHeartbeat(Heartbeat):
    """For runs that nobody watches."""

    def __init__(self) -> None:
        pass

    def beat(self, phase: str, step: int | None = None) -> None:
        """Do nothing."""

    def part(self, name: str = "") -> None:
        """Do nothing."""

    def stopping(self, signal_number: int) -> None:
        """Do nothing."""


class HeartbeatReader:
    """The watchdog's end."""

    def __init__(self, file: int) -> None:
        self._view = _view(file)

    def read(self) -> Beat:
        """The latest sign of life."""
        view = self._view
        return Beat(view[_BEATS], PHASES[view[_PHASE]], PARTS[view[_PART]], view[_STEP], view[_STOPPING])


def unnamed_file() -> int:
    """Descriptor of a new file without a name, for this user alone, gone with the last process that has it open."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("scaling-watch")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    return file


def _view(file: int) -> memoryview:
    os.ftruncate(file, max(_BYTES, os.fstat(file).st_size))
    # Eight bytes at a time: a reader never sees half a number.
    return memoryview(mmap.mmap(file, _BYTES)).cast("q")
