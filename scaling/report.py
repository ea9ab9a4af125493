"""What a run did, beside what was predicted of it before: its plan.json and its metrics.jsonl.

    python -m scaling.report RUN_DIR [RUN_DIR …] [--json [FILE]]

Needs no torch. Steps that warm up (the first two logged ones) are left out of times; of a step that was taken again
after a crash the later record counts.
"""

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling.errors import CommandLine, UserError, run_command
from scaling.run_folder import EXIT, METRICS, VALIDATION
from scaling.units import format_bytes, format_seconds
from scaling.view import Sheet, print_sheet

SCHEMA_VERSION = 1
WARM_UP = 2
"""Logged steps whose times do not count: they compile, and fill caches."""
MEMORY = {
    "peak_allocated_bytes": ("allocated_peak_bytes", "memory of tensors, at the peak"),
    "peak_reserved_bytes": ("reserved_peak_bytes", "memory that the allocator holds"),
    "device_used_bytes": ("device_used_bytes", "memory in use on the device"),
}
"""Predicted key -> measured key, and what it is."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    reports = [run_report(Path(folder)) for folder in options.run]
    if options.json != "-":
        for report in reports:
            for line in _head(report):
                print(line)
            print_sheet(_sheet(report))
    if options.json:
        _write(reports, options)
    return 0


def run_report(folder: Path) -> dict[str, Any]:
    """Predicted and measured figures of the run in `folder`, as plain JSON values; null is what is not known.

    Raises UserError where the folder holds no run.
    """
    plan, lines = _read_json(folder / "plan.json"), _read_lines(folder / METRICS)
    if not lines:
        raise UserError(
            f"RUN_DIR must be the folder of a run, but {str(folder)[:200]} has no logged step in {METRICS}; "
            "name another, or let the run log one"
        )
    steps = {line["step"]: line for line in lines}
    warm = [steps[step] for step in sorted(steps)][WARM_UP:]
    validations = _read_lines(folder / VALIDATION)
    predicted_time = plan.get("time") or {}
    measured = {key: _highest(lines, own) for key, (own, _) in MEMORY.items()}
    measured |= {
        "step_seconds": _median(line["step_seconds"] for line in warm),
        "tokens_per_second_per_gpu": _median(line["tokens_per_second_per_device"] for line in warm),
        "mfu": _median(line["mfu"] for line in warm),
        "host_rss_bytes": _highest(lines, "host_rss_bytes"),
    }
    times = ("step_seconds", "tokens_per_second_per_gpu", "mfu")
    predicted = {key: plan.get("memory", {}).get(key) for key in MEMORY}
    predicted |= {key: predicted_time.get(key) for key in times} | {"host_rss_bytes": None}
    return {
        "schema_version": SCHEMA_VERSION,
        "run": str(folder),
        "device": plan.get("device"),
        "world_size": plan.get("world_size"),
        "logged_steps": len(steps),
        "last_step": max(steps),
        "loss": {"first": steps[min(steps)]["loss"], "last": steps[max(steps)]["loss"]},
        "best_validation_loss": min((line["loss"] for line in validations if line["loss"] is not None), default=None),
        "exit": _read_json(folder / EXIT, absent={}) or None,
        "predicted": predicted,
        "measured": measured,
        "measured_to_predicted": {key: _ratio(measured[key], predicted[key]) for key in measured},
    }


def _highest(lines: Sequence[dict[str, Any]], key: str) -> int | None:
    found = [line["memory"][key] for line in lines if line["memory"].get(key) is not None]
    return max(found, default=None)


def _median(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def _ratio(measured: float | None, predicted: float | None) -> float | None:
    return measured / predicted if measured is not None and predicted else None


def _read_json(path: Path, absent: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if absent is not None:
            return absent
        raise UserError(
            f"RUN_DIR must be the folder of a run, but {str(path.parent)[:200]} has no {path.name}; name another"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)[:200]} must be a JSON file that can be read, but is not: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{str(path)[:200]} must hold a JSON object, but does not; name another folder")
    return found


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that a run may still append to."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)[:200]} must be a file that can be read, but is not: {error}") from None
    whole = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise UserError(f"{str(path)[:200]} must hold a JSON object in each line, but does not: {error}") from None


# ---------------------------------------------------------------- what is shown


def _head(report: dict[str, Any]) -> list[str]:
    loss, end = report["loss"], report["exit"]
    lines = [
        f"{report['run']}: {report['world_size']} x {report['device']}, {report['logged_steps']} logged steps, the "
        f"last is {report['last_step']}; loss {_loss(loss['first'])} -> {_loss(loss['last'])}"
    ]
    if report["best_validation_loss"] is not None:
        lines.append(f"best validation loss {_loss(report['best_validation_loss'])}")
    lines.append("it has not ended, or was killed" if end is None else f"ended with exit code {end['code']}")
    return lines


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _sheet(report: dict[str, Any]) -> Sheet:
    predicted, measured, ratios = report["predicted"], report["measured"], report["measured_to_predicted"]
    words: dict[str, tuple[str, Callable[[Any], str]]] = {
        key: (what, format_bytes) for key, (_, what) in MEMORY.items()
    }
    words["host_rss_bytes"] = ("memory of the process on the host", format_bytes)
    words["step_seconds"] = ("an optimizer step, the median", format_seconds)
    words["tokens_per_second_per_gpu"] = ("tokens per second and device, the median", lambda value: f"{value:,.0f}")
    words["mfu"] = ("MFU, the median", lambda value: f"{value:.1%}".replace("%", " %"))
    rows = [
        [
            what,
            *("n/a" if value is None else form(value) for value in (predicted[key], measured[key])),
            "n/a" if ratios[key] is None else f"{ratios[key]:.1%}".replace("%", " %"),
        ]
        for key, (what, form) in words.items()
    ]
    caption = f"times without the first {WARM_UP} logged steps"
    if report["device"] == "cpu":
        caption += "; a CPU has no allocator to ask: `python -m scaling.rehearse` counts live tensors"
    return Sheet("predicted and measured", ["what", ">predicted", ">measured", ">measured / predicted"], rows, caption)


def _write(reports: Sequence[dict[str, Any]], options: Namespace) -> None:
    text = json.dumps(reports[0] if len(reports) == 1 else list(reports), indent=1, allow_nan=False)
    if options.json == "-":
        print(text)
        return
    try:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"`--json` must be a file that can be written, but {options.json[:200]} is not: {reason}"
        ) from None


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN_DIR", nargs="+", help="the folder of a run, under way or ended")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="as JSON, in FILE or in place of the table; of several a list",
    )
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main))
