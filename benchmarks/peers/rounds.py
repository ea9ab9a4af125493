"""Starts peers and measures them by turns: one trains, the others are stopped in the midst of theirs.

All peers of a job are alive at once, each in processes of its own, and a turn is SIGCONT, some seconds, SIGSTOP. Of a
turn the whole steps count. So turns of different peers lie side by side without a start between them, and what else the
machine does falls on neighbours alike.
"""

import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.peers.common import LOSSES

T = TypeVar("T")
START_S = 300.0
"""A start that takes longer has failed."""
_POLL_S = 0.02
_ENDLESS = 10**6
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Peer:
    """A script, one of its ways, and the Python that it runs under."""

    name: str
    module: str
    variant: str
    files: tuple[str, ...]
    """What its user writes: files beside this one, or of the job."""
    python: str


class DidNotRun(Exception):
    """A peer that did not get as far as it should have; says why."""


@dataclass
class Turn:
    """What one turn has shown."""

    steps_per_second: float
    steps: int
    cpu_seconds_per_step: float
    """Of all ranks together."""
    others_cores: float
    """Cores that everything else on the machine kept busy meanwhile."""


class Running:
    """A peer that trains, and can be stopped and told to go on."""

    def __init__(self, peer: Peer, job: Path, out: Path, ranks: int) -> None:
        self.peer, self._out, self._ranks = peer, out, ranks
        out.mkdir(parents=True)
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command = [peer.python, *(launcher if ranks > 1 else []), "-m", f"benchmarks.peers.{peer.module}"]
        root = Path(__file__).resolve().parent.parent.parent
        environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = open(out / "log", "w")  # noqa: SIM115 - open as long as the process
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, str(job), str(out), str(_ENDLESS), peer.variant],
            cwd=root,
            env=environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def lines(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a rank has told: its pid, then its steps."""
        path = self._out / f"rank{rank}.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def wait(self, steps: int) -> None:
        """Until so many steps are done. Raises DidNotRun."""
        until = time.perf_counter() + START_S
        while len(self.lines()) <= steps:
            if self._process.poll() is not None and len(self.lines()) <= steps:
                raise DidNotRun(self._why())
            if time.perf_counter() > until:
                raise DidNotRun(f"has not done {steps} steps after {START_S:.0f} s")
            time.sleep(_POLL_S)

    @property
    def start_seconds(self) -> float:
        """From the command to the end of the first step."""
        return self.lines()[1]["at"] - self.began

    def _cpu(self) -> float:
        return sum(map(_cpu_of, self._pids()))

    def _pids(self) -> list[int]:
        return [lines[0]["pid"] for lines in map(self.lines, range(self._ranks)) if lines]

    def stop(self) -> None:
        """Stand still."""
        for pid in self._pids():
            os.kill(pid, signal.SIGSTOP)

    def turn(self, seconds: float, steps: int) -> Turn:
        """Train for so long, and at least for so many whole steps; then stand still again."""
        before = [len(self.lines(rank)) for rank in range(self._ranks)]
        own, busy, began = self._cpu(), _busy(), time.perf_counter()
        for pid in self._pids():
            os.kill(pid, signal.SIGCONT)
        time.sleep(seconds)
        self.wait(before[0] + steps)  # the first of them had begun before
        self.stop()
        took, own = time.perf_counter() - began, self._cpu() - own
        others = max(0.0, _busy() - busy - own) / took
        ends = [self.lines(rank)[first:] for rank, first in enumerate(before)]
        whole, seconds = len(ends[0]) - 1, ends[0][-1]["at"] - ends[0][0]["at"]
        cpu = sum((of[-1]["cpu"] - of[0]["cpu"]) / (len(of) - 1) for of in ends if len(of) > 1)
        return Turn(whole / seconds, whole, cpu, others)

    def peak_bytes(self) -> dict[str, int]:
        """Of the rank with the most: resident memory of the host, and on a GPU what its allocator gave out."""
        found = {"resident": max(_high_water(pid) for pid in self._pids())}
        given = [line["allocated"] for rank in range(self._ranks) for line in self.lines(rank) if "allocated" in line]
        return found | ({"allocated": max(given)} if given else {})

    def losses(self) -> list[float]:
        """Of each of the first steps, the mean over ranks."""
        ranks = [[line["loss"] for line in self.lines(rank)[1 : LOSSES + 1]] for rank in range(self._ranks)]
        return [sum(each) / len(each) for each in zip(*ranks, strict=True)]

    def end(self) -> None:
        """Kill what is left of it."""
        if self._process.returncode is not None and self._log.closed:
            return
        for pid in (*self._pids(), self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        self._log.close()

    def _why(self) -> str:
        """The last line of its log that names an error, or the last of all."""
        lines = [line.strip() for line in (self._out / "log").read_text(errors="replace").splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
        return (named or lines or ["ended without a word"])[-1][:300]


def compare(
    peers: Sequence[Peer],
    job: Path,
    ranks: int,
    tokens: int,
    *,
    rounds: int,
    seconds: float,
    starts: int,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A row for each peer: losses, start-up, and each turn; the first peer is what others are held to.

    All start anew `starts` times, and each time take their share of the turns. Another one starts first each time: of
    equal processes it was the first that stayed the slowest for as long as it lived, by some percent.
    """
    rows = [Row(peer) for peer in peers]
    for number in range(starts):
        share = rounds * (number + 1) // starts - rounds * number // starts
        able = [row for row in in_turn(rows, number, starts) if row.why is None]
        _sit(able, job, ranks, number, share, seconds, say)
    return [row.told(rows[0], tokens) for row in rows]


def in_turn(rows: Sequence[T], number: int, starts: int) -> list[T]:
    """The order of start `number` of so many: another one is the first each time."""
    first = number * len(rows) // starts
    return [*rows[first:], *rows[:first]]


def _sit(
    rows: Sequence["Row"], job: Path, ranks: int, number: int, rounds: int, seconds: float, say: Callable[[str], None]
) -> None:
    """Start all peers in this order, have them train by turns, and end them."""
    alive: list[tuple[Row, Running]] = []
    everyone: list[Running] = []
    try:
        for row in rows:
            running = Running(row.peer, job, job / f"{row.peer.name}-{number}", ranks)
            everyone.append(running)
            try:
                running.wait(LOSSES)
                row.starts.append(running.start_seconds)
                running.stop()
                alive.append((row, running))
            except DidNotRun as error:
                row.why = str(error)
            say(f"{row.peer.name}: {row.why or f'first step after {row.starts[-1]:.1f} s'}")
        for turn in range(rounds):
            for row, running in alive if turn % 2 == 0 else reversed(alive):
                if row.why is None:
                    try:
                        row.turns.append(running.turn(seconds, steps=2))
                    except DidNotRun as error:
                        row.why = str(error)
            say(f"round {turn + 1} of {rounds}, start {number + 1}")
        for row, running in ((row, running) for row, running in alive if row.why is None):
            row.peaks.append(running.peak_bytes())
            row.losses = running.losses()
    finally:
        for running in everyone:
            running.end()


@dataclass
class Row:
    """What is known of a peer so far."""

    peer: Peer
    why: str | None = None
    """It did not run, and why."""
    losses: list[float] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    peaks: list[dict[str, int]] = field(default_factory=list)
    """Of each start."""

    def told(self, reference: "Row", tokens: int) -> dict[str, Any]:
        """As JSON; `reference` is the peer that losses and speed are held against."""
        row: dict[str, Any] = {"peer": self.peer.name, "why_not": self.why}
        if self.losses and reference.losses:
            apart = max(abs(one - other) for one, other in zip(self.losses, reference.losses, strict=True))
            row |= {"losses": self.losses, "losses_apart": apart}
        if self.why is None and reference.why is not None:
            row["why_not"] = f"{reference.peer.name}, which it would be held against, did not run"
        if row["why_not"] is not None or not self.turns:
            return row
        speeds = [turn.steps_per_second * tokens for turn in self.turns]
        row |= {
            "tokens_per_second": statistics.median(speeds),
            "turns": speeds,
            "steps": sum(turn.steps for turn in self.turns),
            "cpu_seconds_per_step": statistics.median(turn.cpu_seconds_per_step for turn in self.turns),
            "cpu_seconds_per_step_of_turns": [turn.cpu_seconds_per_step for turn in self.turns],
            "others_cores": [turn.others_cores for turn in self.turns],
            "peak_bytes": {kind: max(peak[kind] for peak in self.peaks) for kind in self.peaks[0]},
            "start_seconds": statistics.median(self.starts),
            "starts": self.starts,
        }
        row["of_ours"] = ratios([own / their for own, their in zip(*map(_speeds, (self, reference)), strict=True)])
        costs = zip(self.turns, reference.turns, strict=True)
        row["cpu_of_ours"] = ratios([one.cpu_seconds_per_step / two.cpu_seconds_per_step for one, two in costs])
        return row


def _speeds(row: Row) -> list[float]:
    return [turn.steps_per_second for turn in row.turns]


def ratios(found: Sequence[float]) -> dict[str, Any]:
    """The median of pairs, and what the middle half of them lies within."""
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return {"median": statistics.median(found), "low": low, "high": high, "pairs": list(found)}


def _high_water(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _busy() -> float:
    """Core seconds that all processes of this machine have used so far, and those that its host took away."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS
