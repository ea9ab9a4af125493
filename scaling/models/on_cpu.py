"""What takes a CPU longer in torch's way than in another; what there is on a GPU is left as it is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scaling.models.recipe import WritesGrad


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether it is computed with on a CPU, and not in code that is being compiled, which has ways of its own."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def may_write_grad(weight: Tensor) -> bool:
    """Whether a module that writes gradients (`WritesGrad`) may write that of `weight`. Not on a GPU: it would add rows
    in any order."""
    return weight.is_leaf and weight.requires_grad and torch.is_grad_enabled() and eager_on_cpu(weight)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang and Sennrich, 2019) over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return rms_norm(x, self.normalized_shape, self.weight, self.eps)


def rms_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, eps: float | None) -> Tensor:
    """F.rms_norm; in fp32 on a CPU a function of its own."""
    if eps is None or x.dtype != torch.float32 or not eager_on_cpu(x):
        return F.rms_norm(x, shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)  # pyright: ignore[reportReturnType]


class _RMSNorm(torch.autograd.Function):
    """y = x r w with r = 1 / sqrt(mean(x²) + eps) of each row; keeps x and r.

    With p = dy x the gradients are dw = sum over rows of r p, and dx = r (dy w - x r² (p · w) / width): two products of
    a matrix and a vector, in place of sums over what was multiplied out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        root = root.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
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
        along = torch.mv(rows, weight).view_as(root).mul_(root).mul_(root)
        del rows
        grad_x = torch.mul(grads[0], weight, out=product).addcmul_(x, along, value=-1.0 / x.shape[-1]).mul_(root)
        return grad_x, grad_weight, None


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding (Su et al., 2021), halves laid out as Llama's, of [batch, heads, sequence, width]; cosines and
    sines as of `rotation_of`."""
    if eager_on_cpu(heads):
        return _Rotation.apply(heads, cosines, sines)  # pyright: ignore[reportReturnType]
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat((-second, first), dim=-1) * sines


class _Rotation(torch.autograd.Function):
    """Its gradient is turned back by the same angles. Keeps those alone, and makes nothing but its result."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turned(heads, cosines, sines, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turned(grads[0], cosines, sines, -1.0), None, None


def _turned(heads: Tensor, cosines: Tensor, sines: Tensor, sign: float) -> Tensor:
    half = heads.shape[-1] // 2
    found, sines = heads * cosines, sines[..., :half]  # both halves have the same angles
    found[..., :half].addcmul_(heads[..., half:], sines, value=-sign)
    found[..., half:].addcmul_(heads[..., :half], sines, value=sign)
    return found


class Embedding(WritesGrad, nn.Embedding):
    """nn.Embedding that leaves its weights as they are allocated: they are filled by name (`fill_parameter`) later.

    Where it writes gradients it adds them, row by row, to the one that the table has: torch fills one as large as the
    table with zeros for the few rows that a micro-batch has read, and adds all of it.
    """

    def reset_parameters(self) -> None:
        """Nothing: torch's initial values would be computed only to be overwritten."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [..., width]."""
        weight = self.weight
        if not (self.writes_grad and may_write_grad(weight)):
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
