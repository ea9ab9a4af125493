"""The planner against training runs that others measured and published (benchmarks/published/runs.csv).

    python -m benchmarks.published --out benchmarks/results/published.json

Memory: each run becomes a spec and a cluster, and its step is played as its own code has it where that differs from
this project's (other_code.py). What its `mem_metric` counted is predicted, and whether it fits, which all of them did.
No constant was fitted so that a prediction comes out right, but the form of what is played was chosen with the rows in
view. ROOM is the quotient of two counters of the rows ROOM_FROM; FRAGMENTS_HIGH (memory.py) was lowered with the rows
FITS_FROM in view. Neither are scored.

Time: tokens a second and GPU are predicted. Three constants were fitted: SUSTAINED (rates.py), OVERLAP_COST
(strategies.py) and FOUNDRY_ATTENTION_FLOPS (here), to the least mean of |log(predicted / published)|, where more than
0.15 counts as 0.15 so that a few rows far off do not decide. They were fitted on the rows FITTED_ON, which `is_fitted`
picks by a hash of their names; those are reported apart and never scored.

Exit code 0 where the scored rows of grade A are within 5 % in memory at the median, every run is said to fit or not as
it did, and in time they are within 10 % at the median and 25 % at the 90th percentile.
"""

import argparse
import csv
import hashlib
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import other_code
from scaling.batch import resolve_batch
from scaling.estimate.memory import MemoryModel
from scaling.estimate.results import MemoryEstimate, TimeEstimate
from scaling.estimate.search import usable_bytes
from scaling.estimate.step import OWN, Cast
from scaling.estimate.time import estimate_time
from scaling.groups import resolve_groups
from scaling.hardware import Cluster, find_gpu
from scaling.inventory import parameters
from scaling.render import render
from scaling.spec.sections import Spec
from scaling.units import GiB

ROWS = Path(__file__).parent / "published" / "runs.csv"
MEDIAN, NINETIETH = 0.10, 0.25
FITTED_ON = (
    *("gt0064", "gt0067", "gt0070", "gt0182", "gt0187", "gt0188", "gt0191", "gt0195", "gt0210", "gt0215", "gt0216"),
    *("gt0220", "gt0230", "gt0243", "gt1302", "gt1312", "gt1313", "gt1314", "gt1315", "gt1316", "gt1317"),
)
"""Rows of grade A that `is_fitted` picks."""
FOUNDRY_ATTENTION_FLOPS = 200e12
"""Attention's rate in llm-foundry's tables of 2023 on an H100, whose kernel is older than the one that torch has now
(370e12). Fitted."""
NODE = 8
"""GPUs of a node, in all of these runs."""


@dataclass(frozen=True)
class Run:
    """A published run as this project would do it."""

    row: dict[str, str]
    specs: tuple[Spec, ...]
    """One, or several between which the run lies: the mean of their times is the prediction."""
    cluster: Cluster
    world_size: int
    cast: Cast = OWN
    """Whose code its memory is of."""
    timed: bool = True
    """Whether its speed is that of what the spec says."""

    @property
    def fitted(self) -> bool:
        return is_fitted(self.row["id"])

    @property
    def published(self) -> float | None:
        """Tokens a second and GPU."""
        return float(self.row["tok_s_gpu"]) if self.timed and self.row["tok_s_gpu"] else None


def is_fitted(identity: str) -> bool:
    """Whether the constants were fitted with this row: one in eight, by the hash of its name."""
    return hashlib.sha256(identity.encode()).digest()[0] % 8 == 0


def load_runs(path: Path = ROWS) -> list[Run]:
    """All rows that can be written as a spec of this project."""
    with path.open(newline="", encoding="utf-8") as file:
        return [run for row in csv.DictReader(file) if (run := as_run(row)) is not None]


# ---------------------------------------------------------------- a row as a spec


def as_run(row: dict[str, str]) -> Run | None:
    """None where the run does what no spec can say: fp8, LoRA, another optimizer, another model."""
    makers = {
        "mosaicml/llm-foundry": _foundry,
        "pytorch/torchtitan": _titan,
        "HF ultrascale-playbook": _playbook,
        "meta-pytorch/torchtune": _torchtune,
        "InternLM/InternEvo": _internevo,
        "deepspeedai/DeepSpeedExamples": _examples,
    }
    # Optimizer in backward changes what is held and moved, as do 8-bit states; the A800 is not in the table of GPUs.
    odd = ("8-bit" in row["optimizer"], "optimizer-in-backward" in row["notes"], "fp8" in row["precision"])
    if row["source"] not in makers or row["peft"] or row["offload"] or any(odd) or row["gpu"].startswith("A800"):
        return None
    return makers[row["source"]](row)


def _foundry(row: dict[str, str]) -> Run:
    """MPT: GPT-2's block with biases, a tied head, plain cross-entropy; FSDP1, not compiled, fp32 reductions."""
    model = {
        "norm": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "tie_word_embeddings": True,
    }
    backend = {"kind": "fsdp", "reshard_after_forward": "SHARD_GRAD_OP" not in row["strategy"]}
    gpu = replace(find_gpu("H100-80GB"), attention_flops=FOUNDRY_ATTENTION_FLOPS)
    return _run(row, model, backend, Cluster(_nodes(row), NODE, gpu), other_code.FOUNDRY)


def _titan(row: dict[str, str]) -> Run:
    """Llama 3 with FSDP2. Its "selective-op" computes every second matrix product again: between selective and full."""
    backend = {"kind": "fsdp", "reshard_after_forward": "never" not in row["strategy"]}
    modes = ("selective", "full") if row["act_ckpt"] == "selective-op" else (row["act_ckpt"],)
    cluster = Cluster(_nodes(row), NODE, find_gpu("H100-96GB"))
    cast = other_code.TITAN_CHUNKED if "chunked" in row["notes"] else other_code.TITAN
    return _run(row, {}, backend, cluster, cast, modes=modes)


def _playbook(row: dict[str, str]) -> Run:
    """nanotron's Llama with a tied head."""
    backend = {"kind": "ddp"} if row["strategy"] == "DDP" else {"kind": "deepspeed", "zero_stage": 1}
    cluster = Cluster(_nodes(row), NODE, find_gpu("H100-80GB"))
    return _run(row, {"tie_word_embeddings": True}, backend, cluster, other_code.NANOTRON[row["strategy"]])


def _torchtune(row: dict[str, str]) -> Run:
    """Llama 3.2 with a tied head on one GPU. All of its states are bf16, ours fp32: a few percent of the time."""
    # A ladder: from the third step on the loss is cut.
    chunked = row["id"] in ("gt0401", "gt0402")
    cast = other_code.TUNE_CHUNKED if chunked else other_code.TUNE
    return _run(row, {"tie_word_embeddings": True}, {"kind": "single"}, Cluster(1, 1, find_gpu("A100-80GB")), cast)


def _internevo(row: dict[str, str]) -> Run | None:
    """InternLM 7B, whose shape the table leaves out."""
    if not row["tok_s_gpu"] or row["model"] != "InternLM-7B":
        return None
    shape = {"hidden": "4096", "layers": "32", "heads": "32", "kv_heads": "32", "ffn": "11008", "vocab": "103168"}
    gpu = replace(find_gpu("A100-80GB"), network_bytes_per_s=6.25e9)
    cluster = Cluster(_nodes(row), NODE, gpu)
    cast = other_code.INTERNEVO_BY_NODE if "zero1=8" in row["strategy"] else other_code.INTERNEVO
    return _run(row | shape, {"qkv_bias": True}, {"kind": "deepspeed", "zero_stage": 1}, cluster, cast)


def _examples(row: dict[str, str]) -> Run:
    """A GPT that normalises after and not before, and whose attention makes its weights: nothing at 512 tokens, where
    the update is the peak, but not as fast as ours. What it sets of DeepSpeed is in its notes."""
    model = {"norm": "layernorm", "activation": "gelu", "position": "learned", "bias": True}
    sizes = {"reduce_bucket_size": 50_000_000, "param_persistence_threshold": 0}
    backend = {"kind": "deepspeed", "zero_stage": 3, **sizes}
    run = _run(row, model, backend, Cluster(1, int(row["n_gpus"]), find_gpu("H100-80GB")), other_code.EXAMPLES)
    return replace(run, timed=False)


def _nodes(row: dict[str, str]) -> int:
    return max(1, int(row["n_gpus"]) // NODE)


def _run(
    row: dict[str, str],
    model: dict[str, Any],
    backend: dict[str, Any],
    cluster: Cluster,
    cast: Cast,
    *,
    modes: Sequence[str] = (),
) -> Run:
    """The cross-entropy is plain in all of them: where a run cut it, then into some eight chunks, which take as long as
    a plain one; ours are smaller, and take longer."""
    length, world_size = int(row["seq_len"]), int(row["n_gpus"])
    document: dict[str, Any] = {
        "name": row["id"],
        "model": {
            "kind": "decoder",
            "vocab_size": int(row["vocab"]),
            "hidden_size": int(row["hidden"]),
            "intermediate_size": int(row["ffn"]),
            "num_hidden_layers": int(row["layers"]),
            "num_attention_heads": int(row["heads"]),
            "num_key_value_heads": int(row["kv_heads"]),
            "max_position_embeddings": length,
            **model,
        },
        "objective": {"kind": "causal_lm", "cross_entropy": "plain"},
        "data": {"kind": "synthetic", "sequence_length": length},
        "batch": {
            "micro_batch_size": int(row["micro_batch"]),
            "gradient_accumulation_steps": int(row["grad_accum"] or 1),
        },
        "optimizer": {"lr": 1e-4},
        "backend": backend,
        "compile": row["compile"] == "yes",
        "max_steps": 1,
    }
    specs = tuple(
        Spec.model_validate(document | {"activation_checkpointing": mode}) for mode in modes or (row["act_ckpt"],)
    )
    return Run(row, specs, cluster, world_size, cast)


# ---------------------------------------------------------------- memory

COUNTERS: dict[str, str | None] = {
    "max_reserved": "reserved",
    "max_active": "allocated",
    "peak active": "allocated",
    "max allocated": "allocated",
    "allocated (inferred; printed GB = /1024^3)": "allocated",
    "allocated (steady)": None,
}
"""What a row's `mem_metric` counts at the peak; None: something between two steps. Active memory is what is allocated,
and what waits for another stream to end."""
ROOM = 1.195
"""Reserved over allocated where memory is not short, as in all rows that say what was reserved: torchtitan's own pairs,
1.204 and 1.187, of the rows ROOM_FROM. The planner's FRAGMENTS are for a card that is nearly full."""
ROOM_FROM = ("gt0063", "gt0091")
FITS_FROM = ("gt0194", "gt0217")
"""With the planner's FRAGMENTS_HIGH as first guessed, 1.12, these two were said not to fit."""
MEMORY_MEDIAN = 0.05


def predict_memory(run: Run) -> MemoryEstimate:
    """Of the first spec, played as the run's own code has it."""
    spec = run.specs[0]
    plan = resolve_batch(spec, run.world_size)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    rendered = render(spec, run.world_size)
    return MemoryModel(spec, groups, rendered, plan, run.cluster.gpu, cast=run.cast).at(
        plan.micro_batch, plan.accumulation
    )


def compare_memory(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """For each run, what its counter is predicted to say and the error, and whether it is said to fit. GiB."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        row, estimate, usable = run.row, predict_memory(run), usable_bytes(run.cluster, 0.0)
        assert usable is not None
        found: dict[str, Any] = {
            "id": row["id"],
            "source": row["source"],
            "what": _what(row),
            "grade": row["grade"],
            "fitted": row["id"] in (*ROOM_FROM, *FITS_FROM),
            "fitted_on_the_card": row["status"] == "ok",
            "said_to_fit": estimate.high_bytes <= usable,
            "needs": estimate.high_bytes / GiB,
            "usable": usable / GiB,
            "allocated": estimate.peak_allocated_bytes / GiB,
            "phase": estimate.peak_phase,
            "parts": {name: size / GiB for name, size in estimate.parts.items()},
        }
        for published, metric, error in (
            ("mem_peak_GiB", "mem_metric", "error"),
            ("mem2_GiB", "mem2_metric", "error2"),
        ):
            counter = COUNTERS[row[metric]] if row[published] else None
            if counter is not None:
                predicted = found["allocated"] * (ROOM if counter == "reserved" else 1.0)
                found |= {published: float(row[published]), f"{error}_of": counter}
                found[error] = predicted / float(row[published]) - 1
        rows.append(found)
    return rows


def memory_summaries(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Errors of rows with a figure, by grade and by source; and how many of each source are said rightly to fit."""
    measured = [row for row in rows if "error" in row]
    scored = [row for row in measured if not row["fitted"]]
    found = {"memory, fitted": summary([row for row in measured if row["fitted"]])}
    for grade in sorted({row["grade"] for row in scored}):
        part = [row for row in scored if row["grade"] == grade]
        found[f"memory, scored, grade {grade}"] = summary(part)
        for source in sorted({row["source"] for row in part}):
            found[f"memory, scored, grade {grade}, {source}"] = summary(
                [row for row in part if row["source"] == source]
            )
    return found


def wrongly_said(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that fitted and are said not to, or the other way round."""
    return [row for row in rows if row["said_to_fit"] != row["fitted_on_the_card"]]


# ---------------------------------------------------------------- time


def predict_time(run: Run) -> TimeEstimate:
    """The mean over the run's specs."""
    found = [_estimate(run, spec) for spec in run.specs]
    seconds = statistics.mean(one.step_seconds for one in found)
    first = found[0]
    scale = first.step_seconds / seconds
    parts = {name: statistics.mean(one.parts[name] for one in found) for name in first.parts}
    mfu = None if first.mfu is None else first.mfu * scale
    return TimeEstimate(seconds, first.tokens_per_second_per_gpu * scale, mfu, parts)


def _estimate(run: Run, spec: Spec) -> TimeEstimate:
    plan = resolve_batch(spec, run.world_size)
    groups = resolve_groups(spec.param_groups, spec.optimizer, parameters(spec.model, spec.lora))
    return estimate_time(spec, plan, groups, render(spec, run.world_size), run.cluster)


def compare(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """For each run with a published speed, prediction and error: predicted over published, less one."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        if run.published is None:
            continue
        estimate = predict_time(run)
        row = run.row
        rows.append(
            {
                "id": row["id"],
                "source": row["source"],
                "what": _what(row),
                "grade": row["grade"],
                "hardware": run.cluster.gpu.name,
                "fitted": run.fitted,
                "published": run.published,
                "predicted": estimate.tokens_per_second_per_gpu,
                "error": estimate.tokens_per_second_per_gpu / run.published - 1,
                "mfu": estimate.mfu,
                "parts": estimate.parts,
            }
        )
    return rows


def _what(row: dict[str, str]) -> str:
    batch = f"{row['seq_len']} x {row['micro_batch']} x {row['grad_accum'] or 1}"
    return f"{row['model']} {row['strategy']} {row['n_gpus']} GPUs, {batch}, checkpointing {row['act_ckpt']}"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Number, median, 90th percentile and worst of the errors' sizes."""
    sizes = sorted(abs(row["error"]) for row in rows)
    if not sizes:
        return {"rows": 0}
    ninetieth = sizes[-(-9 * len(sizes) // 10) - 1]
    worst = max(rows, key=lambda row: abs(row["error"]))
    return {
        "rows": len(sizes),
        "median": statistics.median(sizes),
        "p90": ninetieth,
        "worst": sizes[-1],
        "worst_id": worst["id"],
        "bias": statistics.median(row["error"] for row in rows),
    }


def summaries(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Fitted rows of grade A; the scored ones by grade, and by hardware and source."""
    scored = [row for row in rows if not row["fitted"]]
    found = {"fitted, grade A": summary([row for row in rows if row["fitted"] and row["grade"] == "A"])}
    for grade in sorted({row["grade"] for row in scored}):
        part = [row for row in scored if row["grade"] == grade]
        found[f"scored, grade {grade}"] = summary(part)
        for pair in sorted({(row["hardware"], row["source"]) for row in part}):
            own = [row for row in part if (row["hardware"], row["source"]) == pair]
            found[f"scored, grade {grade}, {pair[0]}, {pair[1]}"] = summary(own)
    return found


def main() -> int:
    options = _parser().parse_args()
    runs = load_runs()
    rows = compare(runs)
    for row in sorted(rows, key=lambda row: (row["grade"], row["hardware"], row["id"])):
        mark = "fitted" if row["fitted"] else ""
        print(
            f"{row['id']} {row['grade']} {row['hardware']:<10} {row['predicted']:>8.0f} {row['published']:>8.0f} "
            f"{row['error']:>+7.1%} {mark:<6} {row['what']}"
        )
    found = summaries(rows)
    print_summaries(found)
    memory = compare_memory(runs)
    print_memory(memory)
    if options.out:
        held = {"summary": memory_summaries(memory), "rows": memory}
        document = {"summary": found, "rows": rows, "memory": held}
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    scored, kept = found["scored, grade A"], memory_summaries(memory)["memory, scored, grade A"]
    fine = kept["median"] <= MEMORY_MEDIAN and not wrongly_said(memory)
    return 0 if fine and scored["median"] <= MEDIAN and scored["p90"] <= NINETIETH else 1


def print_memory(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with a figure, the summaries, and runs that are wrongly said to fit or not to."""
    for row in rows:
        if "error" in row:
            mark = "fitted" if row["fitted"] else ""
            print(
                f"{row['id']} {row['grade']} {row['error_of']:<9} {row['mem_peak_GiB'] * (1 + row['error']):>6.1f} "
                f"{row['mem_peak_GiB']:>6.1f} GiB {row['error']:>+6.1%} {mark:<6} {row['what']}"
            )
    print_summaries(memory_summaries(rows))
    wrong, scored = wrongly_said(rows), [row for row in rows if not row["fitted"]]
    print(f"said to fit or not as they did: {len(scored) - len(wrongly_said(scored))} of {len(scored)} scored runs")
    for row in wrong:
        print(f"{row['id']} {row['source']}: needs {row['needs']:.1f} GiB of {row['usable']:.1f}: {row['what']}")


def print_summaries(found: dict[str, dict[str, Any]]) -> None:
    """One line each."""
    for name, part in found.items():
        if part["rows"]:
            print(
                f"{name:<60} {part['rows']:>3} rows  median {part['median']:.1%}  p90 {part['p90']:.1%}  "
                f"worst {part['worst']:.1%} ({part['worst_id']})  bias {part['bias']:+.1%}"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.published", description=__doc__)
    parser.add_argument("--out", metavar="FILE", help="write rows and summaries as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
