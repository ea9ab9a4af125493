"""The pictures of docs/concepts.md, drawn from runs of a small GPT on this machine.

pip install matplotlib
python -m benchmarks.concepts [--out docs/pictures]     # a few minutes on two cores
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scaling.schedule import lr_factor
from scaling.spec.sections import WSD, AnySchedule, Constant, Cosine, CosineWithRestarts, Linear

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
COMMON = [
    *("backend.kind=single", f"max_steps={STEPS}", "profile.interval=1", "validation=null", "checkpoint=null"),
    *('schedule={"kind":"constant","warmup_steps":10}', "tracking.tensorboard=false", "optimizer.lr=1e-3"),
    *(
        "model.hidden_size=128",
        "model.intermediate_size=352",
        "model.num_hidden_layers=4",
        "model.num_attention_heads=4",
    ),
]
CUTS = {"16 x 1 rank x 1": (16, 1), "4 x 1 rank x 4": (4, 1), "2 x 2 ranks x 4": (2, 2)}
RATES = ("1e-5", "1e-3", "1e-1")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.concepts", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default=str(ROOT / "docs" / "pictures"), metavar="FOLDER")
    out = Path(parser.parse_args().out)
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "schedules.svg", schedules(), "step", "LR over its peak")
    with tempfile.TemporaryDirectory(prefix="scaling-concepts-") as folder:
        run = Path(folder)
        cuts = {name: curve(run, f"cut-{i}", *cut) for i, (name, cut) in enumerate(CUTS.items())}
        draw(out / "batch.svg", cuts, "step", "loss, nats per token", nudge=True)
        rates = {f"lr {rate}": curve(run, f"lr-{rate}", 16, 1, f"optimizer.lr={rate}") for rate in RATES}
        draw(out / "learning-rate.svg", rates, "step", "loss, nats per token")
        types = {name: curve(run, name, 16, 1, f"precision={name}") for name in ("fp32", "bf16")}
        draw(out / "precision.svg", types, "step", "loss, nats per token", nudge=True)
    return 0


def schedules() -> dict[str, list[float]]:
    """The factor of each schedule over 1,000 steps."""
    kinds: dict[str, AnySchedule] = {
        "constant": Constant(kind="constant", warmup_steps=100),
        "linear": Linear(kind="linear", warmup_steps=100),
        "cosine": Cosine(kind="cosine", warmup_steps=100),
        "cosine_with_restarts": CosineWithRestarts(kind="cosine_with_restarts", warmup_steps=100, cycles=3),
        "wsd": WSD(kind="wsd", warmup_steps=100, decay_steps=300),
    }
    return {name: [lr_factor(kind, step, 1000) for step in range(1000)] for name, kind in kinds.items()}


def curve(folder: Path, name: str, micro_batch: int, ranks: int, *sets: str) -> list[float]:
    """The loss of each step of a run."""
    settings = [*COMMON, f"batch.micro_batch_size={micro_batch}", *sets]
    settings += ["backend.kind=ddp"] if ranks > 1 else []
    words = [word for setting in settings for word in ("--set", setting)]
    launcher = [f"--nproc_per_node={ranks}", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "launch/train.py", "--spec", "gpt-stdlib"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--run-dir", str(folder / name), *words], cwd=ROOT, env=environment)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    if done.returncode and len(lines) > 5:  # a rate that is too large may end so: that is the picture
        print(f"{name}: ended after {len(lines)} steps", flush=True)
    return [json.loads(line)["loss"] for line in lines]


def draw(path: Path, curves: dict[str, list[float]], x: str, y: str, *, nudge: bool = False) -> None:
    """A line for each curve; with `nudge` the first are wider, so that equal ones can be seen below each other."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 2.8))
    widths: list[Any] = [1 + 2.5 * (len(curves) - 1 - i) * nudge for i in range(len(curves))]
    for (name, values), width in zip(curves.items(), widths, strict=True):
        axes.plot(range(1, len(values) + 1), values, label=name, linewidth=max(1.2, width))
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    print(path, flush=True)


if __name__ == "__main__":
    sys.exit(main())
