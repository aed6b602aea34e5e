"""A layer of the classification head in one kernel and back in one: product, normalisation, ReLU, dropout.

A program has all rows of its channels, and so their statistics. Backwards it has some columns of the input,
and finds the gradient of the products again for all channels, which is less than to store and read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from any2point.triton.local_aggregate import _operand

MOST_ROWS = 128
_CHANNELS, _COLUMNS = 16, 32


class Norm(NamedTuple):
    """Batch normalisation of a layer: tensors `[N]`, the number of batches `[]`, and constants."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor | None
    momentum: float
    eps: float


@triton.jit
def _layer_kernel(
    x,  # [R, K]
    weight,  # [N, K]
    bias,  # [N], or nothing
    gamma,  # [N]; nothing in a layer without what follows the product
    beta,  # [N]
    running_mean,  # [N]
    running_var,  # [N]
    batches,  # [] int64, or nothing
    keep,  # [R, N] uint8, or nothing
    out,  # [R, N]
    normed,  # out [R, N] float32: before gamma and beta, with them
    inverse,  # out [N] float32, 1 / deviation
    R,
    N,
    momentum,
    eps,
    rescale,  # of what dropout keeps
    K: tl.constexpr,
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, real = row < R, n < N
    value = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, K, CHUNK):
        k = first + tl.arange(0, CHUNK)
        at, inside = row[:, None] * K + k[None, :], known[:, None] & (k < K)[None, :]
        left = tl.load(x + at, mask=inside, other=0.0)
        at, inside = n[None, :] * K + k[:, None], real[None, :] & (k < K)[:, None]
        right = tl.load(weight + at, mask=inside, other=0.0)
        left, right = _operand(left, DTYPE, PRECISION), _operand(right, DTYPE, PRECISION)
        value = tl.dot(left, right, value, input_precision=PRECISION)
    if bias is not None:
        value += tl.load(bias + n, mask=real, other=0.0)[None, :]
    at, inside = row[:, None] * N + n[None, :], known[:, None] & real[None, :]
    if gamma is not None:
        mean = tl.load(running_mean + n, mask=real, other=0.0)
        var = tl.load(running_var + n, mask=real, other=1.0)
        if TRAINING:
            old_mean, old_var = mean, var
            mean = tl.sum(tl.where(known[:, None], value, 0.0), 0) / R
            apart = tl.where(known[:, None], value - mean[None, :], 0.0)
            var = tl.sum(apart * apart, 0) / R
            tl.store(running_mean + n, old_mean + momentum * (mean - old_mean), mask=real)
            tl.store(running_var + n, old_var + momentum * (var * R / (R - 1) - old_var), mask=real)
            if batches is not None:
                tl.store(batches, tl.load(batches) + 1, mask=tl.program_id(0) == 0)
        factor = 1 / tl.sqrt(var + eps)
        value = (value - mean[None, :]) * factor[None, :]
        tl.store(normed + at, value, mask=inside)
        tl.store(inverse + n, factor, mask=real)
        value *= tl.load(gamma + n, mask=real, other=0.0)[None, :]
        value += tl.load(beta + n, mask=real, other=0.0)[None, :]
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if keep is not None:
            value *= tl.load(keep + at, mask=inside, other=0).to(tl.float32) * rescale
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _layer_backward_kernel(
    x,  # [R, K]
    weight,  # [N, K]
    gamma,  # [N], or nothing
    out,  # [R, N]
    normed,  # [R, N]
    inverse,  # [N]
    grad,  # [R, N]
    grad_x,  # [R, K]
    grad_weight,  # [N, K]
    grad_bias,  # [N], or nothing
    grad_gamma,  # [N]
    grad_beta,  # [N]
    R,
    rescale,
    N: tl.constexpr,
    K: tl.constexpr,
    TRAINING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known, column = (row < R)[:, None], (k < K)[None, :]
    at = row[:, None] * K + k[None, :]
    right = _operand(tl.load(x + at, mask=known & column, other=0.0), DTYPE, PRECISION)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, N, CHUNK):
        n = first + tl.arange(0, CHUNK)
        real = n < N
        place, inside = row[:, None] * N + n[None, :], known & real[None, :]
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        once = real & (tl.program_id(0) == 0)
        if gamma is not None:
            g = tl.where(tl.load(out + place, mask=inside, other=0.0) > 0, g * rescale, 0.0)
            value = tl.load(normed + place, mask=inside, other=0.0)
            of_beta, of_gamma = tl.sum(g, 0), tl.sum(g * value, 0)
            tl.store(grad_beta + n, of_beta, mask=once)
            tl.store(grad_gamma + n, of_gamma, mask=once)
            if TRAINING:
                g = tl.where(known, g - (of_beta[None, :] + value * of_gamma[None, :]) / R, 0.0)
            by = tl.load(gamma + n, mask=real, other=0.0) * tl.load(inverse + n, mask=real, other=0.0)
            g *= by[None, :]
        if grad_bias is not None:
            tl.store(grad_bias + n, tl.sum(g, 0), mask=once)
        g = _operand(g, DTYPE, PRECISION)
        of_weight, both = n[:, None] * K + k[None, :], real[:, None] & column
        left = _operand(tl.load(weight + of_weight, mask=both, other=0.0), DTYPE, PRECISION)
        total = tl.dot(g, left, total, input_precision=PRECISION)
        found = tl.dot(tl.trans(g), right, input_precision=PRECISION)
        tl.store(grad_weight + of_weight, found, mask=both)
    tl.store(grad_x + at, total, mask=known & column)


class Layer(torch.autograd.Function):
    """`dropout(relu(BN(x weight' + bias)))` of rows `[R, K]`, or the product alone; all of it in float32.

    Products are in `dtype`, for float32 in TF32; the product alone is returned in it. In training R is at
    least 2 and at most MOST_ROWS, and running statistics are updated. What dropout keeps, `[R, N]` uint8, may
    be None.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        norm: Norm | None,
        keep: Tensor | None,
        rescale: float,
        training: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        (rows, _), (channels, columns) = x.shape, weight.shape
        out = torch.empty(rows, channels, dtype=torch.float32 if norm else dtype, device=x.device)
        normed = inverse = None
        if norm is not None:
            normed = torch.empty_like(out)
            inverse = torch.empty(channels, dtype=torch.float32, device=x.device)
        block = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
        ctx.flags = {
            "K": columns,
            "TRAINING": training,
            "DTYPE": {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32),
            "PRECISION": "tf32",
        }
        ctx.rescale = rescale
        ctx.save_for_backward(x, weight, bias, gamma, out, normed, inverse)
        running: Any = (None,) * 3 if norm is None else norm[2:5]
        step = (0.0, 0.0) if norm is None else norm[5:]
        with torch.cuda.device_of(x):
            _layer_kernel[(triton.cdiv(channels, _CHANNELS), triton.cdiv(rows, block))](
                x, weight, bias, gamma, beta, *running, keep, out, normed, inverse, rows, channels,
                *step, rescale, **ctx.flags, ROWS=block, BLOCK=_CHANNELS, CHUNK=256 if block <= 32 else 64,
                num_warps=4 if block <= 32 else 8, num_stages=3,
            )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, bias, gamma, out, normed, inverse = ctx.saved_tensors
        rows, (channels, columns) = len(x), weight.shape
        block = max(16, triton.next_power_of_2(rows))
        grads = [None if t is None else torch.empty_like(t) for t in (x, weight, bias, gamma, gamma)]
        _layer_backward_kernel[(triton.cdiv(columns, _COLUMNS),)](
            x, weight, gamma, out, normed, inverse, grad.contiguous(), *grads, rows, ctx.rescale,
            N=channels, **ctx.flags, ROWS=block, BLOCK=_COLUMNS, CHUNK=32,
            num_warps=4 if block <= 32 else 8, num_stages=3 if block <= 32 else 1,
        )  # fmt: skip
        return *grads, None, None, None, None, None
