"""Writes the folder of a job: the shape, the samples in their order, and the weights in the words of each peer."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.peers.common import HUGGINGFACE, JOB, OWN_WEIGHTS, SPEC, TOKENS
from scaling.checkpoint.huggingface import CONFIG, family, layout, render_config
from scaling.data.order import sample_indices
from scaling.models.build import model_recipe
from scaling.spec import load_spec
from scaling.spec.sections import Decoder

STREAM = "stream.npy"
SEED = 1337


@dataclass(frozen=True)
class Shape:
    """A model, and how it is trained."""

    model: dict[str, Any]
    sequence: int
    micro_batch: int
    accumulation: int
    samples: int
    """Sequences in the data; a run that is longer reads them again."""
    bf16: bool = False
    compile: bool = False


def _gpt2(vocabulary: int, width: int, layers: int, heads: int, positions: int) -> dict[str, Any]:
    return {
        "kind": "decoder",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": positions,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "activation": "gelu_new",
        "position": "learned",
        "bias": True,
        "tie_word_embeddings": True,
    }


def _llama(vocabulary: int, width: int, inner: int, layers: int, heads: int, groups: int, positions: int) -> Any:
    return {
        "kind": "decoder",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": positions,
        "norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


SHAPES = {
    # GPT-2's own size, for GPUs.
    "gpt2-124m": Shape(_gpt2(50304, 768, 12, 12, 1024), 1024, 16, 2, 4096, bf16=True, compile=True),
    "llama-160m": Shape(_llama(32000, 768, 2048, 12, 12, 4, 2048), 2048, 8, 2, 2048, bf16=True, compile=True),
    # Their shapes at a size that two cores train: steps of some tenths of a second.
    "gpt2-small": Shape(_gpt2(4096, 256, 4, 8, 256), 128, 1, 2, 4096),
    "llama-small": Shape(_llama(4096, 256, 704, 4, 8, 2, 256), 128, 1, 2, 4096),
    "gpt2-tiny": Shape(_gpt2(256, 64, 2, 2, 64), 32, 2, 2, 1024),
    "llama-tiny": Shape(_llama(256, 64, 176, 2, 4, 2, 64), 32, 2, 2, 1024),
}


def write_job(folder: Path, shape: Shape, ranks: int) -> int:
    """Fill `folder`; returns the tokens of a step."""
    folder.mkdir(parents=True)
    batch = shape.micro_batch * shape.accumulation * ranks
    random = np.random.default_rng(SEED)
    # Few of the ids come often, as in text.
    drawn = random.zipf(1.3, shape.samples * shape.sequence + 1) - 1
    stream = (drawn % shape.model["vocab_size"]).astype(np.uint16)
    np.save(folder / STREAM, stream)
    starts = sample_indices(0, shape.samples, shape.samples, SEED)
    ordered = np.stack([stream[at * shape.sequence : (at + 1) * shape.sequence + 1] for at in starts.tolist()])
    np.save(folder / TOKENS, ordered)
    (folder / SPEC).write_text(_as_written(_spec(folder, shape, ranks, batch)))
    _write_weights(folder, folder / SPEC)
    spec = load_spec(str(folder / SPEC))
    adam, model = spec.optimizer, spec.model
    assert isinstance(model, Decoder)
    groups = model.num_key_value_heads or model.num_attention_heads
    job = {
        "shape": {
            **model.model_dump(mode="json"),
            "num_key_value_heads": groups,
            "model_type": family(model),
        },
        "sequence": shape.sequence,
        "micro_batch": shape.micro_batch,
        "accumulation": shape.accumulation,
        "lr": adam.lr,
        "betas": adam.betas,
        "eps": adam.eps,
        "weight_decay": adam.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "bf16": shape.bf16,
        "compile": shape.compile,
    }
    (folder / JOB).write_text(json.dumps(job, indent=1))
    return batch * shape.sequence


def _spec(folder: Path, shape: Shape, ranks: int, batch: int) -> dict[str, Any]:
    """What a user of this toolkit writes for the job."""
    data = {"kind": "tokens", "train": [str(folder / STREAM)], "validation": 0, "sequence_length": shape.sequence}
    return {
        "name": "peers",
        "seed": SEED,
        "model": shape.model,
        "data": data,
        "batch": {
            "global_batch_size": batch,
            "micro_batch_size": shape.micro_batch,
            "gradient_accumulation_steps": shape.accumulation,
        },
        "optimizer": {"kind": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "decay": "matrices"},
        "schedule": {"kind": "constant"},
        "precision": "bf16" if shape.bf16 else "fp32",
        "backend": {"kind": "single" if ranks == 1 else "ddp"},
        "compile": shape.compile,
        "max_steps": 10,
        "max_grad_norm": 1.0,
        "checkpoint": None,
    }


def _as_written(spec: dict[str, Any]) -> str:
    """A line for each section, as the README's."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(part)}" for name, part in spec.items())
    return f"{{\n{lines}\n}}\n"


def _write_weights(folder: Path, spec_path: Path) -> None:
    """The initial values that the spec gives: under this project's names, and as a folder of transformers."""
    spec = load_spec(str(spec_path))
    assert isinstance(spec.model, Decoder)
    recipe, kind = model_recipe(spec), family(spec.model)
    own = layout(spec.model, "own")
    theirs = layout(spec.model, "gpt2" if kind == "gpt2" else "llama")
    assert kind is not None and own is not None and theirs is not None, "transformers has no such model"
    values = {p.name: recipe.initial_value(p.name, torch.Size(p.shape)) for stored in own for p in stored.members}
    save_file(values, folder / OWN_WEIGHTS)
    found: dict[str, torch.Tensor] = {}
    for stored in theirs:
        value = torch.cat([values[part.name] for part in stored.members])
        found[stored.name] = (value.t() if stored.transposed else value).contiguous()
    (folder / HUGGINGFACE).mkdir()
    save_file(found, folder / HUGGINGFACE / "model.safetensors", metadata={"format": "pt"})
    config = render_config(spec.model, kind, "float32", None)
    (folder / HUGGINGFACE / CONFIG).write_text(json.dumps(config, indent=1))
