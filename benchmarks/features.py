"""What keeping the answers of a frozen vision on disk is worth: seconds of a step with them and from images.

    python -m benchmarks.features --out FILE [--set a.b.c=VALUE]

One process trains a policy whose vision is a ViT-S over two views of 128 pixels on the simulated arm's demonstrations,
a few steps at a time, from images and from features in turns; losses must be equal. Beside the seconds of a step stand
those of the process's own work on the CPU, which what else runs on the machine disturbs less.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling.estimate.features import feature_cache
from scaling.run_folder import environment
from scaling.spec import load_spec
from scaling.units import format_bytes, format_seconds

SETTINGS = (
    *("model.vision.image_size=128", "model.vision.patch_size=16", "model.vision.hidden_size=384"),
    *("model.vision.intermediate_size=1536", "model.vision.num_hidden_layers=12", "model.vision.num_attention_heads=6"),
    *("data.simulated_episodes=4", "batch.global_batch_size=8", 'backend={"kind":"single"}', "schedule.warmup_steps=1"),
    *("validation=null", "checkpoint=null", "profile.interval=1", "tracking.tensorboard=false"),
)
"""Of atlas-vla-tiny; the vision has 21.5 M parameters, as ViT-S (Dosovitskiy et al., 2021; Touvron et al., 2021)."""
WARM_UP = 2
"""Steps at the start of each turn that are not counted."""


def main() -> int:
    options = _parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = [*SETTINGS, f"max_steps={WARM_UP + options.steps}", f"data.cache={folder}", *options.set]
        began = time.perf_counter()
        _turn([*settings, "data.cache_features=true"])  # makes the file
        made = time.perf_counter() - began
        size = feature_cache(load_spec("atlas-vla-tiny", [*settings, "data.cache_features=true"]))
        turns: dict[str, list[dict[str, Any]]] = {"images": [], "features": []}
        for _ in range(options.turns):
            for name, found in turns.items():
                found.append(_turn([*settings, f"data.cache_features={json.dumps(name == 'features')}"]))
    losses = [turn["losses"] for found in turns.values() for turn in found]
    medians = {
        name: {part: statistics.median(value for turn in found for value in turn[part]) for part in ("wall", "work")}
        for name, found in turns.items()
    }
    assert size is not None
    report = {
        "step_seconds": {name: found["wall"] for name, found in medians.items()},
        "cpu_seconds_of_a_step": {name: found["work"] for name, found in medians.items()},
        "times_faster": medians["images"]["wall"] / medians["features"]["wall"],
        "times_less_work": medians["images"]["work"] / medians["features"]["work"],
        "equal_losses": all(one == losses[0] for one in losses),
        "features": {"bytes": size.total_bytes, "moments": size.samples},
        "first_start_seconds": made,
        "settings": settings,
        "environment": environment(1, "cpu"),
    }
    for line in lines(report):
        print(line)
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if report["equal_losses"] else 1


def lines(report: dict[str, Any]) -> Sequence[str]:
    """The report for people."""
    seconds, work, kept = report["step_seconds"], report["cpu_seconds_of_a_step"], report["features"]
    return [
        f"a step from images: {format_seconds(seconds['images'])}, from features: "
        f"{format_seconds(seconds['features'])} ({report['times_faster']:.1f} times faster)",
        f"of the CPU's time: {format_seconds(work['images'])} and {format_seconds(work['features'])} "
        f"({report['times_less_work']:.1f} times less)",
        f"features: {format_bytes(kept['bytes'])} of {kept['moments']:,} moments; losses are "
        + ("equal" if report["equal_losses"] else "NOT equal"),
    ]


def _turn(settings: Sequence[str]) -> dict[str, list[float]]:
    """A training from its start: losses of all steps, seconds and CPU seconds of those that count."""
    from scaling.engine.process import process_from_environment
    from scaling.profile.sinks import Memory
    from scaling.run import resolve, run

    class Noting(Memory):
        """Looks at the process's clock at each step."""

        def __init__(self) -> None:
            super().__init__()
            self.clock: list[float] = []

        def step(self, record: Any) -> None:
            super().step(record)
            self.clock.append(time.process_time())

    notes = Noting()
    with process_from_environment() as process:
        run(resolve(load_spec("atlas-vla-tiny", settings), 1), process, [notes])
    work = [after - before for before, after in zip(notes.clock, notes.clock[1:], strict=False)]
    return {
        "losses": [step.loss for step in notes.steps],
        "wall": [step.step_seconds for step in notes.steps[WARM_UP:]],
        "work": work[WARM_UP - 1 :],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="of each kind (default %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="counted in each turn (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="a.b.c=VALUE", help="change a field; repeatable")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
