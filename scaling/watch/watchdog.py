"""The process beside a rank that sees it hang, die, or be left alone by its launcher, and ends what is left of the run.

A process of its own, since neither a stopped process nor one in which a C call holds Python's lock can watch itself.
Started by `Watch` with a configuration on its command line; ends with its rank.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from scaling.watch.blame import Report, Waiting, blame, place
from scaling.watch.heartbeat import Beat, HeartbeatReader
from scaling.watch.outcome import (
    ALARM,
    DIED,
    HUNG,
    Outcome,
    failure_folder,
    read_json,
    settle,
    settled,
    write_whole,
)
from scaling.watch.processes import Launcher, killed_for_memory, process_status, waits_in

POLL_S = 0.5
_ANSWER_S = 1.0
"""How long the rank has to dump its stacks and say which collective it is in."""
_GATHER_S = 3.0
"""How long the reports of other ranks are waited for, beyond one's own."""
_REPORT_S = 10.0
"""After that the rank is ended, reports or not: they may lie on the very storage that hangs."""
_KILL_S = 1.0
_NOTICE_S = 3.0
"""How long a rank may go on without a sign of life once another has failed."""
_FATAL = "Fatal Python error: "
"""How the stacks begin that Python dumps as it crashes."""
_LEAVE_S = 3.0
"""How long a rank has to save when its launcher is gone."""


def main() -> None:
    """Watch the rank that the command line describes, until it ends."""
    # A signal to the group of the rank is for the rank; so is the end of a terminal.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    Watchdog(json.loads(sys.argv[1])).watch()


class Watchdog:
    """What is known of one rank, and of the attempt that it is part of."""

    def __init__(self, config: dict[str, Any]) -> None:
        """`config`: what `Watch` passes; descriptors are open in this process."""
        self.rank: int = config["rank"]
        self.pid: int = config["pid"]
        self.limits: dict[str, float] = config["limits"]
        self.launchers = [Launcher(*launcher) for launcher in config["launchers"]]
        self.heartbeat = HeartbeatReader(config["beat"])
        self.stacks_file: int = config["stacks"]
        self.socket = socket.socket(fileno=config["socket"])
        self.killed_for_memory = killed_for_memory()
        self.world_size = 1
        self.folder: Path | None = None
        self.attempt = ""
        self.goodbye = False
        self.answer: dict[str, Any] | None = None
        self.beat = self.heartbeat.read()
        self.silent_s = 0.0
        self.limit_s = 0.0
        self.failed_s: float | None = None
        """Silence counted since another rank's failure was seen."""
        self.left_s: float | None = None
        """Time since the launcher was seen to be gone."""
        self.kept_stacks = False
        self._unread = b""
        self._pidfd = _pidfd(self.pid) if os.getppid() == self.pid else None

    def watch(self) -> None:
        """Return when the rank has said goodbye, or is gone."""
        last = time.monotonic()
        while not self.goodbye:
            if not self.listen(POLL_S):
                self.mourn()
                return
            now = time.monotonic()
            # A watchdog that was itself held up, with the machine or by it, has seen no silence meanwhile.
            passed, last = min(now - last, 2 * POLL_S), now
            self.count(passed)
            if self.silent_s > self.limit_s or self.called():
                self.end_hung_run()
                return
            self.follow_failure(passed)
            self.follow_launcher(passed)

    def listen(self, seconds: float) -> bool:
        """Hear the rank for up to `seconds`; returns whether it is still there."""
        watched = [self.socket] if self._pidfd is None else [self.socket, self._pidfd]
        ready = select.select(watched, [], [], seconds)[0]
        if self.socket in ready:
            with contextlib.suppress(OSError):
                data = self.socket.recv(1 << 16)
                *lines, self._unread = (self._unread + data).split(b"\n")
                for line in lines:
                    self.hear(json.loads(line))
                if not data and not self.goodbye:
                    time.sleep(0.05)  # its end is closed: it is about to be gone
        return self._pidfd not in ready if self._pidfd is not None else os.getppid() == self.pid

    def hear(self, message: dict[str, Any]) -> None:
        """Take in one message of the rank."""
        if "folder" in message:
            self.folder = Path(message["folder"])
            self.attempt, self.world_size = message["attempt"], message["world_size"]
        self.goodbye |= "goodbye" in message
        self.answer = message.get("collective", self.answer)

    def count(self, passed: float) -> None:
        """Count the silence of the rank."""
        beat = self.heartbeat.read()
        self.silent_s = 0.0 if beat.beats != self.beat.beats else self.silent_s + passed
        self.beat = beat
        self.limit_s = self.limits[beat.phase]

    def called(self) -> bool:
        """Whether the watchdog of another rank has found a hang."""
        return self.folder is not None and (failure_folder(self.folder, self.attempt) / ALARM).exists()

    # A hang

    def end_hung_run(self) -> None:
        """Find out what can be found, say it, and end the rank."""
        outcome: list[tuple[Outcome, bool]] = []

        def find_out() -> None:
            self.ask()
            with contextlib.suppress(OSError):
                self.call()
            report = self.hear_out()
            reports = [report]
            with contextlib.suppress(OSError):
                reports = self.gather(report)
            outcome.append(self.settle(self.judge(reports)))

        work = threading.Thread(target=find_out, daemon=True)
        work.start()
        work.join(_REPORT_S)
        if not outcome:
            self.folder = None  # it hangs too
            outcome.append((self.judge([self.make_report(answers=False)]), True))
        if outcome[0][1]:
            self.announce(outcome[0][0].reason)
        self.keep_stacks()
        self.end_rank(signal.Signals(HUNG))
        self.keep_stacks("dumped as the rank was ended: a SIGFPE from its watchdog makes the exit code 8\n")

    def ask(self) -> None:
        """Ask the rank for its stacks and its collective."""
        self.answer = None
        if (status := process_status(self.pid)) is None or status.state not in "Tt":
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGUSR1)
                self.socket.sendall(b"collective\n")

    def call(self) -> None:
        """Call the watchdogs of the other ranks."""
        if self.folder is not None:
            place = failure_folder(self.folder, self.attempt)
            place.mkdir(parents=True, exist_ok=True)
            (place / ALARM).touch()

    def hear_out(self) -> Report:
        """Wait for what the rank was asked; what is known of it."""
        end = time.monotonic() + _ANSWER_S
        if (status := process_status(self.pid)) is None or status.state not in "Tt":
            while self.answer is None and time.monotonic() < end and self.listen(0.1):
                pass
            self.wait_for_stacks(end)
        return self.make_report(answers=self.answer is not None)

    def make_report(self, *, answers: bool) -> Report:
        """What is known of the rank without asking it anything."""
        status, answer = process_status(self.pid), (self.answer or {}) if answers else {}
        waiting = answer.get("waiting") if self.heartbeat.read().beats == self.beat.beats else None
        return Report(
            rank=self.rank,
            host=socket.gethostname(),
            pid=self.pid,
            beat=self.beat,
            silent_s=round(self.silent_s, 1),
            limit_s=self.limit_s,
            state=status.state if status else "?",
            kernel=waits_in(self.pid),
            answers=answers,
            waiting=Waiting(**waiting) if waiting else None,
            joined=answer.get("joined", {}),
        )

    def wait_for_stacks(self, end: float) -> None:
        """Wait until the stacks are there and no longer grow."""
        size, steady = 0, 0
        while steady < 2 and time.monotonic() < end:
            time.sleep(0.05)
            now = os.fstat(self.stacks_file).st_size
            steady, size = (steady + 1 if now and now == size else 0), now

    def gather(self, own: Report) -> list[Report]:
        """Lay down one's own report, and collect those of the others."""
        if self.folder is None:
            return [own]
        place = failure_folder(self.folder, self.attempt)
        self.keep_stacks()
        write_whole(place / _report_name(self.rank), json.dumps(own.to_json(), indent=2) + "\n")
        reports, end = {own.rank: own}, time.monotonic() + _GATHER_S
        while len(reports) < self.world_size and time.monotonic() < end:
            if settled(self.folder, self.attempt):
                break
            for rank in set(range(self.world_size)) - set(reports):
                if found := read_json(place / _report_name(rank)):
                    reports[rank] = Report.from_json(found)
            time.sleep(0.1)
        return [reports[rank] for rank in sorted(reports)]

    def judge(self, reports: list[Report]) -> Outcome:
        """The outcome of a hang."""
        rank, found = blame(reports, self.world_size)
        worst = max(reports, key=lambda report: report.silent_s - report.limit_s)
        step = next((report.beat.step for report in reports if report.rank == rank), worst.beat.step)
        files = f"look at the stacks in {failure_folder(self.folder, self.attempt)}, then " if self.folder else ""
        reason = (
            f"`{worst.beat.phase}` must show a sign of life every {worst.limit_s:g} s, but {found}; "
            f"{files}run the same command again to go on from the newest checkpoint"
        )
        return Outcome(HUNG, reason, rank, step)

    def end_rank(self, number: signal.Signals) -> None:
        """Send the rank a signal that ends it, even when it is stopped; kill it if that does not."""
        status = process_status(self.pid)
        for sent, seconds in ((number, _KILL_S), (signal.SIGKILL, _KILL_S)):
            with contextlib.suppress(OSError):
                if status is not None and status.state in "Tt":
                    # Let go on, another thread might take the signal while the main one leaves the place it is at.
                    _send_to_main_thread(self.pid, sent)
                else:
                    os.kill(self.pid, sent)
                os.kill(self.pid, signal.SIGCONT)
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if not self.listen(0.05):
                    return

    # A death

    def mourn(self) -> None:
        """The rank is gone and has not said why: find out, say it."""
        status = process_status(self.pid)
        beat = self.heartbeat.read()
        if self.goodbye or (self.folder and settled(self.folder, self.attempt)):
            return
        outcome = self.explain(status.exit_status if status else None, beat)
        self.keep_stacks()
        outcome, first = self.settle(outcome)
        if first:
            self.announce(outcome.reason)

    def explain(self, exit_status: int | None, beat: Beat) -> Outcome:
        """The outcome of a death."""
        if beat.stopping:
            name = signal.Signals(beat.stopping).name
            reason = (
                f"a run that is asked to stop ({name}) must be let save, but rank {self.rank} was ended in "
                f"{place(beat)}, by a second signal or since the launcher waits no longer; "
                "run the same command again to go on from the newest checkpoint"
            )
            return Outcome(128 + beat.stopping, reason, self.rank, beat.step)
        gone = [launcher.name for launcher in self.launchers if not launcher.is_alive()]
        if gone:
            found = f"{gone[-1]} died, and rank {self.rank} with it, in {place(beat)}"
        else:
            found = f"rank {self.rank} died in {place(beat)}{self.cause(exit_status)}"
        reason = (
            f"the ranks must live until the run ends, but {found}; "
            "run the same command again to go on from the newest checkpoint"
        )
        return Outcome(DIED, reason, self.rank, beat.step)

    def cause(self, exit_status: int | None) -> str:
        """What a process has died of, as far as it can be told."""
        causes: list[str] = []
        stacks = os.pread(self.stacks_file, 100, 0).decode(errors="replace")
        if stacks.startswith(_FATAL):
            causes.append(stacks.removeprefix(_FATAL).partition("\n")[0])
        elif exit_status is not None and os.WIFSIGNALED(exit_status):
            causes.append(f"killed by {_signal_name(os.WTERMSIG(exit_status))}")
        elif exit_status is not None:
            causes.append(f"with exit code {os.waitstatus_to_exitcode(exit_status)}")
        if killed_for_memory() > self.killed_for_memory:
            causes.append("the kernel has meanwhile killed a process for want of host memory: see dmesg")
        elif not stacks and (exit_status is None or exit_status & 0x7F == signal.SIGKILL):
            causes.append("perhaps for want of host memory: see dmesg")
        if stacks:
            kept = failure_folder(self.folder, self.attempt) if self.folder else "above"
            causes.append(f"its last stacks are {'in ' if self.folder else ''}{kept}")
        return f" ({'; '.join(causes)})" if causes else ""

    # What others do

    def follow_failure(self, passed: float) -> None:
        """End a rank that goes on waiting after another one has failed."""
        if self.folder is None or self.beat.phase == "closing" or self.silent_s == 0:
            self.failed_s = None
        elif self.failed_s is None:
            self.failed_s = 0.0 if settled(self.folder, self.attempt) else None
        else:
            self.failed_s += passed
            if self.failed_s > _NOTICE_S:
                self.end_rank(signal.SIGKILL)

    def follow_launcher(self, passed: float) -> None:
        """End a rank whose launcher is gone; one that stops anyway is left to save."""
        if self.beat.stopping and self.left_s is None:
            return
        if self.left_s is None:
            if any(not launcher.is_alive() for launcher in self.launchers):
                self.left_s = 0.0
                with contextlib.suppress(OSError):
                    os.kill(self.pid, signal.SIGTERM)
            return
        self.left_s += passed
        if self.left_s > _LEAVE_S:
            self.end_rank(signal.SIGKILL)

    # Saying it

    def settle(self, outcome: Outcome) -> tuple[Outcome, bool]:
        """As `settle`; where there is no folder, or none that can be written to, the word is one's own."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                return settle(self.folder, self.attempt, outcome)
        return outcome, True

    def announce(self, reason: str) -> None:
        """Tell the terminal and the log of the run."""
        # The descriptor, not the stream: a terminal that is gone must not matter.
        with contextlib.suppress(OSError):
            os.write(2, f"{reason}\n".encode())
        if self.folder is not None:
            with contextlib.suppress(OSError), open(self.folder / "train.log", "a", encoding="utf-8") as log:
                log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {reason}\n")

    def keep_stacks(self, title: str = "") -> None:
        """Copy the stacks that the rank has dumped to where a person looks, once."""
        text = os.pread(self.stacks_file, 1 << 22, 0)
        if not text or self.kept_stacks:
            return
        self.kept_stacks = True
        with contextlib.suppress(OSError):
            if self.folder is None:
                os.write(2, text)
                return
            place = failure_folder(self.folder, self.attempt)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"stacks-rank-{self.rank}.txt").write_bytes(title.encode() + text)


def _report_name(rank: int) -> str:
    return f"rank-{rank}.json"


def _pidfd(pid: int) -> int | None:
    """A descriptor that is ready when the process ends; None where the kernel has no such thing."""
    with contextlib.suppress(OSError, AttributeError):
        return os.pidfd_open(pid)
    return None


def _send_to_main_thread(pid: int, number: signal.Signals) -> None:
    """As os.kill, to the main thread of another process, where the system can."""
    import ctypes  # seldom needed, and slow to load

    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None or tgkill(pid, pid, number) != 0:
        os.kill(pid, number)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
