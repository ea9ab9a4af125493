"""The ledger of scaling/estimate against live tensors, over configurations drawn by a seeded generator.

    python -m benchmarks.ledger --decoders 210 --lora 0.25 --vlas 75 --seed 7 --out benchmarks/results/ledger-cpu.json

Each configuration is rehearsed on this CPU (rank 0 of its ranks, a few steps for real, live bytes counted) and played
by the ledger. Exit code 0 where the peak is within 1 % at the median and 3 % at worst, and no part of it is off by more
than 5 % of the peak.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scaling import parity
from scaling.rehearse import rehearse_all
from scaling.run_folder import environment
from scaling.trace import STEPS, STEPS_3

TOLD = ("rollout", "forward", "backward", "optimizer")
"""Phases that rows tell the error of, too."""
MEDIAN, WORST, PART = 0.01, 0.03, 0.05
BACKENDS: dict[str, dict[str, Any]] = {
    **{name: parity.BACKENDS[name] for name in ("single", "ddp", "fsdp", "fsdp-keep", "hsdp", "zero1", "zero2")},
    "zero1-small": {"kind": "deepspeed", "zero_stage": 1, "reduce_bucket_size": 20_000},
    "zero2-small": {"kind": "deepspeed", "zero_stage": 2, "reduce_bucket_size": 20_000},
    "zero3": {"kind": "deepspeed", "zero_stage": 3, "reduce_bucket_size": 200_000},
    "zero3-replicate": {
        "kind": "deepspeed",
        "zero_stage": 3,
        "frozen": "replicate",
        "reduce_bucket_size": 50_000,
        "param_persistence_threshold": 300,
    },
    "zero3-small": {
        "kind": "deepspeed",
        "zero_stage": 3,
        "reduce_bucket_size": 20_000,
        "prefetch_bucket_size": 10_000,
        "param_persistence_threshold": 300,
        "max_live_parameters": 100_000,
        "max_reuse_distance": 50_000,
        "sub_group_size": 100_000,
    },
    "fsdp-replicate": parity.BACKENDS["fsdp-replicate"],
    "fsdp-offload": {"kind": "fsdp", "cpu_offload": True},
    "zero1-offload": {"kind": "deepspeed", "zero_stage": 1, "reduce_bucket_size": 50_000, "offload_optimizer": "cpu"},
    "zero2-offload": {"kind": "deepspeed", "zero_stage": 2, "reduce_bucket_size": 50_000, "offload_optimizer": "cpu"},
    "zero3-offload": {
        "kind": "deepspeed",
        "zero_stage": 3,
        "reduce_bucket_size": 50_000,
        "param_persistence_threshold": 300,
        "offload_optimizer": "cpu",
        "offload_parameters": "cpu",
    },
}

FROZEN_WHOLE = ("fsdp-replicate", "zero3-replicate")
"""Drawn where `--backends` names them: as the others where nothing is frozen."""


def main() -> int:
    options = _parser().parse_args()
    backends = options.backends.split(",")
    with tempfile.TemporaryDirectory() as folder:
        cells = [
            *draw(options.decoders, options.seed, backends, Path(folder), lora=options.lora),
            *draw(options.vlas, options.seed, backends, Path(folder), "vla", first=options.decoders),
        ]
        shares = [cells[first :: options.jobs] for first in range(options.jobs)]
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = [row for found in pool.map(_compare, shares) for row in found]
    rows.sort(key=lambda row: int(row["name"].partition(" ")[0]))
    result = summary(rows)
    print(json.dumps(result))
    if options.out:
        document = {
            **{name: getattr(options, name) for name in ("seed", "decoders", "lora", "vlas")},
            "environment": environment(1, "cpu"),
            **result,
            "rows": rows,
        }
        Path(options.out).write_text(json.dumps(document, indent=1) + "\n")
    return 0 if result["good"] else 1


def _compare(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for row in compare(cells):
        told = row["error"] if "error" in row else f"{row['off']:+.3%}  worst part {row['worst_part']:.3%}"
        print(f"{told}  {row['name']}", flush=True)
        rows.append(row)
    return rows


def compare(cells: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each cell, how far the played peak is from the counted one, and each of its parts from its own."""
    for report in rehearse_all(cells, STEPS, preload=["peft"] if any("lora" in cell["name"] for cell in cells) else []):
        cell = report["cell"]
        row: dict[str, Any] = {"name": cell["name"], "world_size": cell["world_size"]}
        if "error" in report:
            yield {**row, "error": report["error"]}
            continue
        played, real = report["predicted"], report["memory"]
        counted = real["peak_allocated_bytes"]
        parts = {
            part: (played["parts"].get(part, 0) - real["parts"].get(part, 0)) / counted
            for part in sorted({*played["parts"], *real["parts"]})
        }
        yield {
            **row,
            "played": played["peak_allocated_bytes"],
            "counted": counted,
            "off": played["peak_allocated_bytes"] / counted - 1,
            "phases": [played["peak_phase"], real["peak_phase"]],
            "by_phase": {
                name: played["phases"][name] / size - 1 for name, size in real["phases"].items() if name in TOLD
            },
            "parts": parts,
            "worst_part": max(map(abs, parts.values())),
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The errors over all rows."""
    off = [abs(row["off"]) for row in rows if "error" not in row]
    failed = sum("error" in row for row in rows)
    backends = sorted({row["name"].split()[1] for row in rows})
    found = {
        "configurations": len(rows),
        "failed": failed,
        "median": statistics.median(off),
        "worst": max(off),
        "worst_part": max(row["worst_part"] for row in rows if "error" not in row),
        "by_backend": {
            name: max(abs(row["off"]) for row in rows if "off" in row and row["name"].split()[1] == name)
            for name in backends
            if any("off" in row and row["name"].split()[1] == name for row in rows)
        },
    }
    good = not failed and found["median"] <= MEDIAN and found["worst"] <= WORST and found["worst_part"] <= PART
    return {**found, "good": good}


def draw(
    count: int,
    seed: int,
    backends: list[str],
    folder: Path,
    model: str = "decoder",
    *,
    lora: float = 0.0,
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """Configurations of a kind of `model`, numbered from `first`, each with its spec written to `folder`; the backends
    take turns.

    A share of `lora` of the decoders has adapters, which a generator of their own draws: all else is as without.
    """
    chance, chance_of_lora = random.Random(seed), random.Random(f"{seed} lora")
    for number in range(count):
        name = backends[number % len(backends)]
        backend, world_size = dict(BACKENDS[name]), chance.choice([1, 2, 3, 4, 8, 16, 64])
        if name == "single":
            world_size = 1
        if name == "hsdp":
            world_size = chance.choice([2, 4, 8, 64])
        drawn = _vla(chance, world_size) if model == "vla" else _decoder(chance, world_size)
        spec = {"model": drawn.pop("model"), "backend": backend, **drawn}
        if model == "decoder" and lora and chance_of_lora.random() < lora:
            spec["lora"] = _lora(chance_of_lora, spec["model"])
        path = folder / f"{first + number}.json"
        path.write_text(json.dumps(spec))
        told = f"{first + number} {name} x{world_size} " + json.dumps({k: v for k, v in spec.items() if k != "data"})
        steps = STEPS_3 if backend.get("zero_stage") == 3 else STEPS
        yield {"spec": str(path), "world_size": world_size, "set": [], "steps": steps, "name": told}


def _decoder(chance: random.Random, world_size: int) -> dict[str, Any]:
    return {"model": _model(chance), **_rest(chance, world_size)}


def _model(chance: random.Random) -> dict[str, Any]:
    heads, width = chance.choice([2, 4, 8]), chance.choice([16, 32, 48])
    llama = chance.random() < 0.5
    return {
        "kind": "decoder",
        "vocab_size": chance.choice([128, 1000, 4099]),
        "hidden_size": heads * width,
        "intermediate_size": heads * width * chance.choice([2, 4]) + chance.choice([0, 6]),
        "num_hidden_layers": chance.choice([2, 3, 5]),
        "num_attention_heads": heads,
        "num_key_value_heads": chance.choice([1, 2, heads]) if llama else heads,
        "max_position_embeddings": 256,
        "norm": "rmsnorm" if llama else "layernorm",
        "activation": "swiglu" if llama else chance.choice(["gelu", "gelu_new", "relu"]),
        "position": "rope" if llama else "learned",
        "bias": not llama,
        "qk_norm": llama and chance.random() < 0.3,
        "qkv_bias": llama and chance.random() < 0.3,
        "tie_word_embeddings": chance.random() < 0.5,
    }


def _lora(chance: random.Random, model: dict[str, Any]) -> dict[str, Any]:
    """Adapters of at least one layer in attention: drawn groups may freeze all MLPs."""
    gate = ["gate_proj"] if model["activation"] == "swiglu" else []
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", *gate, "up_proj", "down_proj"]
    some = sorted({chance.choice(layers[:4]), *chance.sample(layers, chance.randint(1, len(layers)))})
    return {
        "rank": chance.choice([1, 4, 8, 16, 33]),
        "alpha": chance.choice([8, 16, 32]),
        "dropout": chance.choice([0.0, 0.0, 0.1]),
        "target_modules": chance.choice([["q_proj", "v_proj"], some, some, "all-linear"]),
    }


def _rest(chance: random.Random, world_size: int) -> dict[str, Any]:
    micro, accumulation = chance.choice([1, 2, 4]), chance.choice([1, 1, 2, 3])
    frozen = chance.choice([[], [], ["embed*"], ["layers.0.*"], ["embed*", "layers.0.*"], ["layers.*.mlp.*"]])
    groups = [{"name": "frozen", "match": frozen, "freeze": True}] if frozen else []
    if chance.random() < 0.5:
        groups.append({"name": "attention", "match": ["*.self_attn.*"], "lr": 1e-4})
    return {
        "name": "drawn",
        "objective": {"kind": "causal_lm", "cross_entropy": chance.choice(["chunked", "chunked", "plain"])},
        "data": {"kind": "synthetic", "sequence_length": chance.choice([32, 100, 256])},
        "batch": {"global_batch_size": micro * accumulation * world_size, "micro_batch_size": micro},
        "optimizer": {"lr": 1e-3},
        "param_groups": [*groups, {"name": "rest", "match": ["*"]}],
        "precision": chance.choice(["fp32", "bf16", "bf16"]),
        "activation_checkpointing": chance.choice(["none", "none", "selective", "full"]),
        "max_grad_norm": chance.choice([None, 1.0]),
        "max_steps": 10,
    }


def _vla(chance: random.Random, world_size: int) -> dict[str, Any]:
    """A vla on images of up to 48 pixels, with any of its parts frozen, or pieces of them."""
    patch, text, flow = chance.choice([4, 8]), chance.choice([8, 21, 40]), chance.random() < 0.4
    language = _model(chance) | {"hidden_size": 0, "num_attention_heads": chance.choice([2, 4]), "causal": True}
    language |= {"tie_word_embeddings": False, "max_position_embeddings": 64, "causal": chance.random() < 0.5}
    heads = language["num_attention_heads"]
    language["hidden_size"], language["intermediate_size"] = heads * 32, heads * 32 * chance.choice([2, 4])
    language["num_key_value_heads"] = min(language["num_key_value_heads"], heads) if heads > 2 else heads
    drawn = _rest(chance, world_size)
    vision, language_too = ["vision.*"], ["vision.*", "language.*"]
    frozen = chance.choice([vision, vision, language_too, [], ["language.*"], ["*.layers.0.*"]])
    frozen = chance.choice([frozen, frozen, ["vision.*", "language.*", "fusion.*"], ["fusion.layers.*", "vision.*"]])
    groups = [{"name": "frozen", "match": frozen, "freeze": True}] if frozen else []
    groups.append({"name": "language", "match": ["language.*"], "lr": 1e-5})
    return drawn | {
        "model": {
            "kind": "vla",
            "vision": {
                "image_size": patch * chance.choice([2, 4, 6]),
                "patch_size": patch,
                "views": chance.choice([1, 2, 3]),
                **_tower(chance, [1, 2, 3, 4]),
            },
            "language": language,
            "fusion": _tower(chance, [1, 2, 3]),
            "action": {
                "action_dim": chance.choice([3, 7, 14]),
                "chunk_size": chance.choice([4, 16, 50]),
                "state_dim": chance.choice([1, 8]),
                "head": "velocity" if flow else "direct",
            },
        },
        "objective": {"kind": "behaviour_cloning", "loss": "flow_matching" if flow else "regression"}
        | ({} if flow else {"error": chance.choice(["l1", "mse"])}),
        "data": {"kind": "synthetic", "sequence_length": text},
        "param_groups": [*groups, {"name": "rest", "match": ["*"]}],
    }


def _tower(chance: random.Random, layers: list[int]) -> dict[str, Any]:
    heads = chance.choice([2, 4])
    width = heads * chance.choice([16, 24, 32])
    return {
        "hidden_size": width,
        "intermediate_size": width * chance.choice([2, 4]),
        "num_hidden_layers": chance.choice(layers),
        "num_attention_heads": heads,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=__doc__.splitlines()[0])
    parser.add_argument("--decoders", type=int, default=210, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=7)
    usual = ",".join(name for name in BACKENDS if name not in FROZEN_WHOLE)
    parser.add_argument("--backends", default=usual, help=f"of {','.join(BACKENDS)} (default %(default)s)")
    parser.add_argument("--lora", type=float, default=0.25, help="share of them with adapters (default %(default)s)")
    parser.add_argument("--vlas", type=int, default=75, help="vision-language-action models (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="rehearsals at a time")
    parser.add_argument("--out", metavar="FILE", help="the result, as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
