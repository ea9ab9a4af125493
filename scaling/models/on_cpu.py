"""What takes a CPU longer in torch's way than in another; what there is on a GPU is left as it is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang and Sennrich, 2019) over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None) -> Tensor:
    """F.rms_norm. In fp32 on a CPU a function of its own; compiled code makes one of torch's."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or eps is None or torch.compiler.is_compiling():
        return F.rms_norm(x, shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x²) + eps) of each row; keeps x and r.

    With p = dy x the gradients are dw = sum over rows of r p, and dx = r (dy w) - x r³ (p · w) / width: two products of
    a matrix and a vector, in place of sums over what was multiplied out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        root = root.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, root, weight)
        return (x * root).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, root, weight = ctx.saved_tensors
        product = grads[0] * x
        rows = product.flatten(0, -2)
        grad_weight = torch.mv(rows.t(), root.flatten()) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        along = torch.mv(rows, weight).view_as(root).mul_(root.pow(3)).div_(-x.shape[-1])
        del rows
        grad_x = torch.mul(grads[0], weight, out=product).mul_(root).addcmul_(x, along)
        return grad_x, grad_weight, None


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its weights as they are allocated: they are filled by name (`fill_parameter`) later."""

    adds_rows = False
    """Whether a further gradient is added to the table's row by row. Torch fills a gradient as large as the table with
    zeros for the few rows that a micro-batch has read, and adds all of it. For engines that look at `grad` alone, on a
    CPU: a GPU would add in any order."""

    def reset_parameters(self) -> None:
        """Nothing: torch's initial values would be computed only to be overwritten."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        weight = self.weight
        asked = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
        if not (asked and self.adds_rows and weight.is_leaf):
            return F.embedding(input, weight)
        return _Rows.apply(weight, input)  # pyright: ignore[reportReturnType]


class _Rows(torch.autograd.Function):
    """Rows of a leaf."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ids)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        (ids,) = ctx.saved_tensors
        there = ctx.weight.grad
        if there is None:
            return torch.ops.aten.embedding_dense_backward(grads[0], ids, len(ctx.weight), -1, False), None
        there.index_add_(0, ids.flatten(), grads[0].flatten(0, ids.dim() - 1))
        return None, None
