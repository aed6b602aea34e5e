"""Self-attention over short sequences, straight from the product of query, key and value, and back.

A head's keys and values stay in a program: one product gives all scores of a row, no running maximum is
needed, and backwards the gradient of a query is complete at once, without atomics or a sum of its own. The
three gradients are written where the next product reads them. A length just above 128 (class token and
registers beside 128 tokens) costs a tile of 16, not one of 128.

H200, 32 clouds of 129 tokens, 12 heads of 64, bfloat16: 17 us forward, 40 us backward; by torch 26 and 132 us
with cuDNN (which adds up and stacks gradients in kernels of its own), 32 and 172 us with flash attention. The
memory traffic would take 6 and 12 us: tiles are small, their steps wait for each other, and backward the
registers of a multiprocessor hold one program.

Where torch allows TF32, float32 takes the same way: operands become float16, which has as many bits, times a
power of 2 that brings the largest magnitude of a head's tile to the same place. H200, the same sizes: 36 us
forward, 61 us backward, of which the memory traffic would take 12 and 24 us.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from any2point.triton import tf32_allowed

LONGEST = 144  # keys whose gradients fit into the registers of a program
HEAD_WIDTHS = (16, 32, 64)
_ROWS = 64  # queries at a time
_ROWS_BACKWARD = 128


def shared_memory(width: int) -> int:
    """Bytes that the backward pass, which needs most, takes of shared memory for heads of this width."""
    return 30_400 + 1_550 * width


@triton.jit
def _place(group, batch, tokens, prefix, OVER_BATCH: tl.constexpr):
    """A sequence's first row, rows from one of its members to the next, and what those behind leap over."""
    if OVER_BATCH:
        ahead = group < prefix
        base = tl.where(ahead, group, batch * prefix + group - prefix)
        step, leap = tl.where(ahead, prefix, tokens - prefix), group * 0
    else:
        base, step = group * prefix, 1
        leap = (batch - 1) * prefix + group * (tokens - 2 * prefix)
    return base, step, leap


@triton.jit
def _tile(
    tensor,  # [B T, 3 heads D] or [B T, heads D]
    base,
    token,  # [M] members of a sequence
    count,  # of its members
    step,
    leap,
    prefix,
    stride,  # elements of a row
    column,
    D: tl.constexpr,
):
    """Addresses and mask of `[M, D]` elements of some members, from a column on."""
    row = base + token * step + tl.where(token < prefix, 0, leap)
    at = row[:, None] * stride + column + tl.arange(0, D)[None, :]
    return tensor + at, (token < count)[:, None]


@triton.jit
def _power(largest):
    """The power of 2 that brings the largest of some magnitudes between 8 and 16, and its reciprocal.

    Then sums of 64 products fit into float16, and what is 2^17 times smaller keeps all its bits.
    """
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 4), 254)
    by = ((257 - exponent) << 23).to(tl.float32, bitcast=True)
    return by, ((exponent - 3) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _both(main, tail, TAIL: tl.constexpr):
    """The largest magnitude in two tiles."""
    largest = tl.max(tl.abs(main))
    if TAIL:
        largest = tl.maximum(largest, tl.max(tl.abs(tail)))
    return largest


@triton.jit
def _load(
    tensor,
    base,
    count,
    step,
    leap,
    prefix,
    stride,
    column,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
):
    """All members' elements, in the large tile and in the small one."""
    extra: tl.constexpr = TAIL if TAIL else 16  # of zeros
    at, known = _tile(tensor, base, tl.arange(0, MAIN), count, step, leap, prefix, stride, column, D)
    main = tl.load(at, mask=known, other=0.0)
    token = MAIN + tl.arange(0, extra)
    at, known = _tile(tensor, base, token, count, step, leap, prefix, stride, column, D)
    return main, tl.load(at, mask=known, other=0.0)


@triton.jit
def _operands(main, tail, TAIL: tl.constexpr, HALF: tl.constexpr):
    """Two tiles as operands of products, and what the products have to be multiplied with."""
    by, back = 1.0, 1.0
    if HALF:
        by, back = _power(_both(main, tail, TAIL))
        main, tail = (main * by).to(tl.float16), (tail * by).to(tl.float16)
    return main, tail, by, back


@triton.jit
def _rows(
    qkv,
    out,
    logsum,
    base,
    head,
    start,
    count,
    step,
    leap,
    prefix,
    heads,
    factor,
    M: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """Attention of M queries."""
    stride, column = 3 * heads * D, head * D
    token = start + tl.arange(0, M)
    at, inside = _tile(qkv, base, token, count, step, leap, prefix, stride, column, D)
    query = tl.load(at, mask=inside, other=0.0)
    column += heads * D
    key, key_tail = _load(qkv, base, count, step, leap, prefix, stride, column, MAIN, TAIL, D)
    column += heads * D
    value, value_tail = _load(qkv, base, count, step, leap, prefix, stride, column, MAIN, TAIL, D)
    key, key_tail, _, of_key = _operands(key, key_tail, TAIL, HALF)
    value, value_tail, _, of_value = _operands(value, value_tail, TAIL, HALF)
    query, _, _, of_query = _operands(query, query, 0, HALF)
    factor *= of_query * of_key
    near = tl.arange(0, MAIN)
    score = tl.where((near < count)[None, :], tl.dot(query, tl.trans(key)) * factor, float("-inf"))
    top = tl.max(score, 1)
    if TAIL:
        near = MAIN + tl.arange(0, TAIL)
        tail = tl.dot(query, tl.trans(key_tail)) * factor
        tail = tl.where((near < count)[None, :], tail, float("-inf"))
        top = tl.maximum(top, tl.max(tail, 1))
    weight = tl.exp2(score - top[:, None])
    total = tl.sum(weight, 1)
    result = tl.dot(weight.to(value.dtype), value)
    if TAIL:
        weight_tail = tl.exp2(tail - top[:, None])
        total += tl.sum(weight_tail, 1)
        result = tl.dot(weight_tail.to(value.dtype), value_tail, result)
    at, inside = _tile(out, base, token, count, step, leap, prefix, heads * D, head * D, D)
    result = result / total[:, None] * of_value
    tl.store(at, result.to(out.dtype.element_ty), mask=inside)
    tl.store(logsum + token, top + tl.log2(total), mask=token < count)


@triton.jit
def _attention_kernel(
    qkv,  # [B T, 3, heads, D]
    out,  # [B T, heads, D]
    logsum,  # [groups, heads, count], base 2
    batch,  # B
    tokens,  # T
    prefix,
    heads,
    factor,  # on scores, for powers of 2
    MAIN: tl.constexpr,  # keys of the large tile
    TAIL: tl.constexpr,  # and of the small one
    D: tl.constexpr,
    ROWS: tl.constexpr,
    LAST: tl.constexpr,  # rows of the last tile of queries, if it is a smaller one
    OVER_BATCH: tl.constexpr,
    HALF: tl.constexpr,  # whether float32 becomes float16 for products
):
    group = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    count = batch if OVER_BATCH else tokens
    base, step, leap = _place(group, batch, tokens, prefix, OVER_BATCH)
    logsum += (group * heads + head) * count
    start = tl.program_id(0) * ROWS
    if LAST and start + LAST >= count:
        _rows(
            qkv, out, logsum, base, head, start, count, step, leap, prefix, heads, factor,
            LAST, MAIN, TAIL, D, HALF,
        )  # fmt: skip
    else:
        _rows(
            qkv, out, logsum, base, head, start, count, step, leap, prefix, heads, factor,
            ROWS, MAIN, TAIL, D, HALF,
        )  # fmt: skip


@triton.jit
def _columns(key, value, query, grad, delta, logsum, near, count, factor, grad_key, grad_value):
    """Some keys' gradients with the part of some queries, and their scores' gradient."""
    score = tl.dot(key, tl.trans(query)) * factor
    weight = tl.where((near < count)[:, None], tl.exp2(score - logsum[None, :]), 0.0)
    inner = weight * (tl.dot(value, tl.trans(grad)) - delta[None, :])
    inner = inner.to(query.dtype)
    grad_value = tl.dot(weight.to(query.dtype), grad, grad_value)
    return tl.dot(inner, query, grad_key), grad_value, inner


@triton.jit
def _rows_backward(
    qkv,
    out,
    grad_out,
    logsum,
    grad_qkv,
    key,
    value,
    key_tail,
    value_tail,
    grad_key,
    grad_value,
    grad_key_tail,
    grad_value_tail,
    by_query,
    by_grad,
    by_value,
    base,
    head,
    start,
    count,
    step,
    leap,
    prefix,
    heads,
    factor,
    scale,
    M: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of M queries, and the keys' and values' with theirs added."""
    stride, column = 3 * heads * D, head * D
    token = start + tl.arange(0, M)
    at, inside = _tile(qkv, base, token, count, step, leap, prefix, stride, column, D)
    query = tl.load(at, mask=inside, other=0.0)
    at, inside = _tile(grad_out, base, token, count, step, leap, prefix, heads * D, column, D)
    grad = tl.load(at, mask=inside, other=0.0)
    at, inside = _tile(out, base, token, count, step, leap, prefix, heads * D, column, D)
    delta = tl.sum(grad.to(tl.float32) * tl.load(at, mask=inside, other=0.0).to(tl.float32), 1)
    if HALF:
        query, grad = (query * by_query).to(tl.float16), (grad * by_grad).to(tl.float16)
        delta = delta * by_grad * by_value
    norm = tl.load(logsum + token, mask=token < count, other=float("inf"))
    near = tl.arange(0, MAIN)
    grad_key, grad_value, inner = _columns(
        key, value, query, grad, delta, norm, near, count, factor, grad_key, grad_value
    )
    result = tl.dot(tl.trans(inner), key)
    if TAIL:
        near = MAIN + tl.arange(0, TAIL)
        grad_key_tail, grad_value_tail, inner = _columns(
            key_tail,
            value_tail,
            query,
            grad,
            delta,
            norm,
            near,
            count,
            factor,
            grad_key_tail,
            grad_value_tail,
        )
        result = tl.dot(tl.trans(inner), key_tail, result)
    at, inside = _tile(grad_qkv, base, token, count, step, leap, prefix, stride, column, D)
    tl.store(at, (result * scale).to(grad_qkv.dtype.element_ty), mask=inside)
    return grad_key, grad_value, grad_key_tail, grad_value_tail


@triton.jit
def _attention_backward_kernel(
    qkv,  # [B T, 3, heads, D]
    out,  # [B T, heads, D]
    grad_out,  # [B T, heads, D]
    logsum,  # [groups, heads, count]
    grad_qkv,  # [B T, 3, heads, D]
    batch,
    tokens,
    prefix,
    heads,
    factor,
    scale,  # on scores
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    FULL: tl.constexpr,  # tiles of ROWS queries
    LAST: tl.constexpr,
    OVER_BATCH: tl.constexpr,
    HALF: tl.constexpr,
):
    group = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    count = batch if OVER_BATCH else tokens
    base, step, leap = _place(group, batch, tokens, prefix, OVER_BATCH)
    logsum += (group * heads + head) * count
    stride, column = 3 * heads * D, (heads + head) * D
    key, key_tail = _load(qkv, base, count, step, leap, prefix, stride, column, MAIN, TAIL, D)
    column += heads * D
    value, value_tail = _load(qkv, base, count, step, leap, prefix, stride, column, MAIN, TAIL, D)
    by_query, of_query, by_grad, of_grad = 1.0, 1.0, 1.0, 1.0
    if HALF:  # the queries' scale, and that of their gradients, are the same for all of them
        main, tail = _load(qkv, base, count, step, leap, prefix, stride, head * D, MAIN, TAIL, D)
        by_query, of_query = _power(_both(main, tail, TAIL))
        main, tail = _load(grad_out, base, count, step, leap, prefix, heads * D, head * D, MAIN, TAIL, D)
        by_grad, of_grad = _power(_both(main, tail, TAIL))
    key, key_tail, _, of_key = _operands(key, key_tail, TAIL, HALF)
    value, value_tail, by_value, of_value = _operands(value, value_tail, TAIL, HALF)
    factor *= of_query * of_key
    of_inner = of_value * of_grad * scale
    extra: tl.constexpr = TAIL if TAIL else 16
    grad_key = tl.zeros((MAIN, D), tl.float32)
    grad_value = tl.zeros((MAIN, D), tl.float32)
    grad_key_tail = tl.zeros((extra, D), tl.float32)
    grad_value_tail = tl.zeros((extra, D), tl.float32)
    for tile in tl.range(FULL, num_stages=1):
        grad_key, grad_value, grad_key_tail, grad_value_tail = _rows_backward(
            qkv, out, grad_out, logsum, grad_qkv, key, value, key_tail, value_tail,
            grad_key, grad_value, grad_key_tail, grad_value_tail, by_query, by_grad, by_value,
            base, head, tile * ROWS, count, step, leap, prefix, heads, factor, of_inner * of_key,
            ROWS, MAIN, TAIL, D, HALF,
        )  # fmt: skip
    if LAST:
        grad_key, grad_value, grad_key_tail, grad_value_tail = _rows_backward(
            qkv, out, grad_out, logsum, grad_qkv, key, value, key_tail, value_tail,
            grad_key, grad_value, grad_key_tail, grad_value_tail, by_query, by_grad, by_value,
            base, head, FULL * ROWS, count, step, leap, prefix, heads, factor, of_inner * of_key,
            LAST, MAIN, TAIL, D, HALF,
        )  # fmt: skip
    dtype = grad_qkv.dtype.element_ty
    near = tl.arange(0, MAIN)
    column = (heads + head) * D
    at, known = _tile(grad_qkv, base, near, count, step, leap, prefix, stride, column, D)
    of_inner *= of_query
    tl.store(at, (grad_key * of_inner).to(dtype), mask=known)
    tl.store(at + heads * D, (grad_value * of_grad).to(dtype), mask=known)
    if TAIL:
        near = MAIN + tl.arange(0, TAIL)
        at, known = _tile(grad_qkv, base, near, count, step, leap, prefix, stride, column, D)
        tl.store(at, (grad_key_tail * of_inner).to(dtype), mask=known)
        tl.store(at + heads * D, (grad_value_tail * of_grad).to(dtype), mask=known)


def _above(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


def _tiles(count: int, rows: int) -> tuple[dict[str, int], int]:
    """Tiles of keys and of queries, and how many full ones of queries there are before a smaller last one."""
    main, tail = (_above(count), 0) if count <= 128 else (128, _above(count - 128))
    rows = min(rows, _above(count))
    last = _above(count % rows) if count % rows else 0
    last = last if last < rows else 0
    full = count // rows if last else triton.cdiv(count, rows)
    return {"MAIN": main, "TAIL": tail, "ROWS": rows, "LAST": last}, full


class Attention(torch.autograd.Function):
    """`qkv [B T, 3 C]` (any shape of rows) -> `[B T, C]`: softmax attention of `heads` heads.

    Over the tokens of each cloud, or with `over_batch` over the clouds of each token. The rows are those of B
    clouds; or with a `prefix`, the first tokens of all clouds before the other tokens of all clouds. Where
    torch allows TF32, operands in float32 are rounded to as many bits, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, batch: int, prefix: int, over_batch: bool) -> Tensor:
        qkv = qkv.contiguous()
        width = qkv.shape[-1] // 3
        tokens = qkv.numel() // (3 * width * batch) if batch else 0
        groups, count = (tokens, batch) if over_batch else (batch, tokens)
        out = qkv.new_empty(*qkv.shape[:-1], width)
        logsum = torch.empty(groups, heads, count, dtype=torch.float32, device=qkv.device)
        ctx.sizes = batch, tokens, prefix, heads, (width // heads) ** -0.5 / math.log(2)
        half = qkv.dtype == torch.float32 and tf32_allowed()
        ctx.flags = {"D": width // heads, "OVER_BATCH": over_batch, "HALF": half}
        ctx.save_for_backward(qkv, out, logsum)
        if qkv.numel():
            tiles, _ = _tiles(count, _ROWS)
            with torch.cuda.device_of(qkv):
                _attention_kernel[(triton.cdiv(count, tiles["ROWS"]), groups * heads)](
                    qkv, out, logsum, *ctx.sizes, **tiles, **ctx.flags, num_warps=4
                )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        qkv, out, logsum = ctx.saved_tensors
        found = torch.empty_like(qkv)
        groups, heads, count = logsum.shape
        if qkv.numel():
            tiles, full = _tiles(count, _ROWS_BACKWARD)
            _attention_backward_kernel[(groups * heads,)](
                qkv, out, grad.contiguous(), logsum, found, *ctx.sizes, ctx.sizes[-1] * math.log(2),
                FULL=full, **tiles, **ctx.flags, num_warps=8,
            )  # fmt: skip
        return found, None, None, None, None
