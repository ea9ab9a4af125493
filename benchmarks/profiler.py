"""What recording costs, and whether the speed that a run tells is the one that a stopwatch sees.

    python -m benchmarks.profiler --ranks 1 --out benchmarks/results/profiler-cpu-1.json

Overhead: one engine trains on, by turns with the recorder and the sinks of every run at their defaults (a record each
10 steps to metrics.jsonl, TensorBoard and the log) and with nothing at all: no clock, no look at the loss, the host or
the device. Turns lie side by side, now in this order and now in the other; the median of their ratios counts.

Stopwatch: a run is started as users do, and this process notes when each line of its metrics.jsonl arrives. Tokens per
second from the first line to the last, by this clock and by the run's own.

Exit code 0 where the overhead is under 1 % and the two clocks agree to 1 %.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.run_folder import METRICS, environment
from scaling.spec import load_spec

LIMIT = 0.01
TURN_STEPS = 10
"""Steps of a turn: one record. Short, so that what else the machine does falls on both of a pair."""
CHANGES = ["max_steps=1000000", "validation=null", "checkpoint=null"]
BATCH = '{{"micro_batch_size": 2, "gradient_accumulation_steps": 1, "global_batch_size": {0}}}'


def main() -> int:
    options = _parser().parse_args()
    if options.worker:
        return _work(options)
    with tempfile.TemporaryDirectory() as folder:
        overhead = _overhead(options, Path(folder))
        stopwatch = _stopwatch(options, Path(folder))
    report = {"spec": options.spec, "ranks": options.ranks, "overhead": overhead, "stopwatch": stopwatch}
    report |= {"environment": environment(options.ranks, overhead.pop("device"))}
    good = abs(overhead["median"]) < LIMIT and abs(stopwatch["apart"]) < LIMIT
    print(
        f"recording takes {overhead['median']:+.2%} of a step of {overhead['step_seconds'] * 1e3:.0f} ms (median of "
        f"{len(overhead['ratios'])} pairs, half of them within {overhead['low']:+.2%} and {overhead['high']:+.2%})"
    )
    print(f"tokens per second differ from a stopwatch's by {stopwatch['apart']:+.3%} over {stopwatch['seconds']:.1f} s")
    if options.out:
        Path(options.out).write_text(json.dumps(report | {"good": good}, indent=1) + "\n", encoding="utf-8")
    return 0 if good else 1


def _command(options: argparse.Namespace, *program: str) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(options.ranks)]
    return [sys.executable, *launcher, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *program]


def _changes(options: argparse.Namespace) -> list[str]:
    return [*CHANGES, f"batch={BATCH.format(2 * options.ranks)}", *options.set]


# ---------------------------------------------------------------- overhead


def _overhead(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    out = folder / "overhead.json"
    program = ["-m", "benchmarks.profiler", "--worker", str(out), "--spec", options.spec, "--pairs", str(options.pairs)]
    more = [word for change in _changes(options) for word in ("--set", change)]
    subprocess.run(_command(options, *program, *more), check=True)
    return json.loads(out.read_text())


def _work(options: argparse.Namespace) -> int:
    from scaling.engine.process import process_from_environment
    from scaling.run import device_name, resolve

    with process_from_environment() as process:
        job = resolve(load_spec(options.spec, options.set), process.world_size)
        turns = _turns(job, process, options.pairs, Path(options.worker).parent)
        if process.is_main:
            ratios = [recorded / bare - 1 for recorded, bare in turns]
            low, middle, high = statistics.quantiles(ratios, n=4)
            found = {
                "median": middle,
                "low": low,
                "high": high,
                "step_seconds": statistics.median(bare for _, bare in turns),
                "ratios": ratios,
                "device": device_name(process),
            }
            Path(options.worker).write_text(json.dumps(found))
    return 0


def _turns(job: Any, process: Any, pairs: int, folder: Path) -> list[tuple[float, float]]:
    """Seconds of a step, recorded and bare, of each pair of turns."""
    import torch

    from scaling.checkpoint.keeper import NoCheckpoints
    from scaling.data.build import build_datasets
    from scaling.data.loader import step_batches
    from scaling.engine.build import build_engine
    from scaling.loop import Course, train
    from scaling.models.build import model_recipe
    from scaling.nonfinite import NonFinitePolicy
    from scaling.objectives import build_objective
    from scaling.records import Progress

    spec, plan = job.spec, job.plan
    dataset, _ = build_datasets(spec)
    engine = build_engine(spec, job.rendered, model_recipe(spec), job.groups, process)
    objective = build_objective(spec.objective, ())
    progress = Progress()
    batches = step_batches(
        dataset,
        seed=spec.seed,
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        rank=process.rank,
        world_size=process.world_size,
        first_samples=progress.first_samples(plan, spec.max_steps),
        device=process.device,
    )

    def turn(recorder: Any) -> float:
        nonlocal progress
        last = progress.step + TURN_STEPS
        course = Course(plan, spec.seed, spec.schedule, spec.max_steps, last, None, save_best=False)
        rest = {"validate": lambda step: None, "stop_requested": lambda: False, "time_left": lambda: None}
        process.gather_objects(None)  # all begin at once
        began = time.perf_counter()
        policy = NonFinitePolicy("stop", 1)
        train(engine, objective, batches, process, recorder, NoCheckpoints(), policy, course, progress, **rest)
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        for _ in range(TURN_STEPS):
            progress = progress.after(plan)
        return seconds / TURN_STEPS

    found: list[tuple[float, float]] = []
    with contextlib.closing(batches), contextlib.closing(engine), contextlib.ExitStack() as kept:
        recorder = _default_recorder(job, process, engine, folder)
        kept.enter_context(contextlib.closing(recorder))
        for recorded in (True, False):
            turn(recorder if recorded else _Nothing())  # warms up
        for pair in range(pairs):
            seconds = {order: turn(recorder if order else _Nothing()) for order in (pair % 2 == 0, pair % 2 == 1)}
            found.append((seconds[True], seconds[False]))
    return found


def _default_recorder(job: Any, process: Any, engine: Any, folder: Path) -> Any:
    """As `scaling.run.run` makes it, with the sinks of `scaling.train`."""
    from scaling.profile.sinks import build_sinks
    from scaling.run import make_recorder, yardsticks

    run = folder / "run"
    sinks: list[Any] = []
    if process.is_main:
        run.mkdir()
        sinks = build_sinks(job.spec, run, {}, plain=True)
    return make_recorder(job, process, engine, sinks, [], yardsticks(job, process), 0, job.spec.max_steps, None)


class _Nothing:
    """Stands where the loop wants a recorder, and records nothing."""

    def __init__(self) -> None:
        from scaling.watch.heartbeat import NullHeartbeat

        self.heartbeat, self.clock = NullHeartbeat(), self

    @contextlib.contextmanager
    def phase(self, what: Any) -> Iterator[None]:
        yield

    pause = backward = phase

    def begin(self, step: int) -> None:
        pass

    def norms_of(self, step: int) -> None:
        pass

    def step(self, *arguments: Any, **more: Any) -> list[Any]:
        return []

    def drain(self) -> list[Any]:
        return []


# ---------------------------------------------------------------- stopwatch


def _stopwatch(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second as the run tells them, and by this process's clock."""
    run = folder / "watched"
    # Not by `max_steps`, which the warm-up of a recipe may be longer than.
    steps = ["--stop-after", str(options.pairs * TURN_STEPS), "--set", "profile.interval=1"]
    more = [word for change in _changes(options) for word in ("--set", change)]
    command = _command(options, "-m", "scaling.train", "--spec", options.spec, *more, *steps, "--run-dir", str(run))
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    arrivals = _arrivals(started, run / METRICS)
    if started.wait() != 0:
        raise SystemExit(f"the run ended with exit code {started.returncode}")
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    first = next(index for index, line in enumerate(lines) if not line["warm_up"])
    seconds = arrivals[-1] - arrivals[first]
    tokens = lines[-1]["tokens"] - lines[first]["tokens"]
    told = tokens / sum(line["step_seconds"] * line["window_steps"] for line in lines[first + 1 :])
    return {
        "seconds": seconds,
        "tokens": tokens,
        "told": told,
        "seen": tokens / seconds,
        "apart": told * seconds / tokens - 1,
    }


def _arrivals(started: "subprocess.Popen[bytes]", path: Path) -> list[float]:
    """When each line of a file was first seen, until the process that writes it has ended."""
    found: list[float] = []
    running = True
    while running:
        running = started.poll() is None
        lines = path.read_bytes().count(b"\n") if path.exists() else 0
        found += [time.perf_counter()] * (lines - len(found))
        time.sleep(0.002)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiler", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spec", default="gpt-stdlib")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field; repeatable")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=100, help=f"pairs of turns of {TURN_STEPS} steps")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
