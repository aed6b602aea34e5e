"""Kernels of the backward passes of local aggregation, see local_aggregate_train_backward.py."""

from __future__ import annotations

import triton
import triton.language as tl

from any2point.triton.local_aggregate_train_kernels import of_row, rounded, row_of, vector


@triton.jit
def out_sums_kernel(
    before,  # [M, H]: y1 of the last unit
    scale,  # [H]
    shift,  # [H]
    entry,  # [B S, WIDTH]
    argmax,  # [B S, WIDTH] uint8 or int32
    outer,  # out [parts, WIDTH, H]
    TILE,
    K,
    G,
    WIDTH,
    H,
    CHUNK: tl.constexpr,
    SIZE: tl.constexpr,
    TF32: tl.constexpr,
):
    """du' h of some channels and every num_programs(2)-th group: each entry takes its row of h."""
    c = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (c < WIDTH)[:, None] & (h < H)[None, :]
    acc = tl.zeros((CHUNK, SIZE), tl.float32)
    for g in range(tl.program_id(2), G, tl.num_programs(2)):
        group = tl.zeros((CHUNK,), tl.int64) + g
        at = group * WIDTH + c
        du = tl.load(entry + at, c < WIDTH, 0.0).to(tl.float32)
        row, step = row_of(group, TILE, K, G)
        row += tl.load(argmax + at, c < WIDTH, 0).to(tl.int64) * step
        y = tl.load(before + row[:, None] * H + h[None, :], inside, 0.0).to(tl.float32)
        value = tl.maximum(y * vector(scale, h, H) + vector(shift, h, H), 0.0)
        acc += du[:, None] * rounded(value, before, TF32).to(tl.float32)
    own = outer + tl.program_id(2).to(tl.int64) * WIDTH * H
    tl.store(own + c[:, None] * H + h[None, :], acc, inside)


@triton.jit
def sparse_rows_kernel(
    entry,  # [B S, WIDTH]
    start,  # [B S, K + 1]
    order,  # [B S WIDTH]: entries of each group by the row they belong to
    weight,  # [WIDTH, H]
    out,  # out [M, H]
    TILE,
    K,
    G,
    WIDTH,
    H,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """du weight for some rows of one group and SIZE columns."""
    group = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    h = tl.program_id(2) * SIZE + tl.arange(0, SIZE)
    begin = tl.load(start + group * (K + 1) + k, k < K, 0)
    end = tl.load(start + group * (K + 1) + k + 1, k < K, 0)
    acc = tl.zeros((ROWS, SIZE), tl.float32)
    for t in range(0, tl.max(end - begin, 0)):
        here = begin + t < end
        at = tl.load(order + begin + t, here, 0)
        value = tl.load(entry + at, here, 0.0).to(tl.float32)
        inside = here[:, None] & (h < H)[None, :]
        acc += value[:, None] * tl.load(weight + (at % WIDTH)[:, None] * H + h[None, :], inside, 0.0).to(
            tl.float32
        )
    row, step = row_of(group, TILE, K, G)
    row += k * step
    inside = (k < K)[:, None] & (h < H)[None, :]
    tl.store(out + row[:, None] * H + h[None, :], acc.to(out.dtype.element_ty), inside)


@triton.jit
def hidden_grad_kernel(
    before,  # [M, H]
    scale,  # [H]
    shift,  # [H]
    constant,  # [H]
    norm,  # [2, H]: mean and 1 / deviation of y1
    dz,  # [M, H], in: du W2 - h Q; out: dz
    sums,  # out [2, programs, H]: of dz, and of dz times the normalised y1
    H,
    M,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """dz = (du W2 - h Q + constant) where h > 0, SIZE columns of every num_programs(0)-th tile of rows."""
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    plain = tl.zeros((ROWS, SIZE), tl.float32)
    scaled = tl.zeros((ROWS, SIZE), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (h < H)[None, :]
        at = row[:, None] * H + h[None, :]
        y = tl.load(before + at, inside, 0.0).to(tl.float32)
        grad = tl.load(dz + at, inside, 0.0).to(tl.float32) + vector(constant, h, H)
        positive = y * vector(scale, h, H) + vector(shift, h, H) > 0
        grad = tl.where(positive & inside, grad, 0.0)
        tl.store(dz + at, grad.to(dz.dtype.element_ty), inside)
        plain += grad
        scaled += grad * (y - vector(norm, h, H))
    own = sums + tl.program_id(0) * H + h
    tl.store(own, tl.sum(plain, 0), h < H)
    deviation = tl.load(norm + H + h, h < H, 0.0)
    tl.store(own + tl.num_programs(0) * H, tl.sum(scaled, 0) * deviation, h < H)


@triton.jit
def before_grad_kernel(
    before,  # [M, H]
    dz,  # [M, H], in: dz; out: dy1
    norm,  # [5, H]: mean, 1 / deviation, factor, m1, m2
    by_center,  # out [B S, H]: sums of dy1 over the neighbours
    TILE,
    K,
    G,
    H,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    TF32: tl.constexpr,
):
    """dy1 = factor (dz - m1 - normed m2) of some groups and SIZE columns."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = (group < G)[:, None] & (h < H)[None, :]
    row, step = row_of(tl.minimum(group, G - 1), TILE, K, G)
    mean = vector(norm, h, H)
    factor = vector(norm + 2 * H, h, H)
    m1 = vector(norm + 3 * H, h, H)
    m2 = vector(norm + H, h, H) * vector(norm + 4 * H, h, H)
    acc = tl.zeros((GROUPS, SIZE), tl.float32)
    for _ in range(0, K):
        at = row[:, None] * H + h[None, :]
        y = tl.load(before + at, inside, 0.0).to(tl.float32)
        grad = tl.load(dz + at, inside, 0.0).to(tl.float32)
        grad = rounded(factor * (grad - m1 - (y - mean) * m2), dz, TF32)
        tl.store(dz + at, grad, inside)
        acc += grad.to(tl.float32)
        row += step
    tl.store(by_center + group[:, None] * H + h[None, :], acc, inside)


@triton.jit
def below_kernel(
    x,  # [rows, WIDTH]: the unit's rows, a slice
    entry,  # [B S, WIDTH], with
    argmax,  # [B S, WIDTH], or else
    dense,  # [M, WIDTH]: du
    below,  # [M, WIDTH], in: dy1 W1; out: du of the unit below
    total,  # out [programs, WIDTH]: sums of the latter
    first,  # group of the slice
    count,
    K,
    WIDTH,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    TF32: tl.constexpr,
):
    """du + dy1 W1 where x > 0, of SIZE columns of every num_programs(0)-th tile of rows."""
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    sums = tl.zeros((ROWS, SIZE), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(count * K, ROWS), tl.num_programs(0)):
        own = tile * ROWS + tl.arange(0, ROWS)
        inside = (own < count * K)[:, None] & (c < WIDTH)[None, :]
        start = tl.zeros((ROWS,), tl.int64) + first
        at = (start * K + own)[:, None] * WIDTH + c[None, :]
        grad = tl.load(below + at, inside, 0.0).to(tl.float32)
        if dense is not None:
            grad += tl.load(dense + at, inside, 0.0).to(tl.float32)
        else:
            to = (start + own % count)[:, None] * WIDTH + c[None, :]
            hit = inside & (tl.load(argmax + to, inside, 0) == (own // count)[:, None])
            grad += tl.load(entry + to, hit, 0.0).to(tl.float32)
        value = tl.load(x + own[:, None] * WIDTH + c[None, :], inside, 0.0)
        found = rounded(tl.where(value > 0, grad, 0.0), below, TF32)
        tl.store(below + at, found, inside)
        sums += found.to(tl.float32)
    tl.store(total + tl.program_id(0) * WIDTH + c, tl.sum(sums, 0), c < WIDTH)


@triton.jit
def points_grad_kernel(
    dy,  # [M, H]
    entry,  # [B S, WIDTH], with
    argmax,  # [B S, WIDTH], or else
    dense,  # [M, WIDTH]: du
    start,  # [B N + 1]
    order,  # [M]
    by_neighbor,  # out [B N, H]
    direct,  # out [B N, WIDTH / 2]
    TILE,
    K,
    G,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,  # of a block of columns
):
    """Sums of dy1 and of the first half of du over the pairs of one point."""
    point = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = WIDTH // 2
    begin = tl.load(start + point)
    end = tl.load(start + point + 1)
    for first in tl.static_range(0, H, SIZE):
        h = first + tl.arange(0, SIZE)
        acc = tl.zeros((ROWS, SIZE), tl.float32)
        for i in range(begin, end, ROWS):
            entries = i + tl.arange(0, ROWS)
            row = tl.load(order + entries, entries < end, 0).to(tl.int64)
            inside = (entries < end)[:, None] & (h < H)[None, :]
            acc += tl.load(dy + row[:, None] * H + h[None, :], inside, 0.0).to(tl.float32)
        tl.store(by_neighbor + point * H + h, tl.sum(acc, 0), h < H)
    for first in tl.static_range(0, half, SIZE):
        c = first + tl.arange(0, SIZE)
        acc = tl.zeros((ROWS, SIZE), tl.float32)
        for i in range(begin, end, ROWS):
            entries = i + tl.arange(0, ROWS)
            row = tl.load(order + entries, entries < end, 0).to(tl.int64)
            inside = (entries < end)[:, None] & (c < half)[None, :]
            if dense is not None:
                acc += tl.load(dense + row[:, None] * WIDTH + c[None, :], inside, 0.0).to(tl.float32)
            else:
                group, k = of_row(row, TILE, K, G)
                to = group[:, None] * WIDTH + c[None, :]
                hit = inside & (tl.load(argmax + to, inside, 0) == k[:, None])
                acc += tl.load(entry + to, hit, 0.0).to(tl.float32)
        tl.store(direct + point * half + c, tl.sum(acc, 0), c < half)


@triton.jit
def group_sums_kernel(
    dense,  # [M, WIDTH]
    out,  # [B S, WIDTH / 2]
    TILE,
    K,
    G,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
):
    """The second half of du, summed over the neighbours of one group."""
    group = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = WIDTH // 2
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    row, step = row_of(group, TILE, K, G)
    acc = tl.zeros((SIZE,), tl.float32)
    for _ in range(0, K):
        acc += tl.load(dense + row * WIDTH + half + c, c < half, 0.0).to(tl.float32)
        row += step
    tl.store(out + group * half + c, acc, c < half)
