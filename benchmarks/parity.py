"""The parity gate in full: both shapes, accumulation 1 and 4, every backend and world size; one table, one JSON file.

    python -m benchmarks.parity --out benchmarks/results/parity-cpu.json

On a machine with GPUs the world sizes default to those it can hold, and the device is in the file: rows made on a CPU
never read as rows of a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scaling.parity import DEFAULT_BACKENDS, TOLERANCE
from scaling.run_folder import environment

SPECS = Path(__file__).resolve().parent.parent / "tests" / "specs"
SHAPES = {"GPT-2 shape": "gpt-parity", "Llama shape with GQA": "llama-parity"}
"""Masked targets, a frozen block, two learning rates, weight decay on matrices alone, clipping on."""


def main() -> int:
    options = _parser().parse_args()
    device, gpus = _device()
    sizes = options.world_sizes or ",".join(str(size) for size in (1, 2, 4) if not gpus or size <= gpus)
    cases = []
    for precision in options.precisions.split(","):
        for shape, spec in SHAPES.items():
            for accumulation in (1, 4):
                settings = [f"precision={precision}", f"batch.gradient_accumulation_steps={accumulation}"]
                report = _run(spec, settings, options.backends, sizes, options.steps)
                cases.append({"shape": shape, "precision": precision, "accumulation": accumulation, **report})
    result = {"environment": environment(1, device), "world_sizes": sizes, "steps": options.steps, "cases": cases}
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))
    return 0 if all(case["agree"] for case in cases) else 1


def markdown(result: dict[str, Any]) -> str:
    """Per backend, the largest relative difference in loss and in gradient norm over all shapes and world sizes."""
    precisions = list(dict.fromkeys(case["precision"] for case in result["cases"]))
    backends = list(dict.fromkeys(row["backend"] for case in result["cases"] for row in case["outcomes"]))
    head = "| backend |" + "".join(f" {p} loss | {p} grad norm |" for p in precisions)
    lines = [head, "|---|" + "---:|---:|" * len(precisions)]
    for backend in backends:
        cells = ""
        for precision in precisions:
            rows = [
                row
                for case in result["cases"]
                if case["precision"] == precision
                for row in case["outcomes"]
                if row["backend"] == backend
            ]
            failed = [row for row in rows if row["error"] or None in (row["loss"], row["grad_norm"])]
            for key in ("loss", "grad_norm"):
                cells += " failed |" if failed else f" {max(row[key] for row in rows):.1e} |"
        lines.append(f"| {backend} |{cells}")
    return "\n".join(lines)


def _run(spec: str, settings: list[str], backends: str, sizes: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "parity.json"
        command = [sys.executable, "-m", "scaling.parity", "--spec", str(SPECS / f"{spec}.json"), "--json", str(out)]
        command += ["--backends", backends, "--world-sizes", sizes, "--steps", str(steps)]
        subprocess.run(command + [part for setting in settings for part in ("--set", setting)], check=False)
        report = json.loads(out.read_text())
    return {key: report[key] for key in ("tolerance", "agree", "outcomes")}


def _device() -> tuple[str, int]:
    import torch

    gpus = torch.cuda.device_count()
    return (torch.cuda.get_device_name(0), gpus) if gpus else ("cpu", 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--precisions", default="fp32,bf16", help=f"of {','.join(TOLERANCE)}")
    parser.add_argument("--backends", default=DEFAULT_BACKENDS)
    parser.add_argument("--world-sizes", help="default: 1,2,4, as far as the GPUs go")
    parser.add_argument("--steps", type=int, default=20)
    return parser


if __name__ == "__main__":
    sys.exit(main())
