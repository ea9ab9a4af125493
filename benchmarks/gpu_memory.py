"""The planner against one GPU: real steps alone, and one rank of many rehearsed, over models, backends and modes.

    python -m benchmarks.gpu_memory --out benchmarks/results/gpu-memory.json
    python -m benchmarks.gpu_memory --tiny         (the same matrix with small models, to try it on a CPU)

Each cell runs in a process of its own, and what does not fit is a result too. Exit code 0 where the allocated peak is
within 1 % at the median and 3 % at worst and never more than 1 % above the predicted one, and, on a GPU, the time of a
step of one process within 5 % at the median.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling import parity
from scaling.errors import UserError
from scaling.estimate.time import estimate_time
from scaling.hardware import Cluster, gpu_from_device_name
from scaling.rehearse import rehearse_all
from scaling.run import resolve
from scaling.run_folder import environment
from scaling.spec import load_spec

MEDIAN, WORST, TOO_LOW, TIME = 0.01, 0.03, 0.01, 0.05
STEPS = 5
"""Of each cell; two warm up."""

GPT2 = {"124m": (768, 12, 12), "350m": (1024, 24, 16), "774m": (1280, 36, 20), "1.5b": (1600, 48, 25)}
"""Hidden size, blocks, heads."""
LLAMA = {"1b": (2048, 8192, 16, 32, 8), "3b": (3072, 8192, 28, 24, 8), "8b": (4096, 14336, 32, 32, 8)}
"""Hidden and intermediate size, blocks, heads, heads of keys and values."""
BACKENDS: dict[str, dict[str, Any]] = {
    **parity.BACKENDS,
    "hsdp": {"kind": "fsdp", "replicate": 8},  # of 64 ranks
}
FROZEN = 'param_groups=[{"name": "still", "match": ["embed*", "layers.0.*"], "freeze": true}, ' + (
    '{"name": "rest", "match": ["*"]}]'
)
MATRIX: list[tuple[str, str, int, int, str, list[str]]] = [
    # model, backend, ranks, micro-batch, checkpointing, more
    *[("gpt2-124m", "single", 1, micro, mode, []) for micro, mode in ((8, "none"), (32, "none"), (32, "full"))],
    *[("gpt2-124m", "single", 1, 16, mode, ["compile=true"]) for mode in ("none", "full")],
    ("gpt2-124m", "single", 1, 16, "none", [FROZEN]),
    ("gpt2-124m", "single", 1, 16, "none", ["objective.cross_entropy=plain"]),
    ("gpt2-350m", "single", 1, 16, "selective", []),
    ("gpt2-774m", "single", 1, 8, "none", []),
    ("gpt2-774m", "single", 1, 8, "none", ["compile=true"]),
    ("gpt2-1.5b", "single", 1, 8, "full", []),
    ("llama-1b", "single", 1, 2, "none", []),
    ("llama-1b", "single", 1, 2, "none", ["compile=true"]),
    ("llama-1b", "single", 1, 4, "selective", []),
    ("llama-3b", "single", 1, 1, "full", []),
    ("gpt2-124m", "ddp", 8, 16, "none", []),
    ("gpt2-774m", "ddp", 4, 8, "full", []),
    *[("gpt2-774m", backend, 8, 8, "none", []) for backend in ("fsdp", "fsdp-keep", "zero1", "zero2", "zero3")],
    *[("gpt2-1.5b", backend, 4, 4, "selective", []) for backend in ("fsdp", "zero1", "zero2", "zero3")],
    ("gpt2-1.5b", "hsdp", 64, 4, "none", []),
    ("gpt2-1.5b", "fsdp", 8, 4, "none", ["compile=true"]),
    ("gpt2-1.5b", "fsdp", 8, 4, "none", [FROZEN]),
    ("gpt2-1.5b", "zero2", 8, 4, "none", [FROZEN]),
    *[("llama-3b", backend, 8, 1, "full", []) for backend in ("fsdp", "zero1", "zero2", "zero3")],
    ("llama-3b", "fsdp", 64, 1, "none", []),
    *[("llama-8b", backend, 8, 1, "full", []) for backend in ("fsdp", "fsdp-keep", "zero1", "zero2", "zero3")],
    *[("llama-8b", "fsdp", 8, 1, mode, []) for mode in ("none", "selective")],
    ("llama-8b", "fsdp", 8, 1, "none", ["compile=true"]),
    *[("llama-8b", backend, 64, 2, "full", []) for backend in ("fsdp", "hsdp", "zero3")],
]


def main() -> int:
    options = _parser().parse_args()
    rows = []
    for report in rehearse_all(cells(tiny=options.tiny, only=options.only), STEPS):
        rows.append(_row(report))
        print(_line(rows[-1]), flush=True)
    found = summary(rows)
    print(json.dumps(found))
    if options.out:
        device = next((row["device"] for row in rows if "device" in row), "none")
        document = {"tiny": options.tiny, "environment": environment(1, device), **found, "rows": rows}
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    return 0 if found["good"] else 1


def cells(*, tiny: bool = False, only: str = "") -> Iterator[dict[str, Any]]:
    """The matrix as `scaling.rehearse --matrix` takes it, and what each cell is called."""
    for model, backend, ranks, micro, mode, more in MATRIX:
        recipe, settings = _model(model, tiny=tiny)
        settings += [f"backend={json.dumps(BACKENDS[backend])}", f"activation_checkpointing={mode}"]
        micro = min(micro, 2) if tiny else micro
        settings.append(f'batch={{"global_batch_size": {2 * micro * ranks}, "micro_batch_size": {micro}}}')
        settings.append("compile=false")  # unless it is asked for, which a CPU would compile for minutes
        settings += [one for one in more if not (tiny and one.startswith("compile"))]
        name = " ".join([model, backend, f"x{ranks}", f"micro {micro}", mode, *(one.partition("=")[0] for one in more)])
        if only in name:
            yield {"spec": recipe, "world_size": ranks, "set": settings, "name": name, "backend": backend}


def _model(name: str, *, tiny: bool) -> tuple[str, list[str]]:
    family, _, size = name.partition("-")
    if family == "gpt2":
        hidden, blocks, heads = (64, 3, 4) if tiny else GPT2[size]
        sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": blocks}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    else:
        hidden, inner, blocks, heads, keys = (64, 160, 3, 4, 2) if tiny else LLAMA[size]
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": blocks}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": keys}
    settings = [f"model.{field}={value}" for field, value in sizes.items()]
    if tiny:
        settings += ["model.vocab_size=512", 'data={"kind": "synthetic", "sequence_length": 64}']
    return {"gpt2": "gpt2-124m", "llama": "llama-8b"}[family], settings


def _row(report: dict[str, Any]) -> dict[str, Any]:
    cell = report["cell"]
    row: dict[str, Any] = {key: cell[key] for key in ("name", "backend", "world_size")}
    if "error" in report:
        return row | {"error": report["error"]}
    measured, predicted = report["memory"], report["predicted"]
    row |= {
        "device": report["environment"]["device"],
        "measured_bytes": measured["peak_allocated_bytes"],
        "predicted_bytes": predicted["peak_allocated_bytes"],
        "off": predicted["peak_allocated_bytes"] / measured["peak_allocated_bytes"] - 1,
        "reserved_bytes": measured["peak_reserved_bytes"],
        "predicted_reserved_bytes": predicted["peak_reserved_bytes"],
        "device_used_bytes": measured["device_used_bytes"],
        "predicted_band": [predicted["low_bytes"], predicted["high_bytes"]],
        "phases": [predicted["peak_phase"], measured["peak_phase"]],
    }
    if report["compute_seconds"] is not None:
        row["step_seconds"] = report["compute_seconds"]
        row["predicted_seconds"] = _seconds(cell, report["environment"]["device"])
    return row


def _seconds(cell: dict[str, Any], device: str) -> float | None:
    """Predicted time of a step; None where ranks are made up, whose communication costs nothing, or for a card that is
    not known.
    """
    gpu = gpu_from_device_name(device)
    if gpu is None or cell["world_size"] > 1:
        return None
    job = resolve(load_spec(cell["spec"], cell["set"]), 1)
    try:
        return estimate_time(job.spec, job.plan, job.groups, job.rendered, Cluster(1, 1, gpu)).step_seconds
    except UserError:
        return None


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    seconds = ""
    if row.get("predicted_seconds"):
        seconds = f", step predicted {row['predicted_seconds'] / row['step_seconds'] - 1:+.1%}"
    return f"{row['off']:+.3%}  {row['name']}: {row['measured_bytes'] / 2**30:.3f} GiB{seconds}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors over all rows that ran, and over each backend's."""
    ran = [row for row in rows if "off" in row]
    times = [
        abs(row["predicted_seconds"] / row["step_seconds"] - 1)
        for row in ran
        if row.get("predicted_seconds") and row.get("step_seconds")
    ]
    off = [abs(row["off"]) for row in ran]
    found: dict[str, Any] = {
        "cells": len(rows),
        "failed": len(rows) - len(ran),
        "median": statistics.median(off) if off else None,
        "worst": max(off, default=None),
        "lowest": min((row["off"] for row in ran), default=None),
        "time_median": statistics.median(times) if times else None,
        "by_backend": {
            backend: max(abs(row["off"]) for row in ran if row["backend"] == backend)
            for backend in sorted({row["backend"] for row in ran})
        },
    }
    good = bool(off) and found["median"] <= MEDIAN and found["worst"] <= WORST and found["lowest"] >= -TOO_LOW
    return found | {"good": good and (not times or found["time_median"] <= TIME)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="small models, to try the matrix where there is no GPU")
    parser.add_argument("--only", default="", metavar="WORD", help="cells whose name has this in it")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
