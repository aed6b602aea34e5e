"""The end of the model on CUDA: the final LayerNorm, the class token, and the largest value of all tokens.

Of the normalised tokens nothing is stored. Backwards the gradient of a token is that of the channels in which
it is the largest; equal ones share it.

H200, 32 clouds of 129 rows of 768: 16 us forward, 10 us backward. Bound by memory: the tokens are read twice
forward, the second time mostly from the cache, and read and written once backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHANNELS, _TOKENS = 64, 32


@triton.jit
def _source(prefix, tokens, row, B, P, S, width):
    """Where a row of `prefix [B, P, C]` with `tokens [B, S, C]` below it starts, as two masked addresses."""
    upper = row < B * P
    return prefix + row * width, tokens + (row - B * P) * width, upper


@triton.jit
def _statistics_kernel(
    prefix,  # [B, P, C]
    tokens,  # [B, S, C]
    mean,  # [B P + B S]
    factor,  # [B P + B S]
    B,
    P,
    S,
    width,
    eps,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    first, second, upper = _source(prefix, tokens, row, B, P, S, width)
    value = tl.load(first + column, mask=inside & upper, other=0.0).to(tl.float32)
    value += tl.load(second + column, mask=inside & ~upper, other=0.0).to(tl.float32)
    middle = tl.sum(value) / width
    value = tl.where(inside, value - middle, 0.0)
    tl.store(mean + row, middle)
    tl.store(factor + row, 1 / tl.sqrt(tl.sum(value * value) / width + eps))


@triton.jit
def _pool_kernel(
    prefix,
    tokens,
    mean,
    factor,
    weight,  # [C]
    bias,  # [C]
    largest,  # out [B, C]
    cls,  # out [B, C]
    share,  # out [B, C], 1 / tokens that are largest
    normed,  # out [2, B, C]: both before the weight, of equal ones the mean
    stride,  # of rows of the first two
    B,
    P,
    S,
    width,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    cloud = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < width
    by = tl.load(weight + c, mask=real, other=0.0).to(tl.float32)
    plus = tl.load(bias + c, mask=real, other=0.0).to(tl.float32)
    at = cloud * P
    head = tl.load(prefix + at * width + c, mask=real, other=0.0).to(tl.float32)
    head = (head - tl.load(mean + at)) * tl.load(factor + at)
    tl.store(cls + cloud * stride + c, head * by + plus, mask=real)
    tl.store(normed + (B + cloud) * width + c, head, mask=real)
    top = tl.full((CHANNELS,), float("-inf"), tl.float32)
    count = tl.zeros((CHANNELS,), tl.float32)
    total = tl.zeros((CHANNELS,), tl.float32)
    first = cloud * 0
    while first < S:
        t = first + tl.arange(0, TOKENS)
        known = t < S
        row = cloud * S + t
        inside = known[:, None] & real[None, :]
        value = tl.load(tokens + row[:, None] * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(mean + B * P + row, mask=known, other=0.0)
        value = (value - middle[:, None]) * tl.load(factor + B * P + row, mask=known, other=0.0)[:, None]
        result = tl.where(known[:, None], value * by[None, :] + plus[None, :], float("-inf"))
        new = tl.maximum(top, tl.max(result, 0))
        equal = result == new[None, :]
        same = top == new
        count = tl.where(same, count, 0.0) + tl.sum(equal.to(tl.float32), 0)
        total = tl.where(same, total, 0.0) + tl.sum(tl.where(equal, value, 0.0), 0)
        top = new
        first += TOKENS
    tl.store(largest + cloud * stride + c, top, mask=real)
    tl.store(share + cloud * width + c, 1 / count, mask=real)
    tl.store(normed + cloud * width + c, total / count, mask=real)


@triton.jit
def _pool_backward_kernel(
    prefix,
    tokens,
    mean,
    factor,
    weight,
    bias,
    largest,  # [B, C]
    share,  # [B, C]
    grad_largest,  # [B, C]
    grad_cls,  # [B, C]
    grad_prefix,  # out [B, P, C]
    grad_tokens,  # out [B, S, C]
    stride,  # of rows of the largest
    grad_stride,  # of rows of the two gradients
    B,
    P,
    S,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    first, second, upper = _source(prefix, tokens, row, B, P, S, width)
    lower = inside & (row >= B * P)
    value = tl.load(first + column, mask=inside & upper, other=0.0).to(tl.float32)
    value += tl.load(second + column, mask=lower, other=0.0).to(tl.float32)
    scale = tl.load(factor + row)
    value = (value - tl.load(mean + row)) * scale
    by = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    plus = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    is_cls = inside & upper & (row % P == 0)
    grad = tl.load(grad_cls + row // P * grad_stride + column, mask=is_cls, other=0.0).to(tl.float32)
    cloud = (row - B * P) // S
    top = tl.load(largest + cloud * stride + column, mask=lower, other=float("inf"))
    chosen = lower & (value * by + plus == top)
    more = tl.load(grad_largest + cloud * grad_stride + column, mask=chosen, other=0.0).to(tl.float32)
    grad += more * tl.load(share + cloud * width + column, mask=chosen, other=0.0)
    grad *= by
    value = tl.where(inside, value, 0.0)
    grad = (grad - tl.sum(grad) / width - value * (tl.sum(grad * value) / width)) * scale
    tl.store(grad_prefix + row * width + column, grad, mask=inside & upper)
    tl.store(grad_tokens + (row - B * P) * width + column, grad, mask=lower)


@triton.jit
def _weights_kernel(
    grad_largest,  # [B, C]
    grad_cls,  # [B, C]
    normed,  # [2, B, C]
    grad_weight,  # out [C]
    grad_bias,  # out [C]
    grad_stride,
    B,
    width,
    CHANNELS: tl.constexpr,
    CLOUDS: tl.constexpr,
):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    of_weight = tl.zeros((CLOUDS, CHANNELS), tl.float32)
    of_bias = tl.zeros((CLOUDS, CHANNELS), tl.float32)
    first = tl.program_id(0) * 0
    while first < B:
        b = (first + tl.arange(0, CLOUDS))[:, None]
        inside = (b < B) & (c < width)[None, :]
        at, place = b * width + c[None, :], b * grad_stride + c[None, :]
        one = tl.load(grad_largest + place, mask=inside, other=0.0).to(tl.float32)
        other = tl.load(grad_cls + place, mask=inside, other=0.0).to(tl.float32)
        of_weight += one * tl.load(normed + at, mask=inside, other=0.0)
        of_weight += other * tl.load(normed + B * width + at, mask=inside, other=0.0)
        of_bias += one + other
        first += CLOUDS
    tl.store(grad_weight + c, tl.sum(of_weight, 0), mask=c < width)
    tl.store(grad_bias + c, tl.sum(of_bias, 0), mask=c < width)


class Pool(torch.autograd.Function):
    """`prefix [B, P, C]`, whose first rows are class tokens, and `tokens [B, S, C]` -> `[B, 2 C]` float32.

    The largest normalised values of the tokens and the normalised class token, or these the other way round.
    """

    @staticmethod
    def forward(
        ctx: Any, prefix: Tensor, tokens: Tensor, weight: Tensor, bias: Tensor, eps: float, cls_first: bool
    ) -> Tensor:
        prefix, tokens, weight, bias = (each.contiguous() for each in (prefix, tokens, weight, bias))
        (batch, before, width), count = prefix.shape, tokens.shape[1]

        def make(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=prefix.device)

        rows = batch * (before + count)
        mean, factor, share, normed = make(rows), make(rows), make(batch, width), make(2, batch, width)
        out = make(batch, 2 * width)
        ctx.sizes, ctx.cls_first = (batch, before, count, width), cls_first
        block = triton.next_power_of_2(width)
        largest, cls = _halves(out, cls_first)
        with torch.cuda.device_of(prefix):
            _statistics_kernel[(rows,)](prefix, tokens, mean, factor, *ctx.sizes, eps, BLOCK=block)
            _pool_kernel[(batch, triton.cdiv(width, _CHANNELS))](
                prefix, tokens, mean, factor, weight, bias, largest, cls, share, normed, 2 * width,
                *ctx.sizes, CHANNELS=_CHANNELS, TOKENS=_TOKENS, enable_fp_fusion=False,
            )  # fmt: skip
        ctx.save_for_backward(prefix, tokens, mean, factor, weight, bias, out, share, normed)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        prefix, tokens, mean, factor, weight, bias, out, share, normed = ctx.saved_tensors
        batch, before, count, width = ctx.sizes
        grad = grad.contiguous()
        grads = [torch.empty_like(each) for each in (prefix, tokens, weight, bias)]
        largest, _ = _halves(out, ctx.cls_first)
        halves = _halves(grad, ctx.cls_first)
        _pool_backward_kernel[(batch * (before + count),)](
            prefix, tokens, mean, factor, weight, bias, largest, share, *halves, *grads[:2],
            2 * width, 2 * width, *ctx.sizes, BLOCK=triton.next_power_of_2(width), enable_fp_fusion=False,
        )  # fmt: skip
        _weights_kernel[(triton.cdiv(width, _CHANNELS),)](
            *halves, normed, *grads[2:], 2 * width, batch, width, CHANNELS=_CHANNELS, CLOUDS=32
        )
        return *grads, None, None


def _halves(pair: Tensor, swapped: bool) -> list[Tensor]:
    """Views of the two halves of `[B, 2 C]`, in this order or the other one."""
    halves = list(pair.chunk(2, dim=1))
    return halves[::-1] if swapped else halves
