"""From the configurations of others to a spec: DeepSpeed, accelerate, the Trainer, nanoGPT, MiniMind.

Nothing is guessed silently: each key is carried over, listed as harmless with the reason, or named in a note.
"""

from collections.abc import Callable, Mapping
from typing import Any

from scaling.errors import UserError
from scaling.spec.foreign.accelerate import ACCELERATE, read_accelerate
from scaling.spec.foreign.deepspeed import read_deepspeed
from scaling.spec.foreign.deepspeed_keys import DEEPSPEED
from scaling.spec.foreign.draft import Origin
from scaling.spec.foreign.minimind import MINIMIND, read_minimind
from scaling.spec.foreign.nanogpt import read_nanogpt
from scaling.spec.foreign.nanogpt_keys import NANOGPT
from scaling.spec.foreign.trainer import read_trainer
from scaling.spec.foreign.trainer_keys import TRAINER

__all__ = ["ORIGINS", "import_foreign", "recognise"]

_Reader = Callable[[dict[str, Any], int | None], tuple[dict[str, Any], list[str]]]
_READERS: Mapping[str, _Reader] = {
    "deepspeed": read_deepspeed,
    "accelerate": read_accelerate,
    "trainer": read_trainer,
    "nanogpt": read_nanogpt,
    "minimind": read_minimind,
}
ORIGINS: Mapping[str, Origin] = {origin.name: origin for origin in (DEEPSPEED, ACCELERATE, TRAINER, NANOGPT, MINIMIND)}
"""By the name that `--format` has."""
_MARKS: Mapping[str, tuple[str, ...]] = {
    "trainer": (
        "per_device_train_batch_size",
        "num_train_epochs",
        "lr_scheduler_type",
        "adam_epsilon",
        "save_total_limit",
    ),
    "accelerate": ("distributed_type", "deepspeed_config", "fsdp_config", "mixed_precision"),
    "deepspeed": ("zero_optimization", "train_micro_batch_size_per_gpu", "train_batch_size"),
    "nanogpt": ("n_layer", "n_head", "n_embd", "block_size", "max_iters", "total_batch_size"),
    "minimind": ("accumulation_steps", "max_seq_len", "use_moe", "save_weight"),
}
"""Keys that no other origin has at its top; where two have some (fsdp_config), the first in this order is it."""


def recognise(document: Mapping[str, Any]) -> str | None:
    """Name of the origin whose keys `document` has, None where it has none's."""
    if "model_type" in document or "architectures" in document:
        return None  # a model's config.json, which has some of these sizes and nothing of training
    return next((name for name, marks in _MARKS.items() if any(mark in document for mark in marks)), None)


def import_foreign(
    document: dict[str, Any], origin: str | None = None, processes: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Values of a spec.json, complete or not, and notes on what it lacks; `origin` None: recognised by its keys.

    `processes` is the number that the configuration was for, where it does not say. Raises UserError for what the
    configuration's own library would refuse.
    """
    name = origin or recognise(document)
    if name is None:
        raise UserError(
            f"the configuration must be of {', '.join(ORIGINS)}, but has none of their keys; name it with `--format`"
        )
    assert name in _READERS, name
    return _READERS[name](document, processes)
