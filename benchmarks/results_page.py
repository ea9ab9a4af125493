"""RESULTS.md and its pictures, from the results of benchmarks.run and others: nothing in them is written by hand.

    python -m benchmarks.results_page [--results FOLDER] [--out benchmarks/RESULTS.md]

Pictures (scaling efficiency, tokens per second, memory) lie in a folder `plots` beside the page, and are drawn where
matplotlib is installed. Measured on GPUs, measured on a CPU and rehearsed are headings of their own, and every row says
what it ran on.
"""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results_beside
from benchmarks.run import KIND
from scaling.errors import CommandLine, UserError, run_program, write_output
from scaling.units import format_bytes, format_count, format_seconds

FOLDER = Path(__file__).parent
PARTS = (
    ("Measured on GPUs", "gpu", False, "Not yet measured on a GPU."),
    ("Measured on a CPU", "cpu", False, "None."),
    ("Rehearsed: one rank of many, alone", None, True, "None."),
)
"""Heading, kind of device (None: any), rehearsed or not, and what stands where there is nothing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    read = list(results_beside.documents(options.results))
    documents = [(name, document) for name, document in read if document.get("kind") == KIND]
    if not documents:
        raise UserError(
            f"`--results` must hold results of benchmarks.run, but {options.results} has none; run it first"
        )
    drawn = draw(documents, options.out.parent / "plots") if importlib.util.find_spec("matplotlib") else []
    if not drawn:
        print("no pictures: matplotlib is not installed, or there is nothing to draw")
    beside = list(results_beside.sections(read))
    write_output(options.out, page(documents, [f"plots/{path.name}" for path in drawn], beside), "--out")
    print(options.out)
    return 0


def results(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of each result of benchmarks.run in `folder`."""
    return ((name, document) for name, document in results_beside.documents(folder) if document.get("kind") == KIND)


# ---------------------------------------------------------------- the page


def page(
    documents: Sequence[tuple[str, dict[str, Any]]], pictures: Sequence[str] = (), beside: Sequence[str] = ()
) -> str:
    """The whole page; `beside`: sections about other benchmarks."""
    lines = [
        "# Results",
        "",
        "Made by `python -m benchmarks.results_page` from the results beside it; not edited.",
    ]
    lines += [
        "Medians over the runs of a row; memory is the peak of one rank. Predictions were made before the run.",
        "",
    ]
    for heading, kind, rehearsed, nothing in PARTS:
        lines += [f"## {heading}", ""]
        parts = [part for name, one in documents for part in _part(name, one, kind, rehearsed=rehearsed)]
        lines += parts or [nothing, ""]
    lines += [line for path in pictures for line in (f"![{Path(path).stem}]({path})", "")]
    lines += ["## What did not run", "", *_missing(documents), "", *beside]
    return "\n".join(lines).rstrip() + "\n"


def rows_of(document: dict[str, Any], kind: str | None, *, rehearsed: bool) -> list[dict[str, Any]]:
    """Rows that ran, on such a device, rehearsed or not."""
    return [
        row
        for row in document["rows"]
        if row["status"] == "ok" and row["ran_on"]["rehearsed"] == rehearsed and kind in (None, row["ran_on"]["kind"])
    ]


def _part(name: str, document: dict[str, Any], kind: str | None, *, rehearsed: bool) -> Iterator[str]:
    rows = rows_of(document, kind, rehearsed=rehearsed)
    if not rows:
        return
    machine, environment, asked = document["machine"], document["environment"], document["asked"]
    changed = ", with changes" if environment["changed_since"] else ""
    versions, count = environment["versions"], "GPUs" if machine["kind"] == "gpu" else "cores, no GPU"
    yield f"{name}: {machine['device']}, {machine['count']} {count}; {document['began']}; commit"
    yield f"{(environment['commit'] or 'unknown')[:12]}{changed}; torch {versions['torch']}, DeepSpeed"
    yield f"{versions['deepspeed']}; up to {asked['repeats']} runs of {asked['steps']} steps a row, of which the first"
    yield f"{asked['warm_up']} do not count."
    if kind == "cpu":
        yield "A rank alone has all cores, of several each has its share: efficiency says how well they share."
    yield ""
    for one in document["noise"]:
        yield f"- **Beware**: {one}."
    if document["noise"]:
        yield ""
    yield from _rehearsed_table(rows) if rehearsed else _table(document, rows)
    yield ""


def _table(document: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    heads = ("row", "ran on", "batch", "tokens/s", "a step (quartiles)", "repeats apart", "MFU", "scaling efficiency")
    yield f"| {' | '.join(heads)} | memory | predicted | J per M tokens |"
    yield "|---|---|---|---:|---|---:|---:|---:|---:|---:|---:|"
    for row in rows:
        step = row["step_seconds"]
        quartiles = (
            f"{format_seconds(step['median'])} ({format_seconds(step['low'])} to {format_seconds(step['high'])})"
        )
        figures = [
            f"{row['tokens_per_second']:,.0f}",
            quartiles,
            *(_share(row[name]) for name in ("spread", "mfu")),
            _share(efficiency(document, row)),
            *_memory(row),
            _number(row["joules_per_million_tokens"]),
        ]
        yield f"| {row['name']} | {row['ran_on']['words']} | {_batch(row)} | {' | '.join(figures)} |"


def _rehearsed_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "Memory is measured. The other ranks do not exist: own work is timed on a GPU, communication is predicted."
    yield ""
    heads = ("row", "ran on", "batch", "own work, a step", "communication, predicted", "MFU of own work")
    yield f"| {' | '.join(heads)} | memory | predicted |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for row in rows:
        times = (row["compute_seconds"], row["predicted_communication_seconds"])
        figures = [*("n/a" if one is None else format_seconds(one) for one in times), _share(row["compute_only_mfu"])]
        figures += _memory(row)
        yield f"| {row['name']} | {row['ran_on']['words']} | {_batch(row)} | {' | '.join(figures)} |"


def _missing(documents: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    missing = [(name, row) for name, one in documents for row in one["rows"] if row["status"] != "ok"]
    if not missing:
        yield "Everything did."
        return
    yield "| file | row | | why |"
    yield "|---|---|---|---|"
    for name, row in missing:
        reason = row["reason"].replace("|", "/").replace("\n", " ")
        yield f"| {name} | {row['name']} | {row['status']} | {reason} |"


def efficiency(document: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Tokens a second and device beside those of the same on one; None of one, and where that was not measured."""
    alone = _alone(document, row) if row["world_size"] > 1 else None
    return None if alone is None else row["tokens_per_second_per_device"] / alone["tokens_per_second_per_device"]


def _alone(document: dict[str, Any], row: dict[str, Any]) -> dict[str, Any] | None:
    return next(
        (
            one
            for one in rows_of(document, row["ran_on"]["kind"], rehearsed=False)
            if one["world_size"] == 1 and _series(one) == _series(row)
        ),
        None,
    )


def _series(row: dict[str, Any]) -> str:
    """What rows have in common that differ in their number of ranks alone."""
    return row["name"].replace(f" x{row['world_size']}", "", 1)


def _batch(row: dict[str, Any]) -> str:
    micro, steps = row["micro_batch_size"], row["gradient_accumulation_steps"]
    return f"{micro} x {row['world_size']} x {steps}, {format_count(row['tokens_per_step'])} tokens"


def _memory(row: dict[str, Any]) -> list[str]:
    memory = row["memory"]
    measured = memory["measured_bytes"]
    predicted = format_bytes(memory["predicted_bytes"])
    if measured is None:
        return ["n/a", predicted]
    off = round(memory["predicted_bytes"] / measured - 1, 3) + 0.0  # and no -0.0
    return [format_bytes(measured), f"{predicted} ({off:+.1%})".replace("%", " %")]


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.1%}".replace("%", " %")


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


# ---------------------------------------------------------------- pictures


def draw(documents: Sequence[tuple[str, dict[str, Any]]], folder: Path) -> list[Path]:
    """The pictures of all results; their titles say what they are of. Empty where nothing can be drawn."""
    found: list[Path] = []
    for name, document in documents:
        machine = document["machine"]
        ranks = "GPUs" if machine["kind"] == "gpu" else "CPU ranks, no GPU"
        stem, place = Path(name).stem, f"{machine['device']}: {ranks}"
        measured = rows_of(document, machine["kind"], rehearsed=False)
        for word, label, value in (
            ("tokens", "tokens/s", lambda row: row["tokens_per_second"]),
            ("efficiency", "scaling efficiency", lambda row, document=document: efficiency(document, row)),
        ):
            curves = _curves(measured, value)
            if any(len(points) > 1 for points in curves.values()):
                found.append(_draw_curves(folder / f"{stem}-{word}.svg", curves, place, ranks, label))
        sizes = [row for row in document["rows"] if row["status"] == "ok" and row["memory"]["measured_bytes"]]
        if sizes:
            found.append(_draw_memory(folder / f"{stem}-memory.svg", sizes, place))
    return found


def _curves(rows: Sequence[dict[str, Any]], value: Any) -> dict[str, list[tuple[int, float]]]:
    """Points by number of ranks, of each series."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if (height := value(row)) is not None:
            found.setdefault(_series(row), []).append((row["world_size"], height))
    return {name: sorted(points) for name, points in found.items()}


def _draw_curves(path: Path, curves: dict[str, list[tuple[int, float]]], title: str, x: str, y: str) -> Path:
    figure, axes = _axes(title, (7.2, 4.0))
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    counts = sorted({count for points in curves.values() for count, _ in points})
    axes.set_xticks(counts, [str(count) for count in counts])
    if y == "tokens/s":
        axes.set_yscale("log")  # models of all sizes are on one picture
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, fontsize="x-small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _saved(figure, path)


def _draw_memory(path: Path, rows: Sequence[dict[str, Any]], title: str) -> Path:
    figure, axes = _axes(title, (7.2, 0.8 + 0.3 * len(rows)))
    names = [row["name"] + (" (rehearsed)" if row["ran_on"]["rehearsed"] else "") for row in rows]
    for shift, key, label in ((-0.2, "measured_bytes", "measured"), (0.2, "predicted_bytes", "predicted")):
        sizes = [row["memory"][key] / 2**30 for row in rows]
        axes.barh([place + shift for place in range(len(rows))], sizes, height=0.4, label=label)
    axes.set_yticks(range(len(rows)), names, fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel("GiB of one rank at the peak")
    axes.legend(frameon=False, fontsize="x-small")
    return _saved(figure, path)


def _axes(title: str, size: tuple[float, float]) -> Any:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file for the same numbers
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size)
    axes.set_title(title, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return path


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m benchmarks.results_page", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--results", type=Path, default=FOLDER / "results", metavar="FOLDER", help="default benchmarks/results")
    add("--out", type=Path, default=FOLDER / "RESULTS.md", metavar="FILE", help="default benchmarks/RESULTS.md")
    return parser


if __name__ == "__main__":
    run_program(main)
