"""Kernels of the forward passes of local aggregation in training, and what the backward ones share.

local_aggregate_train.py calls them. A row x of M = B S K is one pair, in the order of `neighbor`. Rows are
built in chunks of channels where they are needed, in registers, and brought through the units before: their
y1 [M, H] are in memory, so that a chunk of channels needs no other one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from any2point.triton._rows import columns, geometry, relu
from any2point.triton.local_aggregate import _largest, _operand


@triton.jit
def vector(tensor, c, COUNT: tl.constexpr):
    """Elements c of `tensor` [COUNT], zero beyond."""
    return tl.load(tensor + c, c < COUNT, 0.0)


@triton.jit
def matrix(tensor, row, c, COUNT: tl.constexpr):
    """Columns c of rows `row` (int64) of `tensor` [.., COUNT], zero beyond."""
    return tl.load(tensor + row[:, None] * COUNT + c[None, :], (c < COUNT)[None, :], 0.0)


@triton.jit
def pairs_kernel(
    points,  # [B, N, 3]
    center,  # [B, S]
    neighbor,  # [B, S, K]
    divisors,  # [B, S, 3]
    near,  # out [M] int32: row of the neighbour's features, -1 for none
    middle,  # out [M] int32: of the centre's
    offset,  # out [3, M]
    beta,
    N,
    S,
    M,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < M
    at = tl.minimum(row, M - 1)
    group = at // K
    own, centre, x, y, z = geometry(points, center, neighbor, divisors, group, at - group * K, beta, N, S, K)
    tl.store(near + row, own.to(tl.int32), inside)
    tl.store(middle + row, centre.to(tl.int32), inside)
    tl.store(offset + row, x, inside)
    tl.store(offset + M + row, y, inside)
    tl.store(offset + M + M + row, z, inside)


@triton.jit
def load_pairs(near, middle, offset, at, M):
    """What `columns` needs of the rows `at` (int64)."""
    return (
        tl.load(near + at).to(tl.int64),
        tl.load(middle + at).to(tl.int64),
        tl.load(offset + at),
        tl.load(offset + (at + M)),
        tl.load(offset + (at + M + M)),
    )


@triton.jit
def factor_rows(left, scale, shift, at, c, COUNT: tl.constexpr, PRECISION: tl.constexpr):
    """Columns c of rows `at` of `left` [M, COUNT], or of ReLU(scale left + shift), as a product's operand."""
    x = matrix(left, at, c, COUNT).to(tl.float32)
    if scale is not None:
        x = relu(x * vector(scale, c, COUNT)[None, :] + vector(shift, c, COUNT)[None, :])
    return _operand(x, left.dtype.element_ty, PRECISION)


@triton.jit
def add_product(
    acc, left, scale, shift, weight, at, c, row_step, column_step, K: tl.constexpr, N: tl.constexpr,
    PIECE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [rows, columns] += `factor_rows` [rows, K] weight [K, N], which has these strides; columns c."""
    for first in tl.range(0, K, PIECE):
        k = first + tl.arange(0, PIECE)
        from_ = weight + k[:, None] * row_step + c[None, :] * column_step
        part = tl.load(from_, (k < K)[:, None] & (c < N)[None, :], 0.0)
        own = factor_rows(left, scale, shift, at, k, K, PRECISION).to(part.dtype)
        acc = tl.dot(own, part, acc, input_precision=PRECISION)
    return acc


@triton.jit
def rows_after(
    features, table, pairs, done, at, first, HIDDEN: tl.constexpr, PIECES: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, SINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channels first .. first + CHUNK of the rows `at` after the units that are done, float32."""
    near, middle, x, y, z = pairs
    value = columns(features, table, near, middle, x, y, z, first, WIDTH, CHUNK, SINE)
    c = first + tl.arange(0, CHUNK)
    for u in tl.static_range(len(HIDDEN)):
        value += vector(done[5 * u + 4], c, WIDTH)[None, :]
        value = add_product(
            value, done[5 * u], done[5 * u + 1], done[5 * u + 2], done[5 * u + 3], at, c, 1, HIDDEN[u],
            HIDDEN[u], WIDTH, PIECES[u], PRECISION,
        )  # fmt: skip
        value = relu(value)
    return value


@triton.jit
def project_kernel(
    features,  # [B N, WIDTH / 2]
    table,  # [2, WIDTH]
    near,  # [M]
    middle,  # [M]
    offset,  # [3, M]
    done,  # per unit y1 [M, HIDDEN], scale, shift [HIDDEN], weight [WIDTH, HIDDEN], bias [WIDTH]
    weight,  # [H, WIDTH]
    bias,  # [H]
    before,  # out [M, H]
    mean,  # out [tiles, H]
    spread,  # out [tiles, H]: sum of squares about it
    count,  # out [tiles]: rows
    M,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y1 = x W1' + b1 of one tile of rows and BLOCK columns, and their statistics."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    at = tl.minimum(row, M - 1)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pairs = load_pairs(near, middle, offset, at, M)
    acc = tl.zeros((ROWS, BLOCK), tl.float32) + vector(bias, h, H)[None, :]
    for first in tl.range(0, WIDTH, CHUNK):
        x = rows_after(features, table, pairs, done, at, first, HIDDEN, PIECES, WIDTH, CHUNK, SINE, PRECISION)
        c = first + tl.arange(0, CHUNK)
        inside = (h < H)[None, :] & (c < WIDTH)[:, None]
        part = tl.load(weight + h[None, :] * WIDTH + c[:, None], inside, 0.0)
        acc = tl.dot(_operand(x, part.dtype, PRECISION), part, acc, input_precision=PRECISION)
    value = acc.to(before.dtype.element_ty)
    inside = (row < M)[:, None]
    tl.store(before + row[:, None] * H + h[None, :], value, inside & (h < H)[None, :])
    value = value.to(tl.float32)
    rows = tl.minimum(M - tile * ROWS, ROWS).to(tl.float32)
    middle_ = tl.sum(tl.where(inside, value, 0.0), 0) / rows
    apart = tl.where(inside, value - middle_[None, :], 0.0)
    tl.store(mean + tile * H + h, middle_, h < H)
    tl.store(spread + tile * H + h, tl.sum(apart * apart, 0), h < H)
    tl.store(count + tile, rows)


@triton.jit
def merge_kernel(
    mean,  # [tiles, H]
    spread,  # [tiles, H]: sum of squares about it
    count,  # [tiles]
    to_mean,  # out [parts, H], as the next two of every num_programs(0)-th tile
    to_spread,
    to_count,  # out [parts]
    tiles,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    part = tl.program_id(0)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    middle = tl.zeros((ROWS, SIZE), tl.float32)
    squares = tl.zeros((ROWS, SIZE), tl.float32)
    rows = tl.zeros((ROWS,), tl.float32)
    for first in tl.range(part, tiles, tl.num_programs(0) * ROWS):
        tile = (tl.zeros((ROWS,), tl.int64) + first) + tl.arange(0, ROWS) * tl.num_programs(0)
        inside = (tile < tiles)[:, None] & (h < H)[None, :]
        at = tile[:, None] * H + h[None, :]
        more = tl.load(count + tile, tile < tiles, 0.0)
        apart = tl.load(mean + at, inside, 0.0) - middle
        share = (more / tl.maximum(rows + more, 1.0))[:, None]
        squares += tl.load(spread + at, inside, 0.0) + apart * apart * rows[:, None] * share
        middle += apart * share
        rows += more
    all_rows = tl.sum(rows, 0)
    whole = tl.sum(middle * rows[:, None], 0) / all_rows
    apart = middle - whole[None, :]
    squares += apart * apart * rows[:, None]
    tl.store(to_mean + part * H + h, whole, h < H)
    tl.store(to_spread + part * H + h, tl.sum(squares, 0), h < H)
    tl.store(to_count + part, all_rows)


@triton.jit
def in_statistics_kernel(
    mean,  # [PARTS, H]
    spread,  # [PARTS, H]: sum of squares about it
    count,  # [PARTS]
    weight,  # [H] of the normalisation
    bias,  # [H]
    to_mean,  # out [H] float64
    to_deviation,  # out [H] float64: 1 / sqrt(variance + eps)
    single,  # out [4, H]: scale, shift, mean, deviation
    eps,
    PARTS: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Statistics of all rows from those of the parts, in float64."""
    h = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    part = tl.arange(0, ROWS)
    inside = (part < PARTS)[:, None] & (h < H)[None, :]
    at = part[:, None] * H + h[None, :]
    rows = tl.load(count + part, part < PARTS, 0.0).to(tl.float64)[:, None]
    means = tl.load(mean + at, inside, 0.0).to(tl.float64)
    spreads = tl.load(spread + at, inside, 0.0).to(tl.float64)
    total = tl.sum(rows)
    whole = tl.sum(means * rows, 0) / total
    apart = means - whole[None, :]
    variance = tl.sum(spreads + apart * apart * rows, 0) / total
    deviation = 1.0 / tl.sqrt(variance + eps)
    scale = vector(weight, h, H).to(tl.float64) * deviation
    shift = vector(bias, h, H).to(tl.float64) - whole * scale
    tl.store(to_mean + h, whole, h < H)
    tl.store(to_deviation + h, deviation, h < H)
    tl.store(single + h, scale.to(tl.float32), h < H)
    tl.store(single + H + h, shift.to(tl.float32), h < H)
    tl.store(single + 2 * H + h, whole.to(tl.float32), h < H)
    tl.store(single + 3 * H + h, deviation.to(tl.float32), h < H)


@triton.jit
def maximum_kernel(
    features,  # [B N, WIDTH / 2]
    table,  # [2, WIDTH]
    near,  # [M]
    middle,  # [M]
    offset,  # [3, M]
    done,  # per unit y1 [M, HIDDEN], scale, shift [HIDDEN], weight [WIDTH, HIDDEN], bias [WIDTH]
    out,  # out [B S, WIDTH] float32
    argmax,  # out [B S, WIDTH] int32
    G,  # B S
    M,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The largest of each group's rows, one chunk of channels, and which it is: the first, not the last.

    A tile has STEP neighbours of GROUPS groups, group by group.
    """
    ROWS: tl.constexpr = GROUPS * STEP
    row = tl.arange(0, ROWS)
    start = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.minimum(start + row // STEP, G - 1)
    whole = start + tl.arange(0, GROUPS)
    first = tl.program_id(1) * CHUNK
    c = first + tl.arange(0, CHUNK)
    best = tl.full((GROUPS, CHUNK), -1.0, tl.float32)
    where = tl.zeros((GROUPS, CHUNK), tl.int32)
    for k in tl.range(0, K, STEP):
        at = group * K + tl.minimum(k + row % STEP, K - 1)  # again the last one: no new maximum
        pairs = load_pairs(near, middle, offset, at, M)
        x = rows_after(features, table, pairs, done, at, first, HIDDEN, PIECES, WIDTH, CHUNK, SINE, PRECISION)
        x = tl.reshape(x, (GROUPS, STEP, CHUNK))
        top = tl.reduce(x, 1, _largest)
        places = tl.where(x == top[:, None, :], tl.arange(0, STEP)[None, :, None], STEP)
        place = tl.minimum(k + tl.min(places, 1), K - 1)
        better = (top > best) | (top != top)
        best = tl.where(better, top, best)
        where = tl.where(better, place, where)
    to = whole[:, None] * WIDTH + c[None, :]
    inside = (whole < G)[:, None] & (c < WIDTH)[None, :]
    tl.store(out + to, best, inside)
    tl.store(argmax + to, where, inside)


@triton.jit
def outer_kernel(
    left,  # [M, H]: y1, or
    scale,  # None: left itself
    shift,
    right,  # [M, WIDTH], or None: the hidden layer on the left (WIDTH = H), or
    features,  # the rows after the units that are done; else None
    table,
    near,
    middle,
    offset,
    done,
    out,  # out [parts, H, WIDTH]
    total,  # out [parts, H]: sums of what is on the left
    M,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """left' right of every num_programs(0)-th tile of rows, BLOCK rows and CHUNK columns of it."""
    dtype = left.dtype.element_ty
    part = tl.program_id(0)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(2) * CHUNK
    c = first + tl.arange(0, CHUNK)
    acc = tl.zeros((BLOCK, CHUNK), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for tile in tl.range(part, tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        at = tl.minimum(row, M - 1)
        inside = (h < H)[:, None] & (row < M)[None, :]
        a = tl.load(left + at[None, :] * H + h[:, None], inside, 0.0).to(tl.float32)
        if scale is not None:
            a = relu(a * vector(scale, h, H)[:, None] + vector(shift, h, H)[:, None])
            a = tl.where(inside, a, 0.0)
        a = _operand(a, dtype, PRECISION)
        sums += tl.sum(a.to(tl.float32), 1)
        if features is not None:
            pairs = load_pairs(near, middle, offset, at, M)
            b = rows_after(
                features, table, pairs, done, at, first, HIDDEN, PIECES, WIDTH, CHUNK, SINE, PRECISION
            )
            b = _operand(b, dtype, PRECISION)
        elif right is not None:
            b = factor_rows(right, None, None, at, c, WIDTH, PRECISION)
        elif BLOCK >= H:
            b = tl.trans(a)
        else:
            b = factor_rows(left, scale, shift, at, c, H, PRECISION)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    to = out + part.to(tl.int64) * H * WIDTH
    tl.store(to + h[:, None] * WIDTH + c[None, :], acc, (h < H)[:, None] & (c < WIDTH)[None, :])
    tl.store(total + part * H + h, sums, (h < H) & (tl.program_id(2) == 0))
