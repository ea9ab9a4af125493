"""Which rank is at fault when a run stands still, judged from what the watchdogs of the ranks found."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from scaling.watch.heartbeat import PARTS, PHASES, Beat


class Waiting(NamedTuple):
    """A collective that a rank has entered and not left."""

    operation: str
    """"all_reduce", say."""
    group: str
    sequence: int
    """Number of the collective within its group, counted from 1."""
    sizes: str
    """Shapes of what goes in, as text."""
    members: Sequence[int] | None
    """Ranks of the group; None if not known."""

    def __str__(self) -> str:
        return f"{self.operation} of {self.sizes}, the {ordinal(self.sequence)} collective of group {self.group!r}"


class Report(NamedTuple):
    """What its watchdog knows of one rank."""

    rank: int
    host: str
    pid: int
    beat: Beat
    silent_s: float
    """Since the last sign of life."""
    limit_s: float
    """What its phase is allowed."""
    state: str
    """Of the process, as in /proc/PID/stat; "?" if unknown."""
    kernel: str | None
    """Where in the kernel its main thread waits."""
    answers: bool
    """Whether Python code runs in it: a stopped process does not answer, nor one in which a C call holds the GIL."""
    waiting: Waiting | None
    """None too where it has only come there since, woken by the signal that asked for its stacks."""
    joined: dict[str, int]
    """Group -> number of the last collective entered."""

    def to_json(self) -> dict[str, Any]:
        """For the file."""
        beat, waiting = self.beat._asdict(), self.waiting._asdict() if self.waiting else None
        return {**self._asdict(), "beat": beat, "waiting": waiting}

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Report":
        """Back from the file."""
        waiting = Waiting(**found["waiting"]) if found["waiting"] else None
        fields: dict[str, Any] = {**found, "beat": Beat(**found["beat"]), "waiting": waiting}
        return Report(**fields)

    @property
    def progress(self) -> tuple[int, int, int]:
        """Sorts by how far a rank has come."""
        phase = "step" if self.beat.phase == "first_step" else self.beat.phase
        return (self.beat.step, PHASES.index(phase), PARTS.index(self.beat.part))


def blame(reports: Sequence[Report], world_size: int) -> tuple[int | None, str]:
    """The rank at fault, or None where none is, and what it does, as the end of a sentence."""
    stopped = [report for report in reports if report.state in ("T", "t")]
    waiting = [report for report in reports if report.waiting]
    if stopped:
        why = "its process is stopped, by SIGSTOP or a debugger"
        return stopped[0].rank, _does(stopped[0], why) + _others(waiting)
    idle = [report for report in reports if not report.waiting]
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    if idle:
        rank = min(idle, key=lambda report: report.progress)
        why = "" if rank.answers else "it does not answer: a call outside Python holds its lock (the GIL)"
        return rank.rank, _does(rank, why) + _others(waiting)
    if missing:
        return missing[0], f"rank {missing[0]} does not answer: its machine or its watchdog is gone" + _others(waiting)
    return _absent(waiting) or _different(waiting) or _none(waiting)


def place(beat: Beat) -> str:
    """Where a rank is, in words."""
    match beat.phase:
        case "startup" | "closing":
            return f"`{beat.phase}`"
        case "validation" | "save":
            return f"`{beat.phase}` after step {beat.step}"
        case _:
            return f"step {beat.step}" if beat.part in ("", "other") else f"`{beat.part}` of step {beat.step}"


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th."""
    endings = {1: "st", 2: "nd", 3: "rd"}
    teen = number // 10 % 10 == 1
    return str(number) + ("th" if teen else endings.get(number % 10, "th"))


def _does(report: Report, why: str) -> str:
    text = f"rank {report.rank} has shown none for {report.silent_s:.0f} s, in {place(report.beat)}"
    return f"{text} ({why})" if why else text


def _others(waiting: Sequence[Report]) -> str:
    if not waiting:
        return ""
    first = waiting[0]
    more = f" ({len(waiting)} ranks wait)" if len(waiting) > 1 else ""
    return f"; rank {first.rank} waits in {first.waiting}, in {place(first.beat)}{more}"


def _absent(waiting: Sequence[Report]) -> tuple[int, str] | None:
    """A rank that never came to the collective that others wait in, though it waits itself: it has left one out."""
    awaited: Counter[int] = Counter()
    by_rank = {report.rank: report for report in waiting}
    for report in waiting:
        wait = report.waiting
        assert wait is not None
        members = by_rank if wait.members is None else wait.members
        awaited.update(r for r in members if r in by_rank and by_rank[r].joined.get(wait.group, 0) < wait.sequence)
    if not awaited:
        return None
    # Two that wait for each other: the one that has come further has passed what the other is still at.
    rank = max(awaited, key=lambda rank: (awaited[rank], by_rank[rank].progress))
    absent = by_rank[rank]
    others = [r for r in waiting if r.waiting and absent.joined.get(r.waiting.group, 0) < r.waiting.sequence]
    why = f"it waits in {absent.waiting}, and has not come to a collective that others wait in"
    return rank, _does(absent, why) + _others(others)


def _different(waiting: Sequence[Report]) -> tuple[int, str] | None:
    """A rank that came with another operation, or other shapes, than most."""
    kinds = Counter((r.waiting.operation, r.waiting.sizes) for r in waiting if r.waiting)
    if len(kinds) < 2:
        return None
    usual = kinds.most_common(1)[0][0]
    odd = next(r for r in waiting if r.waiting and (r.waiting.operation, r.waiting.sizes) != usual)
    rest = [r for r in waiting if r.waiting and (r.waiting.operation, r.waiting.sizes) == usual]
    return odd.rank, _does(odd, f"it waits in {odd.waiting}, and the others in another one") + _others(rest)


def _none(waiting: Sequence[Report]) -> tuple[None, str]:
    first = waiting[0]
    return None, (
        f"every rank has waited for {first.silent_s:.0f} s in {first.waiting}, in {place(first.beat)}: "
        "none is missing, so look at the network between them"
    )
