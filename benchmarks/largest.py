"""The largest model that trains on one card, with and without CPU offload: predicted, then found by training it.

    python -m benchmarks.largest --out FILE [--seconds 240]
    python -m benchmarks.largest --tiny --out FILE      (small ones within a made-up budget, to try it on a CPU)

Models are of Llama 3 8B's width with as many blocks as fit, sequences of 4,096 tokens, one at a time, checkpointing in
full, bf16. What is predicted to fit is tried first, with steps of the real engine in a process of its own, then more
blocks or fewer until the largest that trains is known. A model whose state would not fit in the host's memory is not
tried: a machine that swaps tells nothing, and one that kills processes less. Exit code 0 where the prediction is within
one block, or 2 %, of what was found.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.machine import Device, device, ran_on
from scaling.errors import CommandLine, UserError, positive, run_program
from scaling.estimate.memory import MemoryModel
from scaling.estimate.results import MemoryEstimate
from scaling.hardware import GPUS, gpu_from_device_name
from scaling.host_memory import limits
from scaling.parity import BACKENDS
from scaling.rehearse import rehearse_all
from scaling.run import Job, resolve
from scaling.run_folder import environment
from scaling.spec import load_spec
from scaling.units import format_bytes, format_count

KIND = "benchmarks.largest"
WAYS = {"on the card alone": "single", "state on the host (FSDP2, CPU offload)": "fsdp-offload"}
MOST_BLOCKS = 512
STEPS = 3
TOLERANCE = 0.02
HOST_SHARE = 0.9
"""Of the free host memory, what a model's state may take there."""
SIZES = (
    'data={"kind": "synthetic", "sequence_length": 4096}',
    'batch={"micro_batch_size": 1, "gradient_accumulation_steps": 1}',
    *("compile=false", "activation_checkpointing=full"),
)
TINY = (
    'data={"kind": "synthetic", "sequence_length": 64}',
    *("model.hidden_size=64", "model.intermediate_size=160", "model.num_attention_heads=4"),
    *("model.num_key_value_heads=2", "model.vocab_size=512"),
)
TINY_BUDGET = {"single": 3_000_000, "fsdp-offload": 3_000_000}
"""Bytes of tensors that stand for a card where --tiny tries this on a CPU; about four blocks."""


@dataclass(frozen=True)
class Way:
    """How models are trained, and what bounds them."""

    backend: str
    tiny: bool
    card_bytes: int
    """Of the card, or the budget that stands for it."""
    host_bytes: int
    device_name: str
    on_gpu: bool

    def settings(self, blocks: int) -> list[str]:
        """Changes to llama-8b."""
        backend = f"backend={json.dumps(BACKENDS[self.backend])}"
        return [*SIZES, *(TINY if self.tiny else ()), f"model.num_hidden_layers={blocks}", backend]

    def job(self, blocks: int) -> Job:
        return resolve(load_spec("llama-8b", self.settings(blocks)), 1)

    def predict(self, blocks: int) -> MemoryEstimate:
        """The planner's estimate of a model with so many blocks."""
        job, gpu = self.job(blocks), gpu_from_device_name(self.device_name)
        gpu = replace(gpu or GPUS[0], memory_bytes=self.card_bytes)
        return MemoryModel(job.spec, job.groups, job.rendered, job.plan, gpu, cuda=self.on_gpu).exactly(job.plan)

    def needs(self, memory: MemoryEstimate) -> int:
        """Bytes that decide whether it fits: of the whole process on a GPU, of tensors against a budget."""
        return memory.high_bytes if self.on_gpu else memory.peak_allocated_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    here = device()
    if here.kind == "cpu" and not options.tiny:
        raise UserError("`--tiny` must be given where there is no GPU, but is not; add it")
    free = int(HOST_SHARE * min((limit.free_bytes for limit in limits()), default=2**62))
    card = _card_bytes() if here.kind == "gpu" else None
    rows, ends = [], time.monotonic() + options.seconds
    for place, (about, backend) in enumerate(WAYS.items()):
        budget = card or TINY_BUDGET[backend]
        way = Way(backend, options.tiny, budget, free, here.name, here.kind == "gpu")
        left = (ends - time.monotonic()) / (len(WAYS) - place)
        rows.append({"what": about, "backend": backend, **find(way, here, time.monotonic() + left)})
        print(line(rows[-1]), flush=True)
    document = {
        "kind": KIND,
        "tiny": options.tiny,
        "environment": environment(1, here.name if here.kind == "gpu" else "cpu"),
        "rows": rows,
        "good": all(row["good"] for row in rows),
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0 if document["good"] else 1


def find(way: Way, here: Device, ends: float) -> dict[str, Any]:
    """Predict the largest model, then look for it until `ends`, of time.monotonic."""
    by_card = largest(lambda blocks: way.needs(way.predict(blocks)) <= way.card_bytes, MOST_BLOCKS)
    by_host = largest(lambda blocks: way.predict(blocks).host_bytes <= way.host_bytes, MOST_BLOCKS)
    predicted, tried = min(by_card, by_host), dict[int, dict[str, Any]]()

    def trains(blocks: int) -> bool | None:
        if blocks not in tried:
            if time.monotonic() > ends:
                return None
            tried[blocks] = attempt(way, blocks)
            print(f"  {blocks} blocks: {'train' if tried[blocks]['trains'] else 'do not fit'}", flush=True)
        return tried[blocks]["trains"]

    found, certain = search(trains, max(1, predicted), by_host)
    apart = abs(found - predicted)
    return {
        "ran_on": ran_on(here, 1, rehearsed=False)["words"],
        "card_bytes": way.card_bytes,
        "host_bytes": way.host_bytes,
        "limited_by": "host memory" if by_host <= by_card else "the card" if way.on_gpu else "the budget",
        "predicted_blocks": predicted,
        "predicted_parameters": _parameters(way, predicted),
        "found_blocks": found,
        "found_parameters": _parameters(way, found),
        "certain": certain,
        "good": certain and (apart <= 1 or apart <= TOLERANCE * found),
        "tries": [tried[blocks] for blocks in sorted(tried)],
    }


def largest(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` for which `holds`, which holds for all smaller ones; 0 where for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def search(trains: Callable[[int], bool | None], guess: int, most: int) -> tuple[int, bool]:
    """The largest number up to `most` that trains, looked for from `guess`, and whether the next one was seen to fail.

    `trains` is None where there is no more time to find out.
    """
    low, high, step, place = 0, most + 1, 1, min(guess, most)
    while high - low > 1:
        answer = trains(place)
        if answer is None:
            return low, False
        low, high = (place, high) if answer else (low, place)
        # Steps that double lead away from the guess until both sides are known; then halves.
        if high <= most and low > 0:
            place = (low + high) // 2
        else:
            place = min(low + step, most) if answer else max(high - step, 1)
            step *= 2
    return low, True


def attempt(way: Way, blocks: int) -> dict[str, Any]:
    """Steps of a model with so many blocks, for real."""
    cell = {"spec": "llama-8b", "world_size": 1, "set": way.settings(blocks), "steps": STEPS}
    began = time.monotonic()
    report = next(iter(rehearse_all([cell], STEPS)))
    predicted = way.predict(blocks)
    found: dict[str, Any] = {
        "blocks": blocks,
        "parameters": _parameters(way, blocks),
        "seconds": time.monotonic() - began,
    }
    found |= {"predicted_bytes": predicted.peak_allocated_bytes, "predicted_host_bytes": predicted.host_bytes}
    if "error" in report:
        return found | {"trains": False, "reason": report["error"], "measured_bytes": None}
    measured = report["memory"]["peak_allocated_bytes"]
    # On a CPU nothing runs out: what was counted is held against the budget.
    return found | {"trains": way.on_gpu or measured <= way.card_bytes, "measured_bytes": measured}


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    sizes = (
        f"{row[f'{which}_blocks']} blocks, {format_count(row[f'{which}_parameters'])}"
        for which in ("found", "predicted")
    )
    found, predicted = sizes
    sure = "" if row["certain"] else "at least "
    return (
        f"{row['what']}, {row['ran_on']}, {format_bytes(row['card_bytes'])}: {sure}{found} parameters train; predicted "
        f"{predicted}; limited by {row['limited_by']}"
    )


def _parameters(way: Way, blocks: int) -> int:
    return sum(group.parameters for group in way.job(max(1, blocks)).groups) if blocks else 0


def _card_bytes() -> int:
    """Of the first GPU, as torch sees it; asked in another process, since asking takes some of it."""
    words = "import torch; print(torch.cuda.get_device_properties(0).total_memory)"
    return int(subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True).stdout)


def _parser() -> CommandLine:
    parser = CommandLine(prog="python -m benchmarks.largest", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    add("--seconds", type=positive, default=240, metavar="S", help="after which nothing more is tried")
    add("--tiny", action="store_true", help="small models within a budget of bytes, to try it on a CPU")
    return parser


if __name__ == "__main__":
    run_program(main)
