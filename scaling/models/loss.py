"""Cross-entropy summed over tokens, with or without the logits of the whole micro-batch in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scaling.models.on_cpu import may_write_grad
from scaling.records import IGNORED

CHUNK_ELEMENTS = 2**25
"""Logits alive at a time in the chunked form: 128 MiB of fp32, 667 rows of GPT-2's vocabulary, plenty for a GEMM."""


def summed_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunked: bool, writes_grad: bool = False
) -> Tensor:
    """Sum over rows of -log softmax(hidden @ weight.T)[target], an fp32 scalar; rows with target -100 add nothing.

    hidden [rows, width], weight [vocabulary, width], targets int64 [rows]. In chunks the weight's gradient is written
    to its `grad` at once where `writes_grad`; see `may_write_grad`.
    """
    if chunked:
        if not torch.is_grad_enabled():  # a Function is told who requires a gradient, not that nobody will ask for it
            hidden, weight = hidden.detach(), weight.detach()
        writes_grad = writes_grad and may_write_grad(weight)
        return _ChunkedCrossEntropy.apply(hidden, weight, targets, writes_grad)  # pyright: ignore[reportReturnType]
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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, writes_grad: bool) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        parts = zip(hidden.split(rows), targets.split(rows), _places(grad_hidden, rows, len(hidden)), strict=True)
        for index, (chunk, target, place) in enumerate(parts):
            scores, kept, safe = _scored(chunk, weight, target)
            picked = scores.gather(1, safe).squeeze(1)
            total -= torch.where(kept, picked, 0).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = _slope(scores, safe).to(hidden.dtype)
            counts = kept.unsqueeze(1)  # goes to what is as wide as the model, and not as the vocabulary
            if place is not None:
                torch.mm(grad, weight, out=place).mul_(counts)
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), chunk * counts, first=index == 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.leaf, ctx.weight_dtype = weight if writes_grad else None, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale, leaf = grads[0], ctx.leaf
        if grad_hidden is not None:
            # In fp32: rounding the scale itself to bf16 would bias every gradient by up to 0.4 %.
            grad_hidden = (grad_hidden.float() * scale).to(grad_hidden.dtype)
        if leaf is not None and leaf.grad is not None:
            leaf.grad.add_(grad_weight, alpha=scale.item())
            return grad_hidden, None, None, None
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        if leaf is not None:
            leaf.grad, grad_weight = grad_weight, None
        return grad_hidden, grad_weight, None, None


class _ChunkedTokenCrossEntropy(torch.autograd.Function):
    """Logits are computed chunk by chunk in the forward pass, and a second time in the backward pass: how much each row
    counts is known only then. The weight's gradient adds up in fp32."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        for chunk, target, place in zip(hidden.split(rows), targets.split(rows), losses.split(rows), strict=True):
            scores, kept, safe = _scored(chunk, weight, target)
            picked = scores.gather(1, safe).squeeze(1)
            place.copy_(torch.where(kept, -picked, 0))
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, targets = ctx.saved_tensors
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.empty_like(weight, dtype=torch.float32) if wants_weight else None
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        places = _places(grad_hidden, rows, len(hidden))
        parts = zip(hidden.split(rows), targets.split(rows), grads[0].split(rows), places, strict=True)
        for index, (chunk, target, counts, place) in enumerate(parts):
            scores, kept, safe = _scored(chunk, weight, target)
            grad = _slope(scores, safe).mul_((kept * counts).unsqueeze(1)).to(hidden.dtype)
            if place is not None:
                torch.mm(grad, weight, out=place)
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), chunk, first=index == 0)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _scored(chunk: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of probabilities in fp32, which targets count, and targets that are ids in any case, [rows, 1]."""
    scores = F.linear(chunk, weight).float()
    torch.log_softmax(scores, dim=-1, out=scores)  # each row is read before it is written to, on a CPU and on a GPU
    kept = target != IGNORED
    return scores, kept, torch.where(kept, target, 0).unsqueeze(1)


def _slope(scores: Tensor, safe: Tensor) -> Tensor:
    """The gradient of each row's loss with respect to its logits, as if all targets counted; in place of `scores`."""
    return scores.exp_().scatter_add_(1, safe, torch.full_like(safe, -1.0, dtype=scores.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add left @ right to `total`, which holds nothing yet at the first."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(left @ right)
    else:
        total += left @ right


def _places(grad_hidden: Tensor | None, rows: int, total: int) -> list[Tensor | None]:
    if grad_hidden is None:
        return [None] * -(-total // rows)
    return list(grad_hidden.split(rows))
