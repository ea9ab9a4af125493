"""Activation checkpointing and compilation, block by block, on any module. Neither changes a name."""

from collections.abc import Callable, Sequence
from types import MethodType
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


GRAPHS = 64
"""Of one block: more than a sequence has lengths. torch's own limit is 8, beyond which it would run uncompiled."""


def prepare_blocks(module: nn.Module, blocks: Sequence[str], *, checkpointing: str, compiled: bool) -> None:
    """Make each block keep less for its backward pass (`checkpointing`: none, selective or full), and compile it.

    Only `forward` is replaced: hooks that gather parameters stay outside, and no graph breaks on them. All blocks of
    one class share one function, so that one compilation serves them all.
    """
    for path in blocks:
        block = module.get_submodule(path)
        if checkpointing != "none":
            block.forward = MethodType(_selective if checkpointing == "selective" else _full, block)
        if compiled:
            # A graph for each shape, of which there are few: the lengths of sequences, in training and validation.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
            block.forward = torch.compile(block.forward, dynamic=False)


def _full(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, **named)


def _selective(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    contexts = _selective_contexts
    return checkpoint(type(block).forward, block, *inputs, use_reentrant=False, context_fn=contexts, **named)


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: object, operation: Callable[..., Any], *_args: object, **_kwargs: object) -> CheckpointPolicy:
    kept = isinstance(operation, torch._ops.OpOverload) and str(operation._overloadpacket) in KEPT_OPERATIONS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
