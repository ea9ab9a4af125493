"""Cross-entropy summed over tokens, with or without the logits of the whole micro-batch in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.records import IGNORED

CHUNK_ELEMENTS = 2**25
"""Logits alive at a time in the chunked form: 128 MiB of fp32, 667 rows of GPT-2's vocabulary, plenty for a GEMM."""


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunked: bool) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], an fp32 scalar; rows with target -100 add nothing.

    hidden [rows, width], weight [vocabulary, width], targets int64 [rows].
    """
    if chunked:
        if not torch.is_grad_enabled():  # a Function is told who requires a gradient, not that nobody will ask for it
            hidden, weight = hidden.detach(), weight.detach()
        return _ChunkedCrossEntropy.apply(hidden, weight, targets)  # pyright: ignore[reportReturnType]
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def token_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunked: bool) -> Tensor:
    """-log softmax(hidden @ weight.T)[target] of each row, fp32 [rows]; 0 for rows with target -100.

    As `summed_cross_entropy`, but that each row's loss may count as much as one likes.
    """
    if chunked:
        return _ChunkedTokenCrossEntropy.apply(hidden, weight, targets)  # pyright: ignore[reportReturnType]
    logits = F.linear(hidden, weight).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients are taken chunk by chunk in the forward pass and only scaled in the backward pass.

    The gradient of a sum does not depend on what the sum is divided by, so the logits need never be kept nor computed
    twice (the idea of Hsu et al., Liger Kernel, 2024). The weight's gradient adds up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for chunk, target, place in zip(
            hidden.split(rows), targets.split(rows), _places(grad_hidden, rows, len(hidden)), strict=True
        ):
            logits, kept, safe, normaliser = _scored(chunk, weight, target)
            picked = logits.gather(1, safe.unsqueeze(1)).squeeze(1)
            total += torch.where(kept, normaliser - picked, 0).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = _slope(logits, normaliser, safe, kept).to(hidden.dtype)
            if place is not None:
                torch.mm(grad, weight, out=place)
            if grad_weight is not None:
                grad_weight += grad.t() @ chunk
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return (
            # In fp32: rounding the scale itself to bf16 would bias every gradient by up to 0.4 %.
            None if grad_hidden is None else (grad_hidden.float() * scale).to(grad_hidden.dtype),
            None if grad_weight is None else grad_weight.mul_(scale).to(ctx.weight_dtype),
            None,
        )


class _ChunkedTokenCrossEntropy(torch.autograd.Function):
    """Logits are computed chunk by chunk in the forward pass, and a second time in the backward pass: how much each row
    counts is known only then. The weight's gradient adds up in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for chunk, target, place in zip(hidden.split(rows), targets.split(rows), losses.split(rows), strict=True):
            logits, kept, safe, normaliser = _scored(chunk, weight, target)
            picked = logits.gather(1, safe.unsqueeze(1)).squeeze(1)
            place.copy_(torch.where(kept, normaliser - picked, 0))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        places = _places(grad_hidden, rows, len(hidden))
        parts = zip(hidden.split(rows), targets.split(rows), grads[0].split(rows), places, strict=True)
        for chunk, target, counts, place in parts:
            logits, kept, safe, normaliser = _scored(chunk, weight, target)
            grad = _slope(logits, normaliser, safe, kept * counts).to(hidden.dtype)
            if place is not None:
                torch.mm(grad, weight, out=place)
            if grad_weight is not None:
                grad_weight += grad.t() @ chunk
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _scored(chunk: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits in fp32, which targets count, targets that are ids in any case, and the log of the sum of exponents."""
    logits = F.linear(chunk, weight).float()
    kept = target != IGNORED
    return logits, kept, torch.where(kept, target, 0), logits.logsumexp(dim=-1)


def _slope(logits: Tensor, normaliser: Tensor, safe: Tensor, counts: Tensor) -> Tensor:
    """The gradient of each row's loss with respect to its logits, times what the row counts; in their place."""
    grad = logits.sub_(normaliser.unsqueeze(1)).exp_()
    grad.scatter_add_(1, safe.unsqueeze(1), torch.full_like(normaliser, -1.0).unsqueeze(1))
    return grad.mul_(counts.unsqueeze(1))


def _places(grad_hidden: Tensor | None, rows: int, total: int) -> list[Tensor | None]:
    if grad_hidden is None:
        return [None] * -(-total // rows)
    return list(grad_hidden.split(rows))
