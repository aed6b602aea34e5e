"""The end of a block in one pass: the bottleneck adapter of a branch, and its sum with branch and residual.

    out = x + s y + factor (up QuickGELU(down(s y)) + bias)

with the source's layer scale s, if it has any. Backwards one pass gives the gradient of the hidden channels,
another that of y and, for each tile of rows, its part of the weights' gradients, which are then summed in
order.

H200, 4128 rows of 768 in bfloat16, r = 16, in the model's step: 18 us forward, of which the memory traffic
needs 9; 8 + 18 us backward and 5 us for the sum, where it needs 8. Limit: programs of few rows, whose loads
wait for their products. As CUDA kernels that read rows once a whole training step was 0.4 % faster.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from any2point.triton import tf32_allowed
from any2point.triton.block import load_stacked, rows_of, unstacked
from any2point.triton.local_aggregate import _operand

WIDEST = 64  # bottleneck
_FEW = 1024  # rows with which a program for each 16 leaves most of a GPU idle
_ROWS, _COLUMNS = 128, 64  # of a program of the last pass backwards


@triton.jit
def _hidden(a, keep, at, inside, rescale):
    """QuickGELU with dropout, and its derivative."""
    gate = 1 / (1 + tl.exp(-1.702 * a))
    kept = 1.0
    if keep is not None:
        kept = tl.load(keep + at, mask=inside, other=0).to(tl.float32) * rescale
    return a * gate * kept, (gate + 1.702 * a * gate * (1 - gate)) * kept


@triton.jit
def _branch(y, layer_scale, at, column, inside, real):
    """`s y` of some rows and columns, in float32, and s."""
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    by = tl.full((1, 1), 1.0, tl.float32)
    if layer_scale is not None:
        by = tl.load(layer_scale + column, mask=real, other=0.0).to(tl.float32)[None, :]
    return value * by, by


@triton.jit
def _join_kernel(
    x,  # [split, WIDTH]
    tail,  # [R - split, WIDTH], or nothing
    y,  # [R, WIDTH]
    layer_scale,  # [WIDTH], or nothing
    down,  # [RANK, WIDTH]
    down_bias,  # [RANK]
    up,  # [WIDTH, RANK]
    up_bias,  # [WIDTH]
    keep,  # [R, RANK], or nothing
    out,  # [R, WIDTH]
    hidden,  # [R, RANK] float32, before the activation
    split,
    count,  # R
    factor,
    rescale,  # of what dropout keeps
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    SHARE: tl.constexpr,  # columns of the result that a program computes, of a number of its own
    DTYPE: tl.constexpr,  # of products
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    known = row < count
    a = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        real = column < WIDTH
        at, inside = row[:, None] * WIDTH + column[None, :], known[:, None] & real[None, :]
        value, _ = _branch(y, layer_scale, at, column, inside, real)
        both = (rank < RANK)[None, :] & real[:, None]
        weight = tl.load(down + rank[None, :] * WIDTH + column[:, None], mask=both, other=0.0)
        a = tl.dot(
            _operand(value, DTYPE, PRECISION),
            _operand(weight, DTYPE, PRECISION),
            a,
            input_precision=PRECISION,
        )
    a += tl.load(down_bias + rank, mask=rank < RANK, other=0.0).to(tl.float32)[None, :]
    place, held = row[:, None] * RANK + rank[None, :], known[:, None] & (rank < RANK)[None, :]
    tl.store(hidden + place, a, mask=held & (tl.program_id(1) == 0))
    h, _slope = _hidden(a, keep, place, held, rescale)
    h = _operand(h, DTYPE, PRECISION)
    for step in range(0, SHARE, CHUNK):
        column = tl.program_id(1) * SHARE + step + tl.arange(0, CHUNK)
        real = column < WIDTH
        at, inside = row[:, None] * WIDTH + column[None, :], known[:, None] & real[None, :]
        both = (rank < RANK)[:, None] & real[None, :]
        weight = tl.load(up + column[None, :] * RANK + rank[:, None], mask=both, other=0.0)
        result = tl.dot(h, _operand(weight, DTYPE, PRECISION), input_precision=PRECISION)
        result += tl.load(up_bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
        value, _ = _branch(y, layer_scale, at, column, inside, real)
        value += load_stacked(x, tail, row[:, None], column[None, :], split, WIDTH, inside)
        result = value + factor * result
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _hidden_backward_kernel(
    up,  # [WIDTH, RANK]
    keep,  # [R, RANK], or nothing
    hidden,  # [R, RANK]
    grad,  # [split, WIDTH]
    grad_tail,  # [R - split, WIDTH], or nothing
    grad_hidden,  # out [R, RANK] float32
    split,
    count,
    factor,
    rescale,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    known = row < count
    of_h = tl.zeros((ROWS, PADDED), tl.float32)
    for first in range(0, WIDTH, CHUNK):
        column = first + tl.arange(0, CHUNK)
        real = column < WIDTH
        inside = known[:, None] & real[None, :]
        both = (rank < RANK)[None, :] & real[:, None]
        weight = tl.load(up + column[:, None] * RANK + rank[None, :], mask=both, other=0.0)
        value = load_stacked(grad, grad_tail, row[:, None], column[None, :], split, WIDTH, inside)
        of_h = tl.dot(
            _operand(value, DTYPE, PRECISION),
            _operand(weight, DTYPE, PRECISION),
            of_h,
            input_precision=PRECISION,
        )
    place, held = row[:, None] * RANK + rank[None, :], known[:, None] & (rank < RANK)[None, :]
    a = tl.load(hidden + place, mask=held, other=0.0)
    _h, slope = _hidden(a, keep, place, held, rescale)
    tl.store(grad_hidden + place, factor * of_h * slope, mask=held)


@triton.jit
def _join_backward_kernel(
    y,  # [R, WIDTH]
    layer_scale,  # [WIDTH], or nothing
    down,  # [RANK, WIDTH]
    keep,  # [R, RANK], or nothing
    hidden,  # [R, RANK]
    grad_hidden,  # [R, RANK]
    grad,  # [split, WIDTH]
    grad_tail,  # [R - split, WIDTH], or nothing
    grad_y,  # out [R, WIDTH]
    parts,  # out [tiles of rows, gradients of down, its bias, up, its bias]
    split,
    count,
    factor,
    rescale,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, PADDED)
    known = row < count
    parts += tl.program_id(0).to(tl.int64) * (2 * RANK * WIDTH + RANK + WIDTH)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    real = column < WIDTH
    at, inside = row[:, None] * WIDTH + column[None, :], known[:, None] & real[None, :]
    place, held = row[:, None] * RANK + rank[None, :], known[:, None] & (rank < RANK)[None, :]
    both = (rank < RANK)[:, None] & real[None, :]
    of_weight = rank[:, None] * WIDTH + column[None, :]
    weight = tl.load(down + of_weight, mask=both, other=0.0)
    value, by = _branch(y, layer_scale, at, column, inside, real)
    of_out = load_stacked(grad, grad_tail, row[:, None], column[None, :], split, WIDTH, inside)
    of_a = tl.load(grad_hidden + place, mask=held, other=0.0)
    a = tl.load(hidden + place, mask=held, other=0.0)
    h, _slope = _hidden(a, keep, place, held, rescale)
    of_bias = parts + RANK * WIDTH + rank
    tl.store(of_bias, tl.sum(of_a, 0), mask=(rank < RANK) & (tl.program_id(1) == 0))
    tl.store(parts + 2 * RANK * WIDTH + RANK + column, factor * tl.sum(of_out, 0), mask=real)
    of_a, h = _operand(of_a, DTYPE, PRECISION), _operand(factor * h, DTYPE, PRECISION)
    of_y = tl.dot(of_a, _operand(weight, DTYPE, PRECISION), input_precision=PRECISION)
    tl.store(grad_y + at, ((of_out + of_y) * by).to(grad_y.dtype.element_ty), mask=inside)
    of_down = tl.dot(tl.trans(of_a), _operand(value, DTYPE, PRECISION), input_precision=PRECISION)
    tl.store(parts + of_weight, of_down, mask=both)
    of_up = tl.dot(tl.trans(h), _operand(of_out, DTYPE, PRECISION), input_precision=PRECISION)
    of_weight = column[None, :] * RANK + rank[:, None]
    tl.store(parts + RANK * WIDTH + RANK + of_weight, of_up, mask=both)


def _sizes(width: int, rank: int, dtype: torch.dtype, rows: int, chunk: int) -> dict[str, Any]:
    """Arguments of all kernels; `dtype` is that of products."""
    exact = dtype == torch.float32 and not tf32_allowed()
    if exact:
        rows, chunk = min(rows, 32), min(chunk, 64)
    return {
        "WIDTH": width,
        "RANK": rank,
        "PADDED": max(16, triton.next_power_of_2(rank)),
        "ROWS": rows,
        "CHUNK": max(16, min(chunk, triton.next_power_of_2(width))),
        "DTYPE": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32),
        "PRECISION": "ieee" if exact else "tf32",
    }


class AdapterJoin(torch.autograd.Function):
    """See the top of this file; `layer_scale [C]` (a constant) and `keep [..., r]` may be None.

    With a `tail` of rows below those of x, y has the rows of both, `[R, C]`; the result is in two as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        tail: Tensor | None,
        y: Tensor,
        layer_scale: Tensor | None,
        down: Tensor,
        down_bias: Tensor,
        up: Tensor,
        up_bias: Tensor,
        keep: Tensor | None,
        factor: float,
        rescale: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        x, tail, y = x.contiguous(), None if tail is None else tail.contiguous(), y.contiguous()
        rank, width = down.shape
        count = rows_of(x, tail)
        out = torch.empty(count, width, dtype=x.dtype, device=x.device)
        tensors = layer_scale, down.contiguous(), down_bias, up.contiguous(), up_bias, keep
        hidden = torch.empty(count, rank, dtype=torch.float32, device=x.device)
        ctx.numbers, ctx.dtype = (x.numel() // width, count, factor, rescale), dtype
        ctx.save_for_backward(y, layer_scale, tensors[1], tensors[3], keep, hidden)
        if count:
            few = count <= _FEW
            sizes = _sizes(width, rank, dtype, 16, 128 if few else 256)
            share = sizes["CHUNK"] * (1 if few else triton.cdiv(width, sizes["CHUNK"]))
            with torch.cuda.device_of(x):
                _join_kernel[(triton.cdiv(count, sizes["ROWS"]), triton.cdiv(width, share))](
                    x, tail, y, *tensors, out, hidden, *ctx.numbers, **sizes, SHARE=share, num_warps=4
                )
        return unstacked(out, x, tail)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_tail: Tensor | None) -> tuple[Any, ...]:
        y, layer_scale, down, up, keep, hidden = ctx.saved_tensors
        grad, grad_tail = grad.contiguous(), None if grad_tail is None else grad_tail.contiguous()
        rank, width = down.shape
        count = len(hidden)
        lengths = [rank * width, rank, rank * width, width]
        sizes = _sizes(width, rank, ctx.dtype, _ROWS, _COLUMNS)
        tiles = triton.cdiv(count, sizes["ROWS"])
        parts = torch.empty(tiles, sum(lengths), dtype=torch.float32, device=y.device)
        grad_y, grad_hidden = torch.empty_like(y), torch.empty_like(hidden)
        if tiles:
            first = _sizes(width, rank, ctx.dtype, 16, 128)
            _hidden_backward_kernel[(triton.cdiv(count, first["ROWS"]),)](
                up, keep, hidden, grad, grad_tail, grad_hidden, *ctx.numbers, **first, num_warps=4
            )
            _join_backward_kernel[(tiles, triton.cdiv(width, sizes["CHUNK"]))](
                y, layer_scale, down, keep, hidden, grad_hidden, grad, grad_tail, grad_y, parts,
                *ctx.numbers, **sizes, num_warps=8,
            )  # fmt: skip
        of_down, of_down_bias, of_up, of_up_bias = parts.sum(0).split(lengths)
        weights = of_down.view_as(down), of_down_bias, of_up.view_as(up), of_up_bias
        return grad, grad_tail, grad_y, None, *(w.to(down.dtype) for w in weights), None, None, None, None
