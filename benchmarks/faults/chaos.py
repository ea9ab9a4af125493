"""kill -9 at random moments, the same command again, until the run is done: does it leave any trace in the curve?

    python -m benchmarks.faults.chaos --backend fsdp --ranks 2 --kills 100 --seed 7 --out FILE

An undisturbed run gives the reference. Then runs are killed and started again until each is done. Checked are every
logged step, repeated ones too, bit for bit; the checkpoint that each start goes on from; the final weights and moments.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults import runs
from scaling.run_folder import METRICS

MOMENTS = {"save": 0.5, "training": 0.4, "start": 0.1}
"""When kills are aimed at, and how often: while a checkpoint is written, at any time, before the first step."""
_POLL_S = 0.001
_WIDTH = 256
"""Of the model: a rank's share of a checkpoint is written in several blocks."""


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    """At each kill, the steps that were logged and are in no checkpoint."""
    problems: list[str] = field(default_factory=list)


class Disturbed:
    """One run that is killed and started again until it is done."""

    def __init__(self, options: argparse.Namespace, work: Path, chance: random.Random, tally: Tally) -> None:
        self._options, self._chance, self._tally = options, chance, tally
        self.folder = work / "run"
        self._output = work / "output"
        self._command = command(options, self.folder)
        self._startup_s: float | None = None

    def go(self, reference: dict[int, dict[str, Any]], until: int, deadline: float) -> bool:
        """Start and kill until the run ends by itself; True if it did. No kill follows the `until`-th."""
        while time.monotonic() < deadline:
            before, problems = runs.newest(self.folder)
            self._tally.problems += [f"under a final name, but not whole: {problem}" for problem in problems]
            lines_from, done = _size(self.folder / METRICS), max(runs.curve(self.folder), default=0)
            log_from = _size(self.folder / "train.log")
            spares = self._tally.counts["kills"] >= until
            code = self._launch_and_kill(spare=spares)
            log = _tail(self.folder / "train.log", log_from)
            lines = runs.read_lines(self.folder, lines_from)
            self._check(lines, log, before, reference)
            self._tally.counts["steps repeated"] += sum(line["step"] <= done for line in lines)
            if code is None:
                self._tally.lost.append(max(runs.curve(self.folder), default=0) - (runs.newest(self.folder)[0] or 0))
            else:
                if code != 0:
                    self._tally.problems.append(f"exit code {code}: {self._output.read_text(errors='replace')[-2000:]}")
                return True
        return False

    def _launch_and_kill(self, *, spare: bool) -> int | None:
        """The exit code of a start that nobody killed; None after a kill."""
        launch = runs.Launch(self._command, self._output)
        self._tally.counts["launches"] += 1
        try:
            moment = "none" if spare else self._aim()
            if self._reached(launch, moment):
                in_save = self._kill(launch, moment)
                launch.wait(180)
                self._tally.counts["kills"] += 1
                self._tally.counts["kills in a save"] += in_save
                return None
            return launch.wait(180)
        finally:
            launch.kill(everything=True)

    def _aim(self) -> str:
        return self._chance.choices(list(MOMENTS), list(MOMENTS.values()))[0]

    def _reached(self, launch: runs.Launch, moment: str) -> bool:
        """Wait for the moment; False if the run ended before."""
        size = _size(self.folder / METRICS)
        if moment == "start":
            return _pause(launch, self._chance.uniform(0.2, self._startup_s or 5.0))
        # Counted in steps and saves, not in seconds: a busy machine must get as far as an idle one.
        steps = self._chance.randint(1, self._options.most_steps)
        saves = self._chance.randint(1, 1 + self._options.most_steps // self._options.interval)
        seen: set[str] = set()
        while True:
            if launch.ended():
                return False
            lines = _lines(self.folder / METRICS, size)
            if lines and self._startup_s is None:
                self._startup_s = time.monotonic() - launch.began
            if moment == "training" and lines >= steps:
                return _pause(launch, self._chance.uniform(0.0, 0.1))
            seen |= (
                {name for name in runs.unfinished(self.folder) if name.startswith(".incomplete-step")}
                if lines
                else set()
            )
            if moment == "save" and len(seen) >= saves:
                return _pause(launch, self._chance.uniform(0.0, self._options.save_span))
            time.sleep(_POLL_S if moment == "save" else 0.02)

    def _kill(self, launch: runs.Launch, moment: str) -> bool:
        """Kill a random rank, or everything; returns whether a save was under way."""
        ranks = launch.ranks()
        victim = self._options.victim
        if victim == "mixed":
            victim = self._chance.choices(["rank", "all"], [3, 1])[0]
        in_save = bool(runs.unfinished(self.folder))
        if victim == "all" or not ranks:
            launch.kill(everything=True)
            self._tally.counts["kills of everything"] += 1
        else:
            rank = self._chance.choice(sorted(ranks))
            runs.end(ranks[rank])
            self._tally.counts[f"kills of rank {rank}"] += 1
        self._tally.counts["kills in start-up"] += moment == "start"
        return in_save

    def _check(
        self, lines: list[dict[str, Any]], log: str, before: int | None, reference: dict[int, dict[str, Any]]
    ) -> None:
        tally, steps = self._tally, [line["step"] for line in lines]
        tally.counts["steps compared"] += len(lines)
        tally.problems += runs.curve_problems(lines, reference)
        found = runs.resumed_step(log)
        if found is None and not steps:
            return  # killed before it said where it goes on
        tally.problems += progress_problems(steps, found, before)
        if found is not None:
            tally.counts["resumes"] += 1


def progress_problems(steps: Sequence[int], resumed: int | None, newest: int | None) -> list[str]:
    """What is wrong with the `steps` that a start logged, where `newest` was the newest whole checkpoint before."""
    if resumed != newest:
        return [f"the newest whole checkpoint was {newest}, but the run went on from {resumed}"]
    first = (newest or 0) + 1
    if list(steps) != list(range(first, first + len(steps))):
        return [f"after step {newest or 0} came the steps {list(steps)[:5]}…"]
    return []


def end_problems(folder: Path, reference: dict[int, dict[str, Any]], final: dict[str, str]) -> list[str]:
    """What is wrong with a run that is done: steps that are nowhere, leftovers, other weights or moments."""
    problems = [f"{name} was left behind" for name in runs.unfinished(folder)]
    if missing := sorted(set(reference) - set(runs.curve(folder))):
        problems.append(f"{len(missing)} steps were never logged, {missing[:3]} among them")
    step, damaged = runs.newest(folder)
    if damaged or step != max(reference):
        return [*problems, *damaged, f"the last checkpoint is of step {step}"]
    differing = runs.differing(runs.digests(runs.checkpoints(folder).path(step)), final)
    return problems + ([f"{len(differing)} tensors differ at the end, {differing[:3]} among them"] if differing else [])


def command(options: argparse.Namespace, folder: Path) -> list[str]:
    """What is started, again and again."""
    settings = [f"max_steps={options.steps}", f"checkpoint.interval={options.interval}"]
    settings += [f"model.hidden_size={_WIDTH}", f"model.intermediate_size={4 * _WIDTH}"]
    return runs.training(options.backend, options.ranks, folder, settings)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chance, tally = random.Random(f"{options.seed} {options.backend} {options.ranks}"), Tally()
    began, finished = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as scratch:
        work = Path(scratch)
        code, output = runs.train(command(options, work / "reference"), work / "output")
        assert code == 0, output
        reference = runs.curve(work / "reference")
        final = runs.digests(runs.checkpoints(work / "reference").path(options.steps))
        deadline = began + options.limit_s
        while tally.counts["kills"] < options.kills and time.monotonic() < deadline:
            number = finished + 1
            (work / str(number)).mkdir()
            run = Disturbed(options, work / str(number), chance, tally)
            if run.go(reference, options.kills, deadline):
                tally.problems += end_problems(run.folder, reference, final)
                finished += 1
            print(f"run {number}: {dict(tally.counts)}, {len(tally.problems)} problems", flush=True)
    result = _result(options, tally, finished, time.monotonic() - began)
    if options.out:
        runs.write_result(options.out, "chaos", result)
    for problem in tally.problems[:20]:
        print(problem, file=sys.stderr)
    return 1 if tally.problems or not finished else 0


def _result(options: argparse.Namespace, tally: Tally, finished: int, seconds: float) -> dict[str, Any]:
    names = ("kills", "kills in a save", "kills in start-up", "kills of everything", "launches", "resumes")
    return {
        **{name: getattr(options, name) for name in ("backend", "ranks", "seed", "victim", "steps", "interval")},
        "kills_asked": options.kills,
        **{name.replace(" ", "_").replace("-", ""): tally.counts[name] for name in names},
        "kills_by_rank": {name[14:]: n for name, n in sorted(tally.counts.items()) if name.startswith("kills of rank")},
        "runs_finished": finished,
        "steps_compared": tally.counts["steps compared"],
        "steps_repeated": tally.counts["steps repeated"],
        "most_steps_lost_at_a_kill": max(tally.lost, default=0),
        "failures": len(tally.problems),
        "problems": tally.problems[:20],
        "seconds": round(seconds),
    }


def _pause(launch: runs.Launch, seconds: float) -> bool:
    """Wait; False if the run ends meanwhile."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        if launch.ended():
            return False
        time.sleep(min(left, 0.02))
    return not launch.ended()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _lines(path: Path, start: int) -> int:
    if _size(path) <= start:
        return 0
    with open(path, "rb") as file:
        file.seek(start)
        return file.read().count(b"\n")


def _tail(path: Path, start: int) -> str:
    return path.read_bytes()[start:].decode(errors="replace") if path.exists() else ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=[name for name in runs.BACKENDS if name != "single"], required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--victim", choices=["rank", "all", "mixed"], default="mixed")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--interval", type=int, default=3, help="steps between checkpoints")
    parser.add_argument("--most-steps", type=int, default=12, help="steps that a start gets to take at most")
    parser.add_argument("--save-span", type=float, default=0.15, help="seconds that a save gets at most")
    parser.add_argument("--limit-s", type=float, default=7200, help="begin nothing after so many seconds")
    parser.add_argument("--out", help="write the result as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
