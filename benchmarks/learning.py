"""Do the recipes learn? Trained for real, each on two ranks, and held against what they are to reach.

    python -m benchmarks.learning [--only gpt2,sft] [--out benchmarks/results/learning-cpu.json]

gpt2: gpt2-tiny's bits per byte of held-out text are no more than 1 % above those of a plain torch loop (plain_gpt.py).
sft, lora: the loss of held-out responses falls. dpo: of held-out pairs the chosen response gains on the rejected one in
more than 80 %. ppo: the reward of sampled responses rises by a fifth. atlas: the policy succeeds in more than 80 of 100
trials, one without training in less than 10, and the frozen backbone is bit for bit as it was. Exit code 0 where all of
it holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scaling.run_folder import environment

ROOT = Path(__file__).resolve().parent.parent
PLAIN_SEEDS, OUR_SEEDS = (1, 2, 3), (1337, 1338, 1339)
TOLERANCE, ACCURACY = 0.01, 0.8
TRIALS, SUCCESS, FAILURE = 100, 0.8, 0.1
GAIN = 0.2
"""Of the mean reward; over 256 responses whose rewards deviate by about as much as their mean its error is 0.06."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(CHECKS), help=f"of {','.join(CHECKS)}")
    parser.add_argument(
        "--out", metavar="FILE", help="JSON: the rows of these checks, beside those of others that it has"
    )
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="scaling-learning-") as folder:
        work = Work(Path(folder))
        for name in options.only.split(","):
            rows.append(CHECKS[name](work) | {"environment": environment(2, "cpu")})
            print(json.dumps(rows[-1]), flush=True)
            if options.out:
                _write(Path(options.out), rows[-1])
    return 0 if all(row["holds"] for row in rows) else 1


def _write(path: Path, row: dict[str, Any]) -> None:
    """Puts a row in place of an older one of its check; the others stay."""
    found = json.loads(path.read_text()) if path.exists() else {"rows": []}
    by_check = {old["check"]: old for old in found["rows"]} | {row["check"]: row}
    rows = [by_check[name] for name in CHECKS if name in by_check]
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


class Work:
    """Runs of recipes; one that others begin from is trained once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._done: set[str] = set()

    def train(self, recipe: str, name: str = "", *sets: str, stop_after: int | None = None) -> Path:
        """The run folder of a recipe, trained with these settings."""
        name = name or recipe
        run = self.folder / name
        if name not in self._done:
            words = [word for setting in sets for word in ("--set", setting)]
            words += [] if stop_after is None else ["--stop-after", str(stop_after)]
            launcher = ["--nproc_per_node=2", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
            command = [sys.executable, "-m", "torch.distributed.run", *launcher, "launch/train.py", "--spec", recipe]
            environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            subprocess.run([*command, "--run-dir", str(run), *words], cwd=ROOT, env=environment, check=True)
            self._done.add(name)
        return run

    def last(self, run: Path) -> dict[str, Any]:
        """Its last validation."""
        return json.loads((run / "validation.jsonl").read_text().splitlines()[-1])


def gpt2(work: Work) -> dict[str, Any]:
    plain = []
    for seed in PLAIN_SEEDS:
        command = [sys.executable, "-m", "benchmarks.plain_gpt", "--recipe", "gpt2-tiny", "--seed", str(seed)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        plain.append(json.loads(done.stdout.splitlines()[-1])["bits_per_byte"])
    runs = [work.train("gpt2-tiny", f"gpt2-tiny-{seed}", f"seed={seed}") for seed in OUR_SEEDS]
    ours = [work.last(run)["bits_per_byte"] for run in runs]
    mean, theirs = sum(ours) / len(ours), sum(plain) / len(plain)
    return {
        "check": "gpt2",
        "bits_per_byte": ours,
        "seeds": OUR_SEEDS,
        "plain": plain,
        "plain_seeds": PLAIN_SEEDS,
        "above_plain": mean / theirs - 1,
        "holds": mean <= (1 + TOLERANCE) * theirs,
    }


def _tuned(work: Work, recipe: str, base: str) -> dict[str, Any]:
    """Held-out loss after one step, at the LR that warm-up begins with, and after the last."""
    start = f"initialize_from={json.dumps(str(work.train(base)))}"
    first = work.last(work.train(recipe, f"{recipe}-first", start, stop_after=1))
    last = work.last(work.train(recipe, recipe, start))
    return {"recipe": recipe, "base": base, "first": first, "last": last}


def _minimind_sft(work: Work) -> dict[str, Any]:
    return _tuned(work, "minimind-sft-tiny", "minimind-pretrain-tiny")


def sft(work: Work) -> dict[str, Any]:
    rows = [_tuned(work, "gpt2-dolly-tiny", "gpt2-tiny"), _minimind_sft(work)]
    return {"check": "sft", "rows": rows, "holds": all(row["last"]["loss"] < row["first"]["loss"] for row in rows)}


def lora(work: Work) -> dict[str, Any]:
    row = _tuned(work, "minimind-lora-tiny", "minimind-pretrain-tiny")
    return {"check": "lora", "rows": [row], "holds": row["last"]["loss"] < row["first"]["loss"]}


def dpo(work: Work) -> dict[str, Any]:
    _minimind_sft(work)
    start = f"initialize_from={json.dumps(str(work.folder / 'minimind-sft-tiny'))}"
    last = work.last(work.train("minimind-dpo-tiny", "", start))
    return {"check": "dpo", "last": last, "holds": last["measures"]["accuracy"] > ACCURACY}


def ppo(work: Work) -> dict[str, Any]:
    """The reward of sampled responses to held-out prompts, after one step, at the LR that warm-up begins with, and
    after the last; the same prompts and the same noise both times."""
    _minimind_sft(work)
    start = f"initialize_from={json.dumps(str(work.folder / 'minimind-sft-tiny'))}"
    first = work.last(work.train("minimind-ppo-tiny", "minimind-ppo-tiny-first", start, stop_after=1))
    last = work.last(work.train("minimind-ppo-tiny", "", start))
    gained = last["measures"]["reward"] / first["measures"]["reward"] - 1
    return {"check": "ppo", "first": first, "last": last, "gained": gained, "holds": gained > GAIN}


def atlas(work: Work) -> dict[str, Any]:
    """Success in the simulator over tables that no demonstration has shown, after training and before."""
    run, found = work.train("atlas-vla-tiny"), {}
    for name, flags in (("trained", []), ("untrained", ["--untrained"])):
        out = work.folder / f"atlas-{name}.json"
        command = [sys.executable, "-m", "scaling.rollout", str(run), "--trials", str(TRIALS), "--json", str(out)]
        subprocess.run([*command, *flags], cwd=ROOT, check=True)
        found[name] = {key: value for key, value in json.loads(out.read_text()).items() if key != "checkpoint"}
    still = _frozen_is_as_it_was(run)
    holds = found["trained"]["success"] > SUCCESS and found["untrained"]["success"] < FAILURE and still
    return {"check": "atlas", **found, "frozen_bit_identical": still, "holds": holds}


def _frozen_is_as_it_was(run: Path) -> bool:
    """Whether the weights of the frozen vision backbone are bit for bit what they were before training."""
    from scaling.checkpoint.weights import find_weights, open_weights
    from scaling.models.build import model_recipe
    from scaling.spec import load_spec

    spec = load_spec(str(run / "spec.json"))
    recipe, weights = model_recipe(spec), open_weights(find_weights(run), spec.model)
    names = [name for name in weights.names() if name.startswith("vision.")]
    assert names, "a vla has a backbone"
    try:
        for name in names:
            wanted = recipe.initial_value(name, torch.Size(weights.shape(name))).flatten()
            if not torch.equal(weights.read(name, 0, wanted.numel()), wanted):
                return False
        return True
    finally:
        weights.close()


CHECKS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "gpt2": gpt2,
    "sft": sft,
    "lora": lora,
    "dpo": dpo,
    "ppo": ppo,
    "atlas": atlas,
}


if __name__ == "__main__":
    sys.exit(main())
