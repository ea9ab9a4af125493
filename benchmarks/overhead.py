"""What the loop costs on the host: steps of a model that computes next to nothing, on one rank.

    python -m benchmarks.overhead [--steps 3000] [--profile] [--out FILE]

The model has one weight. `ours` is a run as users start it (`scaling.train.run` with all that is on by default:
records, TensorBoard, logs, heartbeat); `bare` is the same model, loss, clipping and fused AdamW with nothing around
them. A step is from one call of the loss to the next, at the median: so short a step is seldom interrupted by other
work of the machine. Exit code 0 where a whole step of ours takes less than a millisecond.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT_S = 1e-3
SAMPLES, NUMBERS = 64, 8
WARM_UP = 100


def main() -> int:
    options = _parser().parse_args()
    if options.worker:
        return _work(options)
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "bare": []}
    for turn in range(options.turns):
        for kind in ("ours", "bare") if turn % 2 == 0 else ("bare", "ours"):
            command = [sys.executable, "-m", "benchmarks.overhead", "--steps", str(options.steps), "--worker", kind]
            output = subprocess.check_output(command + ["--profile"] * options.profile, text=True)
            print(*output.splitlines()[:-1], sep="\n", end="\n" if options.profile else "")
            found[kind].append(json.loads(output.splitlines()[-1]))
    report: dict[str, Any] = {"steps": options.steps, "limit_seconds": LIMIT_S, "runs": found}
    for kind, runs in found.items():
        for name in ("median_seconds", "cpu_seconds"):
            report[f"{kind}_{name}"] = statistics.median(run[name] for run in runs)
        wall, cpu = report[f"{kind}_median_seconds"], report[f"{kind}_cpu_seconds"]
        print(f"{kind}: a step takes {wall * 1e3:.3f} ms at the median, {cpu * 1e3:.3f} ms of CPU time at the mean")
    report["overhead_seconds"] = report["ours_median_seconds"] - report["bare_median_seconds"]
    report["good"] = report["ours_median_seconds"] < LIMIT_S
    print(f"the loop costs {report['overhead_seconds'] * 1e3:.3f} ms a step")
    if options.out:
        from scaling.run_folder import environment

        report["environment"] = environment(1, "cpu")
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["good"] else 1


class _Marks:
    """Notes when the loss is asked for."""

    def __init__(self) -> None:
        self.at: list[float] = []
        self.cpu: list[float] = []

    def mark(self) -> None:
        self.at.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def told(self) -> dict[str, float]:
        at, cpu = self.at[WARM_UP:], self.cpu[WARM_UP:]
        steps = [after - before for before, after in itertools.pairwise(at)]
        return {
            "median_seconds": statistics.median(steps),
            "mean_seconds": statistics.mean(steps),
            "cpu_seconds": (cpu[-1] - cpu[0]) / len(steps),
        }


def _work(options: argparse.Namespace) -> int:
    import cProfile
    import pstats

    import torch
    from torch import Tensor, nn

    marks = _Marks()

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, NUMBERS))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs * self.weight).sum(dim=1)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        marks.mark()
        return module(batch["x"]).square()

    items = [{"x": torch.full((NUMBERS,), float(number % 7))} for number in range(SAMPLES)]
    profiler = cProfile.Profile()
    with profiler if options.profile else contextlib.nullcontext():
        _ours(Empty, items, loss, options.steps) if options.worker == "ours" else _bare(
            Empty, items, loss, options.steps
        )
    if options.profile:
        pstats.Stats(profiler, stream=sys.stdout).sort_stats("tottime").print_stats(45)
    print(json.dumps(marks.told()))
    return 0


def _ours(model: Any, items: Any, loss: Any, steps: int) -> None:
    from scaling.train import run

    spec = {
        "name": "overhead",
        "data": {"sequence_length": 1},
        "batch": {"global_batch_size": 1, "micro_batch_size": 1},
        "optimizer": {"kind": "adamw", "lr": 1e-6},
        "precision": "fp32",
        "backend": {"kind": "single"},
        "max_steps": steps,
        "max_grad_norm": 1.0,
        "checkpoint": None,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        arguments = ["--run-dir", str(Path(folder) / "run"), "--plain"]
        code = run(spec, model=model, dataset=items, loss=loss, arguments=arguments)
        assert code == 0, f"the run ended with exit code {code}"


def _bare(model: Any, items: Any, loss: Any, steps: int) -> None:
    import torch

    module = model()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True)
    for step in range(steps):
        loss(module, {"x": items[step % SAMPLES]["x"].unsqueeze(0)}).sum().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=3, help="starts of each of the two")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, which itself takes time")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    parser.add_argument("--worker", choices=("ours", "bare"), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
