"""What stands between the matrix products of a frozen block, each in one pass over the rows, and back.

Under autocast PyTorch normalises to float32 and then rounds for the product, multiplies and adds step by
step, and sums gradients in passes of their own. Here normalisation rounds at once, the branches of a residual
are added together, and the gradient of a normalisation takes up that of the residual beside it. Results are
those of the passes in float32, rounded once.

Bound by memory: a row of C float32 and C values of 16 bits is read or written once by each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def load_stacked(x, tail, row, column, split, width, inside):
    """Elements of `x [split, C]` with `tail [R - split, C]`, if there is one, below it; in float32."""
    at = row * width + column
    if tail is None:
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    else:
        upper = row < split
        value = tl.load(x + at, mask=inside & upper, other=0.0).to(tl.float32)
        lower = tl.load(tail + at - split * width, mask=inside & ~upper, other=0.0).to(tl.float32)
        value = tl.where(upper, value, lower)
    return value


@triton.jit
def _norm_kernel(
    x,  # [split, C]
    tail,  # [R - split, C], or nothing
    branch,  # [R, C] added to x, or nothing
    layer_scale,  # [C] factor on it, or nothing
    out,  # [R, C] the sum, if there is a branch
    weight,  # [C]
    bias,  # [C]
    y,  # [R, C]
    mean,  # [R]
    scale,  # [R], 1 / deviation
    split,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    value = load_stacked(x, tail, row, column, split, width, inside)
    if branch is not None:
        more = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if layer_scale is not None:
            more *= tl.load(layer_scale + column, mask=inside, other=0.0).to(tl.float32)
        value = (value + more).to(out.dtype.element_ty)
        tl.store(out + at, value, mask=inside)
        value = value.to(tl.float32)
    middle = tl.sum(value) / width
    value = tl.where(inside, value - middle, 0.0)
    factor = 1 / tl.sqrt(tl.sum(value * value) / width + eps)
    by = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    plus = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (value * factor * by + plus).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, middle)
    tl.store(scale + row, factor)


@triton.jit
def _norm_backward_kernel(
    x,  # [split, C] what was normalised
    tail,  # [R - split, C], or nothing
    weight,  # [C]
    mean,  # [R]
    scale,  # [R]
    grad_y,  # [R, C]
    grad_x,  # [split, C] gradient of x from beside the normalisation
    grad_tail,  # [R - split, C], or nothing
    out,  # [R, C]
    layer_scale,  # [C] factor on the branch in x, or nothing
    grad_branch,  # [R, C], or nothing
    split,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    factor = tl.load(scale + row)
    normed = (load_stacked(x, tail, row, column, split, width, inside) - tl.load(mean + row)) * factor
    by = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32) * by
    grad = grad - tl.sum(grad) / width - tl.where(inside, normed, 0.0) * (tl.sum(grad * normed) / width)
    grad = grad * factor + load_stacked(grad_x, grad_tail, row, column, split, width, inside)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)
    if grad_branch is not None:
        if layer_scale is not None:
            grad *= tl.load(layer_scale + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_branch + at, grad.to(grad_branch.dtype.element_ty), mask=inside)


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


@functools.cache
def shared_memory_of(device: int) -> int:
    """Bytes that a program can have; GPUs for servers have twice as many as others."""
    return triton.runtime.driver.active.utils.get_device_properties(device)["max_shared_mem"]


def _columns(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def _normalize(
    x: Tensor,
    tail: Tensor | None,
    branch: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised rows (of the sum with the branch, which is written to `out`), means and factors."""
    width, count = x.shape[-1], rows_of(x, tail)
    y = torch.empty(x.shape if tail is None else (count, width), dtype=dtype, device=x.device)
    mean, factor = (torch.empty(count, dtype=torch.float32, device=x.device) for _ in range(2))
    if count:
        split = x.numel() // width
        with torch.cuda.device_of(x):
            _norm_kernel[(count,)](
                x,
                tail,
                branch,
                scale,
                out,
                weight,
                bias,
                y,
                mean,
                factor,
                split,
                width,
                eps,
                **_columns(width),
            )
    return y, mean, factor


def _normalize_backward(
    saved: Sequence[Tensor],  # x, its tail, weight, means, factors
    grad: Tensor,
    grad_x: Tensor,
    grad_tail: Tensor | None,
    scale: Tensor | None,
    of_branch: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of its tail; that of the branch is written to `of_branch`."""
    x, tail, weight, mean, factor = saved
    width, count = x.shape[-1], len(mean)
    out = torch.empty(count, width, dtype=x.dtype, device=x.device)
    if count:
        grads = grad.contiguous(), grad_x.contiguous(), None if grad_tail is None else grad_tail.contiguous()
        _norm_backward_kernel[(count,)](
            x, tail, weight, mean, factor, *grads, out, scale, of_branch, x.numel() // width, width,
            **_columns(width),
        )  # fmt: skip
    return unstacked(out, x, tail)


def rows_of(x: Tensor, tail: Tensor | None) -> int:
    """Rows of `x [..., C]` and of what is stacked below it."""
    return (x.numel() + (0 if tail is None else tail.numel())) // x.shape[-1]


def unstacked(rows: Tensor, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows `[R, C]` in the shapes of x and its tail."""
    if tail is None:
        return rows.view(x.shape), None
    split = x.numel() // x.shape[-1]
    return rows[:split].view(x.shape), rows[split:].view(tail.shape)


class ForkNorm(torch.autograd.Function):
    """`x [..., C]` itself and `LayerNorm(x)` in another dtype; weight and bias are constants.

    With a `tail [..., C]`, that of the rows of both, `[R, C]`, and the tail itself between the two.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, tail: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        rows, more = x.contiguous(), None if tail is None else tail.contiguous()
        y, *statistics = _normalize(rows, more, None, None, None, weight, bias, eps, dtype)
        ctx.save_for_backward(rows, more, weight, *statistics)
        return x.view_as(x), None if tail is None else tail.view_as(tail), y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_tail: Tensor | None, grad_y: Tensor) -> tuple[Any, ...]:
        grads = _normalize_backward(ctx.saved_tensors, grad_y, grad_x, grad_tail, None, None)
        return *grads, None, None, None, None


class JoinNorm(torch.autograd.Function):
    """`s = x + scale y`, all `[..., C]`, in the dtype of x, and `LayerNorm(s)`; the others are constants.

    With a tail as for `ForkNorm`; y then is `[R, C]`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tail: Tensor | None,
        y: Tensor,
        scale: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        x, tail = x.contiguous(), None if tail is None else tail.contiguous()
        out = torch.empty(rows_of(x, tail), x.shape[-1], dtype=x.dtype, device=x.device)
        normed, *statistics = _normalize(x, tail, y.contiguous(), scale, out, weight, bias, eps, dtype)
        ctx.dtype, ctx.shape = y.dtype, y.shape
        found = unstacked(out, x, tail)
        ctx.save_for_backward(*found, weight, *statistics, scale)
        return *found, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_tail: Tensor | None, grad_y: Tensor) -> tuple[Any, ...]:
        *saved, scale = ctx.saved_tensors
        of_y = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad_x.device)
        grads = _normalize_backward(saved, grad_y, grad_x, grad_tail, scale, of_y)
        return *grads, of_y, None, None, None, None, None


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
