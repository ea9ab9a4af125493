"""Activation checkpointing and compilation, block by block, on any module. Neither changes a name."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

KEPT_OPERATIONS = (
    "aten.mm",
    "aten.addmm",
    "aten.bmm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
)
"""What selective checkpointing keeps: the operations whose recomputation costs most for the memory it saves."""


def checkpoint_blocks(module: nn.Module, blocks: Sequence[str], mode: str) -> None:
    """Keep less of each block for the backward pass: `mode` is none, selective or full.

    Only `forward` is replaced: hooks that gather parameters stay outside and run once per pass.
    """
    if mode == "none":
        return
    context: dict[str, Any] = {"context_fn": _selective_contexts} if mode == "selective" else {}
    for path in blocks:
        block = module.get_submodule(path)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, **context)


def compile_blocks(module: nn.Module, blocks: Sequence[str]) -> None:
    """torch.compile each block on its own: one compilation serves all, and start-up stays short."""
    for path in blocks:
        module.get_submodule(path).compile()


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: object, operation: Callable[..., Any], *_args: object, **_kwargs: object) -> CheckpointPolicy:
    kept = isinstance(operation, torch._ops.OpOverload) and str(operation._overloadpacket) in KEPT_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
