"""The sinks that a spec asks for."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.hardware import gpu_from_device_name
from scaling.profile.sinks.files import JsonLines
from scaling.profile.sinks.guard import InBackground, guarded, tell_failure
from scaling.profile.sinks.live import Live
from scaling.profile.sinks.prometheus import Prometheus
from scaling.profile.sinks.screen import LEAST_HEIGHT, LEAST_WIDTH, About
from scaling.profile.sinks.sink import Sink
from scaling.profile.sinks.tensorboard import TensorBoard
from scaling.profile.sinks.terminal import Terminal
from scaling.profile.sinks.wandb import FINISH_S, WandB, check_wandb
from scaling.run_folder import METRICS
from scaling.spec import Spec
from scaling.summarize import at

_PATIENCE_S = {"TensorBoard": 10.0, "WandB": FINISH_S + 5.0}
"""How long the end of a run waits for what is in the background."""


def check_tracking(spec: Spec) -> None:
    """UserError where `tracking` asks for a package that is not installed; loads nothing."""
    if spec.tracking.wandb is not None:
        check_wandb()


def build_sinks(spec: Spec, folder: Path, predicted: dict[str, Any], *, plain: bool) -> list[Sink]:
    """All sinks of a run, for rank 0; its own record first, whose errors alone are the run's.

    `predicted`: as in plan.json. `plain`: lines even where the terminal could show a view. Raises UserError where a
    package is not installed, and OSError where the run folder cannot be written to.
    """
    check_tracking(spec)
    tracking = spec.tracking
    sinks: list[Sink] = [JsonLines(folder)]
    if not plain and can_show_view():
        sinks.append(guarded(Live(about(spec, predicted), folder / METRICS)))
    else:
        sinks.append(guarded(Terminal()))
    if tracking.tensorboard:
        sinks += _in_background("TensorBoard", lambda: TensorBoard(folder))
    if (wandb := tracking.wandb) is not None:
        sinks += _in_background("WandB", lambda: WandB(wandb, folder, name=spec.name, config=spec.to_json()))
    if tracking.prometheus is not None:
        sinks.append(guarded(Prometheus(tracking.prometheus.port, tracking.prometheus.host, run=spec.name)))
    return sinks


def _in_background(name: str, make: Callable[[], Sink]) -> list[Sink]:
    """A sink that has a disk or a network to wait for; none where its package is there and broken."""
    try:
        return [InBackground(make(), patience_s=_PATIENCE_S[name])]
    except UserError:
        raise
    except Exception as error:
        tell_failure(name, error)
        return []


def can_show_view() -> bool:
    """Whether standard output is a terminal that can show the live view, and is large enough."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return False
    size = shutil.get_terminal_size()
    return size.columns >= LEAST_WIDTH and size.lines >= LEAST_HEIGHT


def about(spec: Spec, predicted: dict[str, Any]) -> About:
    """What the live view knows of a run before it begins."""
    device = at(predicted, "device") or ""
    gpu = gpu_from_device_name(device)
    return About(
        name=spec.name,
        place=f"{spec.backend.kind} on {at(predicted, 'world_size') or 1} x {device or 'unknown'}, {spec.precision}",
        predicted=at(predicted, "memory") or {},
        capacity_bytes=None if gpu is None else gpu.memory_bytes,
        clip=spec.max_grad_norm,
        checkpoint_interval=spec.checkpoint.interval if spec.checkpoint else None,
    )
