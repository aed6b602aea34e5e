"""Kernels of the backward passes of local aggregation in training; local_aggregate_train.py calls them.

du, the gradient after a unit's last ReLU, is `dense` rows [M, C], or below the maximum one entry per group
and channel, at the neighbour `argmax`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from any2point.triton.local_aggregate import _operand
from any2point.triton.local_aggregate_train_kernels import (
    add_product,
    factor_rows,
    load_pairs,
    matrix,
    rows_after,
    vector,
)


@triton.jit
def gradient_rows(entry, argmax, dense, at, c, K: tl.constexpr, WIDTH: tl.constexpr):
    """Columns c of du of rows `at` (int64), float32."""
    if dense is not None:
        du = matrix(dense, at, c, WIDTH).to(tl.float32)
    else:
        group = at // K
        du = matrix(entry, group, c, WIDTH).to(tl.float32)
        here = matrix(argmax, group, c, WIDTH).to(tl.int32) == (at - group * K).to(tl.int32)[:, None]
        du = tl.where(here, du, 0.0)
    return du


@triton.jit
def out_sums_kernel(
    before,  # [M, H]: y1 of the last unit
    scale,  # [H]
    shift,  # [H]
    entry,  # [B S, WIDTH]
    argmax,  # [B S, WIDTH] int16
    outer,  # out [parts, WIDTH, H]
    total,  # out [parts, WIDTH]
    G,  # B S
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    H: tl.constexpr,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of du and du' h over every num_programs(2)-th group: each entry takes its row of h."""
    c = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    part = tl.program_id(2)
    acc = tl.zeros((CHUNK, SIZE), tl.float32)
    sums = tl.zeros((CHUNK,), tl.float32)
    for g in tl.range(part, G, tl.num_programs(2)):
        group = tl.zeros((CHUNK,), tl.int64) + g
        du = vector(entry + group * WIDTH, c, WIDTH).to(tl.float32)
        row = group * K + vector(argmax + group * WIDTH, c, WIDTH).to(tl.int64)
        acc += du[:, None] * factor_rows(before, scale, shift, row, h, H, PRECISION).to(tl.float32)
        sums += du
    own = outer + part.to(tl.int64) * WIDTH * H
    tl.store(own + c[:, None] * H + h[None, :], acc, (c < WIDTH)[:, None] & (h < H)[None, :])
    tl.store(total + part * WIDTH + c, sums, (c < WIDTH) & (tl.program_id(1) == 0))


@triton.jit
def hidden_grad_kernel(
    before,  # [M, H]
    scale,  # [H]
    shift,  # [H]
    entry,  # [B S, WIDTH], with
    argmax,  # [B S, WIDTH] int16, or else
    dense,  # [M, WIDTH]
    weight,  # [WIDTH, H]: p W2
    q,  # [H, H] float32: -Q', of which 16 bits would not hold small numbers
    constant,  # [H]
    mean,  # [H] of y1
    deviation,  # [H]: 1 / deviation of y1
    dz,  # out [M, H]
    plain,  # out [tiles, H]: sums of dz
    scaled,  # out [tiles, H]: and of dz times the normalised y1
    M,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dz = du p W2 - h Q + constant where h > 0, of one tile of rows and BLOCK columns."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, M - 1)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    acc = add_product(acc, before, scale, shift, q, at, h, 1, H, H, H, PIECE, PRECISION)
    acc += vector(constant, h, H)[None, :]
    for first in tl.range(0, WIDTH, CHUNK):
        c = first + tl.arange(0, CHUNK)
        part = tl.load(weight + c[:, None] * H + h[None, :], (c < WIDTH)[:, None] & (h < H)[None, :], 0.0)
        du = _operand(gradient_rows(entry, argmax, dense, at, c, K, WIDTH), part.dtype, PRECISION)
        acc = tl.dot(du, part, acc, input_precision=PRECISION)
    y = matrix(before, at, h, H).to(tl.float32)
    positive = y * vector(scale, h, H)[None, :] + vector(shift, h, H)[None, :] > 0
    inside = (row < M)[:, None] & (h < H)[None, :]
    grad = tl.where(positive & inside, acc, 0.0).to(dz.dtype.element_ty)
    tl.store(dz + row[:, None] * H + h[None, :], grad, inside)
    grad = grad.to(tl.float32)
    normed = (y - vector(mean, h, H)[None, :]) * vector(deviation, h, H)[None, :]
    tl.store(plain + tile * H + h, tl.sum(grad, 0), h < H)
    tl.store(scaled + tile * H + h, tl.sum(grad * normed, 0), h < H)


@triton.jit
def before_grad_kernel(
    before,  # [M, H]
    dz,  # [M, H], in: dz; out: dy1
    mean,  # [H], as the next four
    deviation,
    factor,
    m1,
    m2,
    by_center,  # out [B S, H] float32: sums of dy1 over the neighbours
    G,  # B S
    K: tl.constexpr,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """dy1 = factor (dz - m1 - normed m2) of some groups and SIZE columns."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (group < G)[:, None] & (h < H)[None, :]
    own_mean = vector(mean, h, H)[None, :]
    own_factor = vector(factor, h, H)[None, :]
    own_m1 = vector(m1, h, H)[None, :]
    own_m2 = (vector(deviation, h, H) * vector(m2, h, H))[None, :]
    acc = tl.zeros((GROUPS, SIZE), tl.float32)
    at = (group * K)[:, None] * H + h[None, :]
    for _ in tl.range(0, K):
        y = tl.load(before + at, inside, 0.0).to(tl.float32)
        grad = tl.load(dz + at, inside, 0.0).to(tl.float32)
        grad = (own_factor * (grad - own_m1 - (y - own_mean) * own_m2)).to(dz.dtype.element_ty)
        tl.store(dz + at, grad, inside)
        acc += grad.to(tl.float32)
        at += H
    tl.store(by_center + group[:, None] * H + h[None, :], acc, inside)


@triton.jit
def below_kernel(
    features,  # [B N, WIDTH / 2]
    table,  # [2, WIDTH]
    near,  # [M]
    middle,  # [M]
    offset,  # [3, M]
    done,  # per unit y1 [M, HIDDEN], scale, shift [HIDDEN], weight [WIDTH, HIDDEN], bias [WIDTH]
    dy,  # [M, H]: dy1
    weight,  # [H, WIDTH]: W1
    entry,  # [B S, WIDTH], with
    argmax,  # [B S, WIDTH] int16, or else
    dense,  # [M, WIDTH]: du
    below,  # out [M, WIDTH]: du of the unit below; may be `dense`
    total,  # out [tiles, WIDTH]: its sums
    M,
    K: tl.constexpr,
    H: tl.constexpr,
    PIECE: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """du + dy1 W1 where x > 0, of one tile of rows and one chunk of channels."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, M - 1)
    first = tl.program_id(1) * CHUNK
    c = first + tl.arange(0, CHUNK)
    pairs = load_pairs(near, middle, offset, at, M)
    x = rows_after(features, table, pairs, done, at, first, HIDDEN, PIECES, WIDTH, CHUNK, SINE, PRECISION)
    grad = gradient_rows(entry, argmax, dense, at, c, K, WIDTH)
    grad = add_product(grad, dy, None, None, weight, at, c, WIDTH, 1, H, WIDTH, PIECE, PRECISION)
    inside = (row < M)[:, None] & (c < WIDTH)[None, :]
    grad = tl.where((x > 0) & inside, grad, 0.0).to(below.dtype.element_ty)
    tl.store(below + row[:, None] * WIDTH + c[None, :], grad, inside)
    tl.store(total + tile * WIDTH + c, tl.sum(grad.to(tl.float32), 0), c < WIDTH)


@triton.jit
def point_sums_kernel(
    entry,  # [B S, WIDTH], with
    argmax,  # [B S, WIDTH] int16, or else
    dense,  # [M, WIDTH]
    start,  # [B N + 1]: where each point's pairs begin
    order,  # [M]: pairs by their neighbour
    out,  # out [B N, COUNT] float32
    K: tl.constexpr,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Sums of SIZE of the first COUNT columns over the pairs of one point."""
    point = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    end = tl.load(start + point + 1)
    acc = tl.zeros((ROWS, SIZE), tl.float32)
    for first in tl.range(tl.load(start + point), end, ROWS):
        pair = first + tl.arange(0, ROWS)
        row = tl.load(order + pair, pair < end, 0)
        value = gradient_rows(entry, argmax, dense, row, c, K, WIDTH)
        acc += tl.where((pair < end)[:, None], value, 0.0)
    tl.store(out + point * COUNT + c, tl.sum(acc, 0), c < COUNT)


@triton.jit
def group_sums_kernel(
    dense,  # [M, WIDTH]
    out,  # out [B S, WIDTH / 2]
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The second half of du, summed over the neighbours of one group."""
    half: tl.constexpr = WIDTH // 2
    group = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    acc = tl.zeros((SIZE,), tl.float32)
    for k in tl.range(0, K):
        acc += vector(dense + (group * K + k) * WIDTH + half, c, half).to(tl.float32)
    tl.store(out + group * half + c, acc, c < half)
