"""What a spec must have, and the values of one in the making lack."""

from collections.abc import Iterator, Mapping
from typing import Any

from scaling.spec.foreign.values import has

_REQUIRED = {
    "name": "the run's folder is runs/NAME",
    "model": "its kind and sizes; those of the recipes lie in scaling/recipes",
    "data": "what is trained on, and `data.sequence_length`; docs/recipes.md has examples",
    "optimizer.lr": "the peak learning rate",
}
_WITHIN = {
    "model": (
        *("kind", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        "max_position_embeddings",
    ),
    "data": ("kind", "train", "sequence_length"),
    "validation": ("interval", "batches"),
    "schedule": ("kind",),
    "tracking.wandb": ("project",),
}
"""What each of these sections must have where it is there at all."""


def missing(values: Mapping[str, Any]) -> Iterator[str]:
    """A line for each field that a spec must have and that `values` lack."""
    for path, hint in _REQUIRED.items():
        if not has(values, path):
            yield f"`{path}` must still be filled in: {hint}"
    for section, names in _WITHIN.items():
        for name in names if has(values, section) else ():
            if not has(values, f"{section}.{name}"):
                yield f"`{section}.{name}` must still be filled in: the file does not say it"
    whole = has(values, "batch.global_batch_size") or has(values, "batch.global_batch_tokens")
    if not whole and not has(values, "batch.micro_batch_size"):
        other = "" if has(values, "batch.gradient_accumulation_steps") else "; or `batch.global_batch_size`"
        yield f"`batch.micro_batch_size` must still be filled in: sequences per forward pass on one rank{other}"
    elif not whole and not has(values, "batch.gradient_accumulation_steps"):
        yield "`batch.gradient_accumulation_steps` must still be filled in: or `batch.global_batch_size`"
    if not has(values, "max_steps") and not has(values, "epochs"):
        yield "`max_steps` must still be filled in: optimizer steps to train; or `epochs`"
