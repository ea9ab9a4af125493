"""Figures of a report as people read them: on the terminal, and in the tables of the page."""

import json
import shlex
from collections.abc import Callable, Sequence
from typing import Any

from scaling.report.figures import MEMORY
from scaling.units import format_bytes, format_count, format_seconds
from scaling.view import Sheet

NOT_KNOWN = "n/a"
EXITS = {
    0: "done",
    2: "spec or command line wrong",
    3: "does not fit in memory",
    4: "loss or gradient not finite",
    5: "checkpoint cannot be used",
    6: "run folder cannot be used",
    7: "restarted without progress",
    8: "a rank hung",
    9: "a rank died",
    75: "stopped by a signal, saved",
    143: "stopped by a signal",
}
"""README.md has the table."""
PHASES = {
    "data": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "communication": "waiting for other ranks",
    "other": "other",
    "validation": "validation",
    "checkpoint": "checkpoints",
    "profiling": "profiling",
    "rest": "start, restarts and lost work",
    "sampling": "sampling",
    "scoring": "scoring of samples",
    "compute": "compute",
    "communication_exposed": "exposed communication",
    "offload_exposed": "exposed offload",
    "overhead": "overhead",
}
"""Of time, measured and predicted: what people read."""


def devices(report: dict[str, Any]) -> str | None:
    """As "8 x NVIDIA H100 80GB HBM3"; None where it is not known."""
    if not report["device"]:
        return None
    return f"{report['world_size']} \N{MULTIPLICATION SIGN} {'CPU' if report['device'] == 'cpu' else report['device']}"


def percent(share: float) -> str:
    """ "41.2 %"."""
    return f"{share:.1%}".replace("%", " %")


def loss_words(value: float | None) -> str:
    """Four decimals; "not finite" where there is none."""
    return "not finite" if value is None else f"{value:.4f}"


def rate_words(value: float) -> str:
    """A count per second: "524.3k", "1,250"."""
    return format_count(value) if value >= 1e4 else f"{value:,.0f}"


def energy_words(energy: dict[str, float | None]) -> str | None:
    """ "5.12 kJ a step, 9.77 kJ per million tokens, 0.57 kWh in all"; None where nothing is known."""
    step, tokens, whole = (energy[key] for key in ("joules_per_step", "joules_per_million_tokens", "joules"))
    words = [
        *([f"{joules(step)} a step"] if step is not None else []),
        *([f"{joules(tokens)} per million tokens"] if tokens is not None else []),
        *([f"{whole / 3.6e6:.3g} kWh in all"] if whole is not None else []),
    ]
    return ", ".join(words) or None


def joules(value: float) -> str:
    """ "5.12 kJ"."""
    for unit, size in (("GJ", 1e9), ("MJ", 1e6), ("kJ", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} J"


def exit_words(end: dict[str, Any] | None) -> str:
    """How a run ended, shortly."""
    if not end:
        return "under way, or killed"
    code: Any = end.get("code")
    return EXITS.get(code, f"exit code {code}")


def flags(changes: dict[str, Any]) -> list[str]:
    """Changes of a spec, {"a.b": value}, as a shell takes them: "--set a.b=1"."""
    texts = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changes.items())
    return [shlex.join(["--set", text]) for text in texts]


def told(value: Any, form: Callable[[Any], str]) -> str:
    """`value` in its form; "n/a" where there is none."""
    return NOT_KNOWN if value is None else form(value)


FIGURES: dict[str, tuple[str, Callable[[Any], str]]] = {
    **{key: (what, format_bytes) for key, (_, what) in MEMORY.items()},
    "host_rss_bytes": ("memory of the process on the host", format_bytes),
    "step_seconds": ("an optimizer step, the median", format_seconds),
    "tokens_per_second_per_gpu": ("tokens per second and device, the median", "{:,.0f}".format),
    "mfu": ("MFU, the median", percent),
}
"""Key of "predicted" and "measured" -> what it is, and how it is written."""


def predicted_and_measured(report: dict[str, Any], keys: Sequence[str], caption: str = "") -> Sheet:
    """Of these figures a row each: predicted, measured, and their ratio."""
    sides = (report["predicted"], report["measured"])
    rows = [
        [
            FIGURES[key][0],
            *(told(side[key], FIGURES[key][1]) for side in sides),
            told(report["measured_to_predicted"][key], percent),
        ]
        for key in keys
    ]
    return Sheet("predicted and measured", ["what", ">predicted", ">measured", ">measured / predicted"], rows, caption)
