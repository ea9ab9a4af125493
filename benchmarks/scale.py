"""What the planner says of 8 to 4,096 GPUs, beside runs that others published: docs/scale.md and its pictures.

    python -m benchmarks.scale     # writes docs/scale.md and docs/scale/*.svg; a test compares them

Nothing in it is measured by this project. Each GPU gets the same work however many there are, one micro-batch a step,
which is where communication weighs most.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.published import NODE, compare, load_runs
from scaling.estimate.memory import MemoryModel
from scaling.estimate.models import bare_document
from scaling.estimate.search import MARGIN, usable_bytes
from scaling.estimate.time import estimate_time
from scaling.hardware import Cluster, find_gpu
from scaling.inventory import sample_length
from scaling.run import resolve
from scaling.spec import Spec, change_spec, load_spec, parse_spec
from scaling.spec.sections import Vla
from scaling.units import format_bytes, format_count

ROOT = Path(__file__).resolve().parent.parent
PAGE, FOLDER = ROOT / "docs" / "scale.md", ROOT / "docs" / "scale"
CARD = "H100-80GB"
COUNTS = tuple(NODE * 2**power for power in range(10))


@dataclass(frozen=True)
class Shape:
    """A model, and the published runs that are most like it."""

    name: str
    title: str
    spec: str
    """A recipe, or "model:" and a name of `scaling.plan --model`."""
    micro_batch: int
    published: tuple[str, ...] = ()
    """Models of benchmarks/published/runs.csv."""
    likeness: str = ""
    """In what the published ones differ."""


SHAPES = (
    Shape("gpt2-124m", "GPT-2, 124 M parameters", "gpt2-124m", 32),
    Shape(
        "gpt2-1.5b",
        "GPT-2, 1.5 B parameters",
        "gpt2-1.5b",
        8,
        ("MPT-1b", "MPT-760m", "Llama-1B (nanotron)"),
        "MPT of 760 M and 1.3 B parameters in sequences of 512 to 65,536 tokens, and a Llama of 1 B",
    ),
    Shape(
        "llama-8b",
        "Llama 3, 8 B parameters",
        "llama-8b",
        1,
        ("Llama-3-8B", "MPT-7b", "InternLM-7B"),
        "the same model on H100 of 500 W, MPT of 7 B, and InternLM of 7 B on A100 (grade B)",
    ),
    Shape(
        "llama-70b",
        "Llama 3, 70 B parameters",
        "model:llama3-70b",
        1,
        ("MPT-70b", "MPT-30b"),
        "MPT of 30 B and 70 B, in sequences of 1,024 to 8,192 tokens",
    ),
    Shape("atlas-vla", "Vision, language, action", "atlas-vla", 8),
)
STRATEGIES: dict[str, dict[str, Any]] = {
    "FSDP over all": {"kind": "fsdp"},
    "FSDP within a node": {"kind": "fsdp", "replicate": None},  # as many replicas as nodes
    "ZeRO-1": {"kind": "deepspeed", "zero_stage": 1},
    "DDP": {"kind": "ddp"},
}
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")


@dataclass(frozen=True)
class Point:
    """What is predicted of a shape under a strategy on a number of GPUs."""

    gpus: int
    fits: bool
    memory_bytes: int
    """The upper end of the band, on each GPU."""
    rate: float
    """Tokens a second and GPU."""
    mfu: float | None


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path, text in files():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


def files() -> Iterator[tuple[Path, str]]:
    """Path and text of the page and of each picture."""
    lines = [HEAD]
    published = published_rows()
    for shape in SHAPES:
        curves = {name: curve(shape, backend) for name, backend in STRATEGIES.items()}
        rows = [row for row in published if row["model"] in shape.published]
        yield FOLDER / f"{shape.name}.svg", picture(shape, curves, rows)
        lines += section(shape, curves, rows)
    yield PAGE, "\n".join(lines).rstrip() + "\n"


# ---------------------------------------------------------------- numbers


def spec_of(shape: Shape) -> Spec:
    """The spec, with one micro-batch a step."""
    batch = json.dumps({"micro_batch_size": shape.micro_batch, "gradient_accumulation_steps": 1})
    if not shape.spec.startswith("model:"):
        return load_spec(shape.spec, [f"batch={batch}"])
    settings = [f"batch={batch}", "activation_checkpointing=full", "compile=true"]
    document, _ = bare_document(shape.spec.removeprefix("model:"), 8192, NODE, settings)
    return parse_spec(document)


def curve(shape: Shape, backend: dict[str, Any], counts: Sequence[int] = COUNTS) -> list[Point]:
    """The prediction at each number of GPUs that the strategy can be run on."""
    spec, gpu, found = spec_of(shape), find_gpu(CARD), []
    usable = usable_bytes(Cluster(1, NODE, gpu), MARGIN)
    assert usable is not None
    for count in counts:
        nodes = count // NODE
        own = backend | ({"replicate": nodes} if "replicate" in backend else {})
        job = resolve(change_spec(spec, backend=own), count)
        ledger = MemoryModel(job.spec, job.groups, job.rendered, job.plan, gpu)
        memory = ledger.at(job.plan.micro_batch, job.plan.accumulation)
        time = estimate_time(job.spec, job.plan, job.groups, job.rendered, Cluster(nodes, NODE, gpu))
        fits = memory.high_bytes <= usable
        found.append(Point(count, fits, memory.high_bytes, time.tokens_per_second_per_gpu, time.mfu))
    return found


def published_rows() -> list[dict[str, Any]]:
    """Published speeds on one node or more, and the planner's of the very same runs, by model and number of GPUs."""
    runs = {run.row["id"]: run for run in load_runs() if int(run.row["n_gpus"]) >= NODE and run.published}
    rows = [
        row | {"model": runs[row["id"]].row["model"], "gpus": runs[row["id"]].world_size}
        for row in compare(runs.values())
    ]
    return sorted(rows, key=lambda row: (row["model"], row["gpus"], row["id"]))


# ---------------------------------------------------------------- the page

HEAD = f"""# Scale on paper: 8 to 4,096 GPUs

Made by `python -m benchmarks.scale`; not edited by hand. **Everything said of this project is predicted, nothing is
measured.** The machine is one of nodes of {NODE} {CARD} with the vendor's own network (400 Gb/s a GPU); others are
slower. Each GPU has the same work however many there are, one micro-batch a step: accumulating several makes
communication weigh less. A cell has tokens a second and GPU, MFU, and the upper end of the predicted band of memory of
each GPU; what does not fit has no speed. Of a vision-language-action model tokens are its positions.

Beside a model stand speeds that others published of models most like it
([what they are](../benchmarks/published/README.md)), and what the planner says of those very runs, on their machines
and with their batches. They are the dots of the pictures, and no points of the lines. Three constants of the planner
were fitted on the rows marked so. No published run here has more than 1,024 GPUs: beyond, the lines have nothing to be
held against.
"""


def section(shape: Shape, curves: dict[str, list[Point]], published: Sequence[dict[str, Any]]) -> list[str]:
    """One model."""
    spec = spec_of(shape)
    unit = "positions" if isinstance(spec.model, Vla) else "tokens"
    lines = [f"## {shape.title}", ""]
    lines += [
        f"`{shape.spec.removeprefix('model:')}`, {shape.micro_batch} x {sample_length(spec):,} {unit} on each GPU, "
        f"{spec.precision}, checkpointing {spec.activation_checkpointing}, {'' if spec.compile else 'not '}compiled.",
        "",
        f"![{shape.title}](scale/{shape.name}.svg)",
        "",
        f"| GPUs | {' | '.join(curves)} | all GPUs, the fastest |",
        f"|---:|{'---:|' * (len(curves) + 1)}",
    ]
    for place, count in enumerate(COUNTS):
        points = [points[place] for points in curves.values()]
        best = max((point.rate for point in points if point.fits), default=None)
        whole = "nothing fits" if best is None else f"{format_count(best * count)} {unit}/s"
        lines.append(f"| {count:,} | {' | '.join(_cell(point) for point in points)} | {whole} |")
    lines += [""]
    if not published:
        return [*lines, "No published run of such a model is at hand.", ""]
    lines += [f"Published: {shape.likeness}.", ""]
    lines += ["| run | GPUs | | tokens/s and GPU, published | predicted | off |", "|---|---:|---|---:|---:|---:|"]
    lines += [_published(row) for row in published]
    return [*lines, ""]


def _cell(point: Point) -> str:
    size = format_bytes(point.memory_bytes)
    if not point.fits:
        return f"does not fit ({size})"
    mfu = "" if point.mfu is None else f", {_share(point.mfu)}"
    return f"{point.rate:,.0f}{mfu}, {size}"


def _published(row: dict[str, Any]) -> str:
    what, _, rest = row["what"].partition(f" {row['gpus']} GPUs, ")
    mark = ", fitted" if row["fitted"] else ""
    return (
        f"| {row['id']} {what}, {rest} | {row['gpus']:,} | {row['hardware']}, grade {row['grade']}{mark} | "
        f"{row['published']:,.0f} | {row['predicted']:,.0f} | {row['error']:+.0%} |".replace("%", " %")
    )


def _share(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


# ---------------------------------------------------------------- pictures

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 680, 320, 64, 40, 20, 190


def picture(shape: Shape, curves: dict[str, list[Point]], published: Sequence[dict[str, Any]]) -> str:
    """Tokens a second and GPU over GPUs, both logarithmic: a line for each strategy, a dot for each published run."""
    heights = [point.rate for points in curves.values() for point in points if point.fits]
    heights += [row["published"] for row in published]
    low, high = (math.log2(pick(heights)) for pick in (min, max))
    low, high = math.floor(low), max(math.ceil(high), math.floor(low) + 1)

    def at(gpus: float, rate: float) -> tuple[float, float]:
        across = (math.log2(gpus) - math.log2(COUNTS[0])) / math.log2(COUNTS[-1] / COUNTS[0])
        up = (math.log2(rate) - low) / (high - low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP), 1),
        )

    return "\n".join([*_frame(shape, at, low, high), *_lines(curves, at), *_dots(published, at), "</svg>"]) + "\n"


def _frame(shape: Shape, at: Any, low: int, high: int) -> Iterator[str]:
    style = 'font-family="sans-serif" font-size="11"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {style}>'
    yield f"<title>{shape.title}: predicted tokens a second and GPU</title>"
    yield '<rect width="100%" height="100%" fill="#fff"/>'
    for count in COUNTS:
        x, y = at(count, 2**low)
        yield f'<text x="{x}" y="{y + 15}" text-anchor="middle">{count:,}</text>'
    for power in range(low, high + 1):
        (x, y), (end, _) = at(COUNTS[0], 2**power), at(COUNTS[-1], 2**power)
        yield f'<path d="M{x} {y}H{end}" stroke="#ddd"/>'
        yield f'<text x="{x - 6}" y="{y + 4}" text-anchor="end">{2**power:,}</text>'
    yield f'<text x="{LEFT}" y="12">tokens a second and GPU, predicted; dots: published</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">GPUs</text>'


def _lines(curves: dict[str, list[Point]], at: Any) -> Iterator[str]:
    for place, ((name, points), colour) in enumerate(zip(curves.items(), COLOURS, strict=True)):
        fitting = [at(point.gpus, point.rate) for point in points if point.fits]
        y = TOP + 20 + 18 * place
        words = name if fitting else f"{name}: does not fit"
        yield f'<text x="{WIDTH - RIGHT + 8}" y="{y}" fill="{colour}">{words}</text>'
        if fitting:
            path = " ".join(f"{x},{y}" for x, y in fitting)
            yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _dots(published: Sequence[dict[str, Any]], at: Any) -> Iterator[str]:
    for row in published:
        x, y = at(row["gpus"], row["published"])
        yield f'<circle cx="{x}" cy="{y}" r="2.5" fill="#555"><title>{row["id"]} {row["model"]}</title></circle>'


if __name__ == "__main__":
    sys.exit(main())
