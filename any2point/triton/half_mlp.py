"""A frozen MLP in float32 where torch allows TF32, with factors in float16, which has as many bits.

Each row of a factor is multiplied with the power of 2 that brings its largest magnitude between 2 and 4, each
weight likewise as a whole, so that no product overflows and what is 2^15 times smaller keeps all its bits.
Products are in float32, but for the hidden layer's gradient. Whatever passes over their results anyway takes
the powers away again: that of the activation, which adds the bias, too, and one behind the last product of a
direction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ACTIVATIONS = ("quick_gelu", "gelu")
FEWEST = 1024  # rows; with fewer, passes are not worth their launches
WIDEST = 4000  # channels: sums of so many products of magnitudes up to 4 fit into float16


@triton.jit
def _power(largest):
    """The power of 2 that brings a magnitude between 2 and 4, and its reciprocal."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 2), 254)
    by = ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    return by, ((exponent - 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store(value, out, back, row, at, inside):
    """A row in float16, and what it has to be multiplied with."""
    by, of_row = _power(tl.max(tl.abs(value)))
    tl.store(out + at, (value * by).to(tl.float16), mask=inside)
    tl.store(back + row, of_row)


@triton.jit
def _round_kernel(
    x,  # [R, C]
    out,  # [R, C] float16
    back,  # [R]
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * width + column, column < width
    _store(tl.load(x + at, mask=inside, other=0.0), out, back, row, at, inside)


@triton.jit
def _normal(h):
    """The normal distribution below h by formula 7.1.26 of Abramowitz and Stegun, 7e-8 off; its density."""
    z = tl.abs(h) * 0.7071067811865476
    t = 1 / (1 + 0.3275911 * z)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    series = t * (0.254829592 + t * (-0.284496736 + t * series))
    density = tl.exp2(-1.4426950408889634 * z * z)
    below = 0.5 * series * density
    return tl.where(h >= 0, 1 - below, below), 0.3989422804014327 * density


@triton.jit
def _activate_kernel(
    h,  # [R, H]
    of_row,  # [R]
    of_weight,  # [1]
    bias,  # [H]
    out,  # [R, H] float16
    back,  # [R]
    width,
    BLOCK: tl.constexpr,
    QUICK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * width + column, column < width
    value = tl.load(h + at, mask=inside, other=0.0) * (tl.load(of_row + row) * tl.load(of_weight))
    value += tl.load(bias + column, mask=inside, other=0.0)
    if QUICK:
        value = value / (1 + tl.exp(-1.702 * value))
    else:
        below, _density = _normal(value)
        value = value * below
    _store(value, out, back, row, at, inside)


@triton.jit
def _activate_backward_kernel(
    h,  # [R, H]
    of_row,  # [R]
    of_weight,  # [1]
    bias,  # [H]
    grad,  # [R, H] float16
    grad_of_row,  # [R]
    grad_of_weight,  # [1]
    out,  # [R, H] float16
    back,  # [R]
    width,
    BLOCK: tl.constexpr,
    QUICK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * width + column, column < width
    value = tl.load(h + at, mask=inside, other=0.0) * (tl.load(of_row + row) * tl.load(of_weight))
    value += tl.load(bias + column, mask=inside, other=0.0)
    if QUICK:
        gate = 1 / (1 + tl.exp(-1.702 * value))
        slope = gate + 1.702 * value * gate * (1 - gate)
    else:
        below, density = _normal(value)
        slope = below + value * density
    slope *= tl.load(grad_of_row + row) * tl.load(grad_of_weight)
    _store(tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * slope, out, back, row, at, inside)


@triton.jit
def _finish_kernel(
    y,  # [R, C], in place
    of_row,  # [R]
    of_weight,  # [1]
    bias,  # [C], or nothing
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at, inside = row * width + column, column < width
    value = tl.load(y + at, mask=inside, other=0.0) * (tl.load(of_row + row) * tl.load(of_weight))
    if bias is not None:
        value += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(y + at, value, mask=inside)


def _columns(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"width": width, "BLOCK": block, "num_warps": min(8, max(1, block // 256))}


def _product(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`a b` of float16, added up in float32."""
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else (a.float() @ b.float()).to(dtype)


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float16, and what each has to be multiplied with."""
    out, back = torch.empty_like(x, dtype=torch.float16), x.new_empty(len(x))
    _round_kernel[(len(x),)](x, out, back, **_columns(x.shape[1]))
    return out, back


class HalfMLP(torch.autograd.Function):
    """`act(x w1' + b1) w2' + b2` of `x [..., C]` in float32; weights as from `Linear.scaled`, constants."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,  # [H, C]
        of_first: Tensor,
        first_bias: Tensor,  # [H]
        second: Tensor,  # [C, H]
        of_second: Tensor,
        second_bias: Tensor,  # [C]
        activation: str,
    ) -> Tensor:
        rows, quick = x.reshape(-1, x.shape[-1]).contiguous(), activation == "quick_gelu"
        with torch.cuda.device_of(x):
            half, of_row = _rounded(rows)
            before = _product(half, first.t())
            half, back = torch.empty_like(before, dtype=torch.float16), torch.empty_like(of_row)
            layer = before, of_row, of_first, first_bias
            count, width = before.shape
            _activate_kernel[(count,)](*layer, half, back, **_columns(width), QUICK=quick)
            out = _product(half, second.t())
            _finish_kernel[(count,)](out, back, of_second, second_bias, **_columns(out.shape[1]))
        ctx.quick = quick
        ctx.save_for_backward(*layer, first, second, of_second)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *layer, first, second, of_second = ctx.saved_tensors
        before, _, of_first, _ = layer
        half, of_row = _rounded(grad.reshape(-1, grad.shape[-1]).contiguous())
        of_hidden = _product(half, second, torch.float16)
        half, back = torch.empty_like(before, dtype=torch.float16), torch.empty_like(of_row)
        count, width = before.shape
        _activate_backward_kernel[(count,)](
            *layer, of_hidden, of_row, of_second, half, back, **_columns(width), QUICK=ctx.quick
        )
        found = _product(half, first)
        _finish_kernel[(count,)](found, back, of_first, None, **_columns(found.shape[1]))
        return found.view(grad.shape), *[None] * 7
