"""The adapters of a LoRA checkpoint: added to the weights, left out, or written as peft's own files.

peft has one adapter for each tensor of the model's files. GPT-2 keeps queries, keys and values in one: there the
adapters of the three become one: its lora_A has the rows of all, one below the other, its lora_B a block for each.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scaling.checkpoint.huggingface import Stored
from scaling.checkpoint.safetensors import write_file
from scaling.checkpoint.store import write_synced
from scaling.checkpoint.weights import CheckpointWeights, WeightSource
from scaling.inventory import ADAPTERS, adapted_layers, is_adapter
from scaling.spec.sections import Lora

ADAPTER_CONFIG, ADAPTER_MODEL = "adapter_config.json", "adapter_model.safetensors"
"""peft's names (peft/utils/constants.py)."""


class BaseWeights:
    """The weights of a LoRA checkpoint without its adapters."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self._weights = weights
        self._names = [name for name in weights.names() if not is_adapter(name)]

    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def read(self, name: str, start: int, count: int) -> Tensor:
        return self._weights.read(name, start, count)

    def close(self) -> None:
        self._weights.close()


class MergedWeights(BaseWeights):
    """The weights with what the adapters add: weight + lora_B @ lora_A * alpha / rank, in fp32 as peft merges."""

    def __init__(self, weights: CheckpointWeights, lora: Lora) -> None:
        super().__init__(weights)
        self._scaling = lora.alpha / lora.rank
        self._layers = adapted_layers(weights.model, lora)

    def read(self, name: str, start: int, count: int) -> Tensor:
        found = super().read(name, start, count)
        module, _, kind = name.rpartition(".")
        if kind != "weight" or module not in self._layers or not count:
            return found
        columns = self.shape(name)[1]
        first, last = start // columns, -(-(start + count) // columns)
        down, up = (_whole(self._weights, f"{module}.{part}.weight") for part in ADAPTERS)
        # Of a weight that lies [inputs, outputs] the rows are the inputs.
        added = (up @ down[:, first:last]).T.contiguous() if self._layers[module] else up[first:last] @ down
        skipped = start - first * columns
        return found + (added * self._scaling).view(-1)[skipped : skipped + count]


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter of one tensor of the model's files."""

    module: str
    """The module that has the tensor."""
    members: tuple[tuple[str, int], ...]
    """Our modules whose adapters it is made of, each with its first row in the tensor."""
    inputs: int
    outputs: int


def stored_adapters(stored: Sequence[Stored], adapted: Mapping[str, bool]) -> list[StoredAdapter]:
    """Of the tensors of `stored` that are of our modules `adapted`, in order; true where ours has them transposed."""
    found: list[StoredAdapter] = []
    for tensor in stored:
        row, members = 0, []
        for member in tensor.members:
            module, _, kind = member.name.rpartition(".")
            if kind == "weight" and module in adapted:
                members.append((module, row))
            row += member.shape[0]
        if members:
            turned = adapted[members[0][0]]
            inputs, outputs = tensor.shape if turned else (tensor.members[0].shape[1], row)
            found.append(StoredAdapter(tensor.name.rpartition(".")[0], tuple(members), inputs, outputs))
    return found


def write_adapters(
    weights: CheckpointWeights,
    lora: Lora,
    stored: Sequence[Stored],
    family: str | None,
    folder: Path,
    dtype: torch.dtype,
) -> tuple[int, int]:
    """Write peft's files for a model whose files have the tensors `stored`; returns tensors and their bytes."""
    adapted = adapted_layers(weights.model, lora)
    adapters = stored_adapters(stored, adapted)
    turned = family == "gpt2" or any(adapted.values())
    shapes: list[tuple[str, tuple[int, ...]]] = []
    read: dict[str, Callable[[], Tensor]] = {}
    for adapter in adapters:
        rank = lora.rank * len(adapter.members)
        for part, shape, values in (
            ("lora_A", (rank, adapter.inputs), partial(_downward, weights, adapter)),
            ("lora_B", (adapter.outputs, rank), partial(_upward, weights, adapter, lora.rank)),
        ):
            name = f"base_model.model.{adapter.module}.{part}.weight"
            shapes.append((name, shape))
            read[name] = values

    def parts(name: str) -> Iterator[Callable[[], Tensor]]:
        yield read[name]

    sizes: list[int] = []
    write_file(folder / ADAPTER_MODEL, shapes, dtype, parts, sizes.append)
    write_synced(folder / ADAPTER_CONFIG, json.dumps(_config(lora, adapters, family, turned), indent=2) + "\n")
    return len(shapes), sum(sizes)


def _config(lora: Lora, adapters: Sequence[StoredAdapter], family: str | None, turned: bool) -> dict[str, Any]:
    """What peft's LoraConfig reads; what is absent has its defaults, in its version 0.21 those of plain LoRA.

    `turned`: weights are [inputs, outputs] there, as Conv1D's are.
    """
    joined = {_target(adapter): len(adapter.members) for adapter in adapters}
    most = {name: count for name, count in joined.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if family else None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(joined),
        # Joined adapters have the ranks of all, and are scaled as each.
        "rank_pattern": {name: lora.rank * count for name, count in most.items()},
        "alpha_pattern": {name: lora.alpha * count for name, count in most.items()},
        "bias": "none",
        "fan_in_fan_out": turned,
    }


def _target(adapter: StoredAdapter) -> str:
    """What peft finds the module by: the end of its path, which in GPT-2 alone is not the last name (c_proj)."""
    return ".".join(adapter.module.split(".")[-2:])


def _downward(weights: WeightSource, adapter: StoredAdapter) -> Tensor:
    return torch.cat([_whole(weights, f"{module}.lora_A.weight") for module, _ in adapter.members])


def _upward(weights: WeightSource, adapter: StoredAdapter, rank: int) -> Tensor:
    found = torch.zeros(adapter.outputs, rank * len(adapter.members))
    for index, (module, row) in enumerate(adapter.members):
        block = _whole(weights, f"{module}.lora_B.weight")
        found[row : row + len(block), index * rank : (index + 1) * rank] = block
    return found


def _whole(weights: WeightSource, name: str) -> Tensor:
    rows, columns = weights.shape(name)
    return weights.read(name, 0, rows * columns).view(rows, columns)
