"""The rendered configs that the repository ships in ds_configs/: each recipe, each strategy, 1, 4 and 8 GPUs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling.render import render
from scaling.spec import load_spec

RECIPES = (
    *("atlas-vla", "atlas-vla-tiny", "gpt-stdlib", "gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1.5b", "gpt2-dolly"),
    *("llama-8b", "minimind-pretrain", "minimind-sft", "minimind-lora", "minimind-dpo", "minimind-ppo"),
)
"""Not those for a CPU."""
GPUS = (1, 4, 8)
STRATEGIES: dict[str, dict[str, Any]] = {
    "zero1": {"kind": "deepspeed", "zero_stage": 1},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero2-offload": {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
    "zero3-offload": {
        "kind": "deepspeed", "zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"
    },
    "fsdp": {"kind": "fsdp"},
}  # fmt: skip


def shipped() -> Iterator[tuple[str, str]]:
    """(path below ds_configs/, text) of each config."""
    for recipe in RECIPES:
        for name, backend in STRATEGIES.items():
            for gpus in GPUS:
                spec = load_spec(recipe, [f"backend={json.dumps(backend)}"])
                yield f"{recipe}/{name}-{gpus}gpu.json", json.dumps(render(spec, gpus), indent=2) + "\n"


def write_shipped(folder: Path) -> Iterator[Path]:
    """Write them all below `folder`; yields each path."""
    for name, text in shipped():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        yield path
