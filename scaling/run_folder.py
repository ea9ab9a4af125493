"""The folder of one run: what is written where (README.md has the list)."""

import json
import logging
import math
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from scaling.errors import StorageError

METRICS, VALIDATION, EXIT = "metrics.jsonl", "validation.jsonl", "exit.json"
PACKAGES = ("scaling", "torch", "deepspeed", "pydantic", "numpy", "tokenizers")


def create_run_folder(folder: Path) -> None:
    """Make `folder`, or raise StorageError where it cannot be written to or already holds a run."""
    if (folder / METRICS).exists():
        raise StorageError(
            f"`--run-dir` must be a folder without a run in it, but {folder} has {METRICS}; "
            "name another folder, or move that one away"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / METRICS).touch()
    except OSError as error:
        raise StorageError(
            f"`--run-dir` must be a folder that can be written to, but {folder} is not ({error.strerror}); "
            "name another folder"
        ) from None


def strict(value: Any) -> Any:
    """`value` with null for what JSON has no word for: NaN and the infinities."""
    if isinstance(value, dict):
        return {key: strict(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` whole or not at all, readable by people."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"the run folder must have room, but {path} failed ({error.strerror}); free some") from None


def write_exit(folder: Path, *, code: int, reason: str, rank: int, step: int | None) -> None:
    """How the run ended, for scripts: launchers swallow exit codes (torchrun returns 1 for any failure)."""
    write_json(folder / EXIT, {"code": code, "reason": reason, "rank": rank, "step": step, "time": time.time()})


def environment(world_size: int, device: str) -> dict[str, Any]:
    """Versions, commit and device of this run; no environment variable is recorded, some hold secrets."""
    versions = {name: _version(name) for name in PACKAGES}
    return {
        "versions": versions | {"python": sys.version.split()[0]},
        "commit": _commit(),
        "world_size": world_size,
        "device": device,
        "cores": os.cpu_count(),
    }


def log_to(folder: Path, rank: int) -> None:
    """Send the log of this rank to its file: train.log for rank 0, train-rank3.log for rank 3."""
    handler = logging.FileHandler(folder / ("train.log" if rank == 0 else f"train-rank{rank}.log"), delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("scaling").addHandler(handler)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the code that runs, where it runs from a checkout."""
    here = Path(__file__).parent
    try:
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None if shown.returncode == 0 else None
