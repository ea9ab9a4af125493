"""The pages of docs/recipes/: each recipe, how to start it, and what the planner predicts of it.

python -m benchmarks.recipe_pages     # writes docs/recipes/*.md; a test compares them
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.errors import UserError
from scaling.estimate.report import run_report
from scaling.groups import Group
from scaling.inventory import sample_length
from scaling.run import Job, resolve
from scaling.spec import Spec, load_spec
from scaling.spec.sections import Decoder, Vla
from scaling.units import format_bytes, format_count, format_seconds

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "recipes"
DEVICE, NAME = "NVIDIA H100 80GB HBM3", "H100 80 GB"
RANKS = ((1, "one GPU"), (4, "4 GPUs"), (8, "8 GPUs"), (16, "two machines of 8"))
ABOUT = {
    "gpt2-124m": "GPT-2's smallest, pretrained on token files as the nano-gpt family writes them.",
    "gpt2-350m": "GPT-2 medium, pretrained as its smaller sister.",
    "gpt2-774m": "GPT-2 large, pretrained as its smaller sisters.",
    "gpt2-1.5b": "GPT-2 XL, pretrained as its smaller sisters.",
    "gpt2-dolly": "A pretrained GPT-2 learns to follow instructions on Dolly's 15,000.",
    "llama-8b": "Llama 3's shape, pretrained in sequences of 8,192 tokens.",
    "minimind-pretrain": "MiniMind's small language model, from nothing.",
    "minimind-sft": "It learns to answer, from conversations.",
    "minimind-lora": "The same by adapters, the model's own weights frozen.",
    "minimind-dpo": "It learns which of two answers people prefer.",
    "minimind-ppo": "It learns from rewards of the answers that it gives itself.",
    "atlas-vla": "A robot's policy: frozen vision backbone, language encoder at a small learning rate, fusion and "
    "action head at the full one.",
}
STARTS = {
    1: "python launch/train.py --spec {name}",
    4: "torchrun --nproc_per_node=4 launch/train.py --spec {name}",
    8: "torchrun --nproc_per_node=8 launch/train.py --spec {name}",
    16: "torchrun --nnodes=2 --node_rank=0 --nproc_per_node=8 --master_addr=HOST --master_port=29500 \\\n"
    "    launch/train.py --spec {name}     # on each machine, with its --node_rank",
}


def main() -> int:
    for path, text in pages():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


def pages() -> Iterator[tuple[Path, str]]:
    """Path and text of each page."""
    for name, about in ABOUT.items():
        yield FOLDER / f"{name}.md", page(name, about)


def page(name: str, about: str) -> str:
    """A recipe's page."""
    spec = load_spec(name)
    job = resolve(spec, 1)
    lines = [f"# {name}", "", about, "", *_facts(spec, job), "", "```bash"]
    lines += [start.format(name=name) for start in STARTS.values()]
    lines += ["```", ""]
    lines += [
        f"On {NAME}, as the planner has it; **none of it is measured**, and two machines are untried. `python -m "
        f"scaling.plan --spec {name} --gpus 8xH100-80GB` has more, and what would be faster.",
        "",
    ]
    lines += _table(spec)
    return "\n".join(lines) + "\n"


def _facts(spec: Spec, job: Job) -> Iterator[str]:
    trained, total = _size(job.groups, trained=True), _size(job.groups, trained=False)
    size = f"{format_count(total)}" + ("" if trained == total else f", of which {format_count(trained)} train")
    positions = "positions" if isinstance(spec.model, Vla) else "tokens"
    yield f"- parameters: {size}"
    yield f"- a step: {job.plan.global_batch} samples of {sample_length(spec):,} {positions} on one GPU"
    if spec.lr_scaling.rule != "none":
        yield f"- learning rates grow with the number of GPUs (`lr_scaling`: {spec.lr_scaling.rule})"
    rates = {group.name: group.lr for group in job.groups if not group.frozen and not group.name.endswith("undecayed")}
    told = ", ".join(f"{rate:g}" + (f" ({name})" if len(rates) > 1 else "") for name, rate in rates.items())
    yield f"- peak learning rate: {told}; schedule: {spec.schedule.kind}, {spec.schedule.warmup_steps} steps of warm-up"
    length = f"{spec.max_steps:,} steps" if spec.max_steps else f"{spec.epochs:g} epochs"
    yield f"- length: {length}; precision: {spec.precision}; backend: `{spec.backend.kind}`"
    if spec.initialize_from:
        yield f"- starts from `{spec.initialize_from}` (`initialize_from`)"
    if isinstance(spec.model, Decoder | Vla) and getattr(spec.data, "train", None):
        files = ", ".join(f"`{name}`" for name in getattr(spec.data, "train", ()))
        yield f"- reads {files}, relative to the working folder"


def _size(groups: tuple[Group, ...], *, trained: bool) -> int:
    return sum(group.parameters for group in groups if not (trained and group.frozen))


def _table(spec: Spec) -> Iterator[str]:
    yield "| | global batch | memory of each | a step | all steps |"
    yield "|---|---|---:|---:|---:|"
    for ranks, words in RANKS:
        try:
            job = resolve(spec, ranks)
            found = run_report(job.spec, job.plan, job.groups, job.rendered, DEVICE, min(ranks, 8))
        except UserError as error:
            yield f"| {words} | {str(error).partition(';')[0].replace('|', '/')} | | | |"
            continue
        yield f"| {words} | {job.plan.sentence} | {_memory(found)} | {_time(found, spec)} |"


def _memory(found: dict[str, Any]) -> str:
    return format_bytes(found["memory"]["peak_reserved_bytes"])


def _time(found: dict[str, Any], spec: Spec) -> str:
    seconds = found["time"]["step_seconds"]
    whole = format_seconds(seconds * spec.max_steps) if spec.max_steps else ""
    return f"{format_seconds(seconds)} | {whole}"


if __name__ == "__main__":
    sys.exit(main())
