"""Two results of benchmarks.run beside each other: what became slower, larger, or no longer runs.

    python -m benchmarks.compare BASELINE.json NEW.json [--tolerance 0.02]

Rows are compared by name, and only where both were made on the same device, on as many ranks, with the same batch: a
CPU's row is never held against a GPU's, nor a rehearsed one against a measured one. Where both files come from one run
with `--beside`, the two runs of a repeat are a pair, and the pairs' ratios count; otherwise medians do, with a wider
tolerance, since a machine is not the same from one hour to the next.

A row is slower where it lost more than the tolerance and the 95 % interval of the repeats (Student's t on logarithms)
excludes that nothing changed; where that interval reaches beyond the tolerance without saying so, nobody can tell. Of
rows that ran once there is no interval: ten percent it takes then. Memory is counted and not timed: half a percent.

Exit code 1 where a row became slower, larger, or failed; 0 otherwise; 2 where a file is none of these.
"""

import json
import math
import statistics
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.run import KIND
from scaling.errors import CommandLine, UserError, run_program
from scaling.view import Sheet, print_sheet

PAIRED, UNPAIRED, ONCE = 0.02, 0.05, 0.10
"""Tolerances of speed. The first is `--tolerance`; none of the others is below it."""
MEMORY = 0.005
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5th percentile of Student's t for 1, 2, … degrees of freedom; 2 beyond these."""
SAME_WORK = (
    *("world_size", "global_batch_size", "micro_batch_size", "gradient_accumulation_steps", "sequence_length"),
    *("parameters", "precision", "activation_checkpointing"),
)
"""What two rows must have alike, beside what they ran on, to be of the same work."""
BAD = ("slower", "larger", "no longer runs")


@dataclass(frozen=True)
class Verdict:
    """What became of one quantity of a row."""

    name: str
    quantity: str
    """"speed" or "memory"; "" where none could be compared."""
    verdict: str
    """One of BAD, "faster", "smaller", "same", "cannot tell", "runs now", or why there is nothing to compare."""
    change: float | None = None
    """New over old, less one."""
    low: float | None = None
    high: float | None = None
    """Ends of the 95 % interval; None of rows that ran once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    base, new = (load(path) for path in (options.baseline, options.new))
    verdicts = compare(base, new, options.tolerance)
    print_sheet(table(verdicts, paired=base["session"] == new["session"]))
    for name, document in (("baseline", base), ("new", new)):
        for one in document["noise"]:
            print(f"{name}: beware: {one}")
    return 1 if any(verdict.verdict in BAD for verdict in verdicts) else 0


def load(path: Path) -> dict[str, Any]:
    """A result of benchmarks.run. Raises UserError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"a result must be a file of benchmarks.run, but {path} is none ({error}); name another"
        ) from None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UserError(f"a result must be a file of benchmarks.run, but {path} is none; name another")
    return found


def compare(base: dict[str, Any], new: dict[str, Any], tolerance: float = PAIRED) -> list[Verdict]:
    """Every row of the baseline beside the one of its name, and the rows that are new."""
    paired = base["session"] == new["session"]
    rows = {row["name"]: row for row in new["rows"]}
    found: list[Verdict] = []
    for row in base["rows"]:
        other = rows.pop(row["name"], None)
        found += _compare_rows(row, other, tolerance, paired=paired)
    return found + [Verdict(name, "", "only in the new file") for name in rows]


def _compare_rows(base: dict[str, Any], new: dict[str, Any] | None, tolerance: float, *, paired: bool) -> list[Verdict]:
    name = base["name"]
    if new is None:
        return [Verdict(name, "", "only in the baseline")]
    unlike = _unlike(base, new)
    ran = [row["status"] == "ok" for row in (base, new)]
    if "skipped" in (base["status"], new["status"]):
        return [Verdict(name, "", "skipped")]
    if unlike:
        return [Verdict(name, "", f"not comparable: {unlike}")]
    if ran == [True, False]:
        return [Verdict(name, "", "no longer runs")]
    if not all(ran):
        return [Verdict(name, "", "runs now" if ran[1] else "runs in neither")]
    found: list[Verdict] = []
    speeds = [_speeds(row) for row in (base, new)]
    if all(speeds):
        found.append(_speed(name, speeds[0], speeds[1], tolerance, paired=paired))
    sizes = [row["memory"]["measured_bytes"] for row in (base, new)]
    if all(sizes):
        change = sizes[1] / sizes[0] - 1
        verdict = "larger" if change > MEMORY else "smaller" if change < -MEMORY else "same"
        found.append(Verdict(name, "memory", verdict, change))
    return found


def _unlike(base: dict[str, Any], new: dict[str, Any]) -> str | None:
    """What makes two rows rows of different things; None where nothing does."""
    if base["ran_on"] != new["ran_on"]:
        places = [row["ran_on"]["words"] if row["ran_on"] else "nowhere" for row in (base, new)]
        return " and ".join(places)
    return next((key for key in SAME_WORK if base.get(key) != new.get(key)), None)


def _speeds(row: dict[str, Any]) -> dict[int, float]:
    """Tokens per second of each repeat; of a rehearsal, of its own work."""
    key = "compute_only_tokens_per_second_per_device" if row["ran_on"]["rehearsed"] else "tokens_per_second"
    return {run["repeat"]: run[key] for run in row["runs"] if run.get(key)}


def _speed(name: str, base: dict[int, float], new: dict[int, float], tolerance: float, *, paired: bool) -> Verdict:
    repeats = [repeat for repeat in base if repeat in new] if paired else []
    if repeats:
        logs = [math.log(new[repeat] / base[repeat]) for repeat in repeats]
        middle, error, freedom = statistics.median(logs), _error(logs), len(logs) - 1
    else:
        sides = [[math.log(value) for value in side.values()] for side in (base, new)]
        middle = statistics.median(sides[1]) - statistics.median(sides[0])
        freedom = min(len(side) for side in sides) - 1
        error = math.hypot(*(_error(side) for side in sides))
        tolerance = max(tolerance, UNPAIRED)
    change = math.expm1(middle)
    if freedom < 1:
        tolerance = max(tolerance, ONCE)
        verdict = "slower" if change < -tolerance else "faster" if change > tolerance else "cannot tell"
        return Verdict(name, "speed", verdict, change)
    reach = (STUDENT[freedom - 1] if freedom <= len(STUDENT) else 2.0) * error
    low, high = math.expm1(middle - reach), math.expm1(middle + reach)
    return Verdict(name, "speed", _verdict(change, low, high, tolerance), change, low, high)


def _verdict(change: float, low: float, high: float, tolerance: float) -> str:
    if change < -tolerance and high < 0:
        return "slower"
    if change > tolerance and low > 0:
        return "faster"
    return "cannot tell" if low < -tolerance else "same"


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 of one value, of which there is none."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def table(verdicts: Sequence[Verdict], *, paired: bool) -> Sheet:
    """For people."""
    rows = [
        [verdict.name, verdict.quantity, _share(verdict.change), _interval(verdict), verdict.verdict]
        for verdict in verdicts
    ]
    caption = "pairs of runs, made in turns" if paired else "two sessions: no pairs, and a wider tolerance"
    return Sheet("what changed", ["row", "quantity", ">change", ">95 %", "verdict"], rows, caption)


def _interval(verdict: Verdict) -> str:
    return "" if verdict.low is None else f"{_share(verdict.low)} to {_share(verdict.high)}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:+.1%}".replace("%", " %")


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise ArgumentTypeError(f"must be a share between 0 and 1 such as 0.02, but is {text!r}")
    return value


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m benchmarks.compare", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("baseline", type=Path, metavar="BASELINE.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--tolerance", type=_tolerance, default=PAIRED, metavar="SHARE", help="default %(default)s")
    return parser


if __name__ == "__main__":
    run_program(main)
