"""What stands between the matrix products of a frozen block, each in one pass over the rows, and back.

Under autocast PyTorch normalises to float32 and then rounds for the product, multiplies and adds step by
step, and sums gradients in passes of their own. Here normalisation rounds at once, the branches of a residual
are added together, and the gradient of a normalisation takes up that of the residual beside it. Results are
those of the passes in float32, rounded once.

Bound by memory: a row of C float32 and C values of 16 bits is read or written once by each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _norm_kernel(
    x,  # [R, C]
    weight,  # [C]
    bias,  # [C]
    y,  # [R, C]
    mean,  # [R]
    scale,  # [R], 1 / deviation
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(value) / width
    value = tl.where(inside, value - middle, 0.0)
    factor = 1 / tl.sqrt(tl.sum(value * value) / width + eps)
    by = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    plus = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, (value * factor * by + plus).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle)
    tl.store(scale + row, factor)


@triton.jit
def _norm_backward_kernel(
    x,  # [R, C]
    weight,  # [C]
    mean,  # [R]
    scale,  # [R]
    grad_y,  # [R, C]
    grad_x,  # [R, C] gradient of x from beside the normalisation
    out,  # [R, C]
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    factor = tl.load(scale + row)
    normed = (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - tl.load(mean + row)) * factor
    by = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32) * by
    grad = grad - tl.sum(grad) / width - tl.where(inside, normed, 0.0) * (tl.sum(grad * normed) / width)
    grad = grad * factor + tl.load(grad_x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _join_kernel(
    x,  # [R, C]
    y,  # [R, C]
    scale,  # [C] factor on y, or nothing
    z,  # [R, C], or nothing
    out,  # [R, C]
    count,
    width,
    SCALED: tl.constexpr,
    THREE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    branch = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        branch *= tl.load(scale + at % width, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + branch
    if THREE:
        value += tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(
    x,  # [n]
    grad,  # [n] of the result; nothing in the forward direction
    out,  # [n]
    count,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gate = 1 / (1 + tl.exp(-1.702 * value))
    result = value * gate
    if BACKWARD:
        result = gate + 1.702 * result * (1 - gate)
        result *= tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def _columns(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


class ForkNorm(torch.autograd.Function):
    """`x [..., C]` itself and `LayerNorm(x)` in another dtype; weight and bias are constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows = x.contiguous()
        y = torch.empty_like(rows, dtype=dtype)
        width, count = x.shape[-1], rows.numel() // x.shape[-1]
        mean, scale = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
        if count:
            with torch.cuda.device_of(x):
                _norm_kernel[(count,)](rows, weight, bias, y, mean, scale, width, eps, **_columns(width))
        ctx.save_for_backward(rows, weight, mean, scale)
        return x.view_as(x), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_y: Tensor) -> tuple[Any, ...]:
        rows, weight, mean, scale = ctx.saved_tensors
        out = torch.empty_like(rows)
        width, count = rows.shape[-1], len(mean)
        if count:
            grads = grad_y.contiguous(), grad_x.contiguous()
            _norm_backward_kernel[(count,)](rows, weight, mean, scale, *grads, out, width, **_columns(width))
        return out, None, None, None, None


class Join(torch.autograd.Function):
    """`x + scale y + z`, all `[..., C]`, in the dtype of x; `scale [C]` (a constant) and z may be None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scale: Tensor | None, z: Tensor | None) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        z = None if z is None else z.contiguous()
        out = torch.empty_like(x)
        ctx.dtypes = y.dtype, None if z is None else z.dtype
        ctx.save_for_backward(scale)
        if count := x.numel():
            with torch.cuda.device_of(x):
                _join_kernel[(triton.cdiv(count, 2048),)](
                    x, y, scale, z, out, count, x.shape[-1],
                    SCALED=scale is not None, THREE=z is not None, BLOCK=2048,
                )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (scale,) = ctx.saved_tensors
        of_y, of_z = ctx.dtypes
        grad_y = grad.to(of_y) if scale is None else (grad * scale).to(of_y)
        if of_z is None:
            grad_z = None
        else:
            grad_z = grad_y if scale is None and of_z == of_y else grad.to(of_z)
        return grad, grad_y, None, grad_z


class QuickGELU(torch.autograd.Function):
    """`x sigmoid(1.702 x)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        return _gate(x, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return _gate(x, grad.contiguous())


def _gate(x: Tensor, grad: Tensor | None) -> Tensor:
    out = torch.empty_like(x)
    if count := x.numel():
        _gate_kernel[(triton.cdiv(count, 2048),)](x, grad, out, count, BACKWARD=grad is not None, BLOCK=2048)
    return out
