"""What a run did, beside what was predicted of it before: its plan.json and its metrics.jsonl.

    python -m scaling.report RUN_DIR [RUN_DIR …] [--json [FILE]] [--html FILE | --no-html]

Prints a summary and writes RUN_DIR/report.html, one file that loads nothing from elsewhere; of several runs a page that
compares them, comparison.html in the current folder. Needs no torch. Steps that warm up (the first of each start) are
left out of times; of a step that was taken again after a crash the later record counts.
"""

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling.errors import CommandLine, run_program, write_output
from scaling.report.figures import MEMORY, TIMES, figures, read_logged
from scaling.report.page import compare, page
from scaling.report.words import energy_words, loss_words, percent, predicted_and_measured, rate_words
from scaling.summarize import RunData
from scaling.units import format_seconds
from scaling.view import Sheet, print_sheet

PAGE, COMPARISON = "report.html", "comparison.html"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    runs = [read_logged(Path(folder)) for folder in options.run]
    reports = [figures(run) for run in runs]
    quiet = options.json == "-"
    if not quiet:
        for report in reports:
            for line in _head(report):
                print(line)
            print_sheet(_sheet(report))
    if options.json:
        text = json.dumps(reports[0] if len(reports) == 1 else reports, indent=1, allow_nan=False)
        print(text) if quiet else write_output(options.json, text + "\n", "--json", "name another")
    if not options.no_html:
        place = _write_page(runs, reports, options.html)
        if not quiet:
            print(f"page: {place}")
    return 0


def _write_page(runs: Sequence[RunData], reports: Sequence[dict[str, Any]], asked: str | None) -> Path:
    """Where it was written."""
    place = Path(asked) if asked else runs[0].folder / PAGE if len(runs) == 1 else Path(COMPARISON)
    text = page(runs[0], reports[0]) if len(runs) == 1 else compare(runs, reports)
    write_output(place, text, "--html", "name another, or pass `--no-html`")
    return place


# ---------------------------------------------------------------- what is shown


def _head(report: dict[str, Any]) -> list[str]:
    loss, end = report["loss"], report["exit"]
    began = f"{report['run']}: {report['world_size']} x {report['device']}, "
    if report["last_step"] is None:
        lines = [began + "no step was logged"]
    else:
        lines = [
            f"{began}{report['logged_steps']} logged steps, the last is {report['last_step']}; "
            f"loss {loss_words(loss['first'])} -> {loss_words(loss['last'])}"
        ]
    if report["best_validation_loss"] is not None:
        step = report["best_validation_step"]
        lines.append(f"best validation loss {loss_words(report['best_validation_loss'])}, after step {step}")
    if report["tokens_per_second"] is not None:
        lines.append(f"{rate_words(report['tokens_per_second'])} tokens/s, the median")
    lines += _spent(report)
    lines.append("it has not ended, or was killed" if end is None else f"ended with exit code {end.get('code')}")
    for finding in report["findings"]:
        lines.append(f"{finding['severity']}: {finding['title']}: {finding['evidence']}")
    return lines


def _spent(report: dict[str, Any]) -> list[str]:
    """Where time and energy went, as far as it is known."""
    lines: list[str] = []
    if parts := report["time_parts"]["measured"]:
        whole = sum(parts.values())
        shares = (f"{name} {percent(seconds / whole)}" for name, seconds in parts.items() if whole)
        lines.append(f"time of a step: {', '.join(shares)}")
    if (found := report["goodput"]) is not None and found["share"] is not None:
        starts = "1 start" if found["starts"] == 1 else f"{found['starts']} starts"
        lines.append(f"goodput {percent(found['share'])} of {format_seconds(found['wall_s'])}, {starts}")
    if (energy := energy_words(report["energy"])) is not None:
        lines.append(f"energy {energy}")
    return lines


def _sheet(report: dict[str, Any]) -> Sheet:
    caption = "times without the steps that warm up"
    if report["device"] == "cpu" and report["measured"]["peak_allocated_bytes"] is None:
        caption += "; a CPU has no allocator to ask: `python -m scaling.rehearse` counts live tensors"
    return predicted_and_measured(report, (*MEMORY, "host_rss_bytes", *TIMES), caption)


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m scaling.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", metavar="RUN_DIR", nargs="+", help="the folder of a run, under way or ended")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="as JSON, in FILE or in place of the summary; of several a list",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument(
        "--html",
        metavar="FILE",
        help=f"where the page goes (default: {PAGE} in RUN_DIR; of several {COMPARISON} in the current folder)",
    )
    place.add_argument("--no-html", action="store_true", help="write no page")
    return parser


if __name__ == "__main__":
    gc.disable()  # a command that soon ends, and keeps all that it reads: collecting would be half of its time
    run_program(main)
