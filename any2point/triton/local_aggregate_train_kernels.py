"""Kernels of the forward passes of local aggregation in training, see local_aggregate_train.py.

Whatever has one row per pair is ordered (slice, k, group): a slice is TILE groups, fewer at the end, whose
rows stand together, and within it the rows of one k. So the maximum and sums over a group are elementwise,
and neighbouring groups contiguous. All kernels are elementwise or reduce in a fixed order; products are
torch's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from any2point.triton._rows import columns, geometry, relu


@triton.jit
def of_row(row, TILE, K, G):
    """Group and k of a row (int64)."""
    begin = row // (TILE * K) * TILE
    count = tl.minimum(TILE, G - begin)
    inside = row - begin * K
    return begin + inside % count, inside // count


@triton.jit
def row_of(group, TILE, K, G):
    """The row of a group (int64) and its first neighbour, and the distance to that of the next neighbour."""
    begin = group // TILE * TILE
    return begin * K + group - begin, tl.minimum(TILE, G - begin)


@triton.jit
def rounded(x, like, TF32: tl.constexpr):
    """x, float32, as the factor of a product of `like`'s dtype."""
    if like.dtype.element_ty == tl.float32:
        if TF32:
            near = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
            x = tl.where(x == x, near.to(tl.float32, bitcast=True), x)
    else:
        x = x.to(like.dtype.element_ty)
    return x


@triton.jit
def vector(tensor, c, count):
    return tl.load(tensor + c, c < count, 0.0)[None, :]


@triton.jit
def pairs_kernel(
    points,  # [B, N, 3]
    center,  # [B, S]
    neighbor,  # [B, S, K]
    divisors,  # [B, S, 3]
    near,  # out [M] int32, row of the neighbour's features, -1 for none
    middle,  # out [M] int32, of the centre's
    offset,  # out [3, M]
    beta,
    N,
    S,
    K,
    G,
    M,
    TILE,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < M
    group, k = of_row(tl.minimum(row, M - 1), TILE, K, G)
    own, centre, x, y, z = geometry(points, center, neighbor, divisors, group, k, beta, N, S, K)
    tl.store(near + row, own.to(tl.int32), inside)
    tl.store(middle + row, centre.to(tl.int32), inside)
    tl.store(offset + row, x, inside)
    tl.store(offset + M + row, y, inside)
    tl.store(offset + 2 * M + row, z, inside)


@triton.jit
def first_rows(
    features,
    table,
    near,
    middle,
    offset,
    at,
    first,
    M,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SINE: tl.constexpr,
):
    """Channels first .. first + CHUNK of the rows x at `at` (int64), float32."""
    return columns(
        features, table, tl.load(near + at).to(tl.int64), tl.load(middle + at).to(tl.int64),
        tl.load(offset + at), tl.load(offset + M + at), tl.load(offset + 2 * M + at), first, WIDTH, CHUNK,
        SINE,
    )  # fmt: skip


@triton.jit
def rows_kernel(
    features,  # [B N, WIDTH / 2]
    table,  # [2, WIDTH]
    near,  # [M]
    middle,  # [M]
    offset,  # [3, M]
    added,  # [rows, WIDTH] and
    bias,  # [WIDTH], or None
    out,  # out [rows, WIDTH]; may be `added`
    first,  # row of M
    rows,
    M,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SINE: tl.constexpr,
    TF32: tl.constexpr,
):
    """x, or ReLU(x + added + bias), of rows first .. first + rows, one chunk of channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = first + tl.minimum(row, rows - 1).to(tl.int64)
    begin = tl.program_id(1) * CHUNK
    value = first_rows(features, table, near, middle, offset, at, begin, M, WIDTH, CHUNK, SINE)
    c = begin + tl.arange(0, CHUNK)
    inside = (row < rows)[:, None] & (c < WIDTH)[None, :]
    to = row.to(tl.int64)[:, None] * WIDTH + c[None, :]
    if added is not None:
        value = relu(value + (tl.load(added + to, inside, 0.0).to(tl.float32) + vector(bias, c, WIDTH)))
    tl.store(out + to, rounded(value, out, TF32), inside)


@triton.jit
def finish_kernel(
    x,  # [rows, WIDTH]
    added,  # [rows, WIDTH]
    bias,  # [WIDTH]
    rows,
    WIDTH,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    TF32: tl.constexpr,
):
    """x = ReLU(x + added + bias), in place."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    at = row[:, None] * WIDTH + c[None, :]
    inside = (row < rows)[:, None] & (c < WIDTH)[None, :]
    value = tl.load(added + at, inside, 0.0).to(tl.float32) + vector(bias, c, WIDTH)
    value += tl.load(x + at, inside, 0.0).to(tl.float32)
    tl.store(x + at, rounded(relu(value), x, TF32), inside)


@triton.jit
def statistics_kernel(
    before,  # [M, H]
    mean,  # out [programs, H]
    spread,  # out [programs, H]
    count,  # out [programs]
    H,
    M,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Mean and squared spread of SIZE columns over every num_programs(0)-th tile of rows."""
    program = tl.program_id(0)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    # Sums are taken about the first row.
    base = before + (tl.zeros((SIZE,), tl.int64) + program * ROWS) * H
    shift = tl.load(base + h, h < H, 0.0).to(tl.float32)
    sums = tl.zeros((ROWS, SIZE), tl.float32)
    squares = tl.zeros((ROWS, SIZE), tl.float32)
    rows = tl.zeros((ROWS,), tl.float32)
    for tile in range(program, tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (h < H)[None, :]
        value = tl.load(before + row[:, None] * H + h[None, :], inside, 0.0).to(tl.float32)
        apart = tl.where(inside, value - shift[None, :], 0.0)
        sums += apart
        squares += apart * apart
        rows += (row < M).to(tl.float32)
    total = tl.sum(sums, 0)
    all_rows = tl.sum(rows, 0)
    part = total / all_rows
    tl.store(mean + program * H + h, shift + part, h < H)
    tl.store(spread + program * H + h, tl.sum(squares, 0) - total * part, h < H)
    tl.store(count + program, all_rows)


@triton.jit
def hidden_kernel(
    before,  # [rows, H]
    scale,  # [H]
    shift,  # [H]
    out,  # out [rows, H]
    total,  # out [programs, H], or None
    H,
    rows,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
    TF32: tl.constexpr,
):
    """h = ReLU(scale y1 + shift) for SIZE columns of every num_programs(0)-th tile of rows, and its sums."""
    program = tl.program_id(0)
    h = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    sums = tl.zeros((ROWS, SIZE), tl.float32)
    for tile in range(program, tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tl.zeros((ROWS,), tl.int64) + tile) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (h < H)[None, :]
        at = row[:, None] * H + h[None, :]
        y = tl.load(before + at, inside, 0.0).to(tl.float32)
        value = rounded(relu(y * vector(scale, h, H) + vector(shift, h, H)), out, TF32)
        tl.store(out + at, value, inside)
        sums += tl.where(inside, value.to(tl.float32), 0.0)
    if total is not None:
        tl.store(total + program * H + h, tl.sum(sums, 0), h < H)


@triton.jit
def maximum_kernel(
    features, table, near, middle, offset,
    x,  # [count K, WIDTH]: the last unit's rows, a slice; None for the first unit
    added,  # [count K, WIDTH]
    bias,  # [WIDTH]
    out,  # out [B S, WIDTH] float32
    argmax,  # out [B S, WIDTH] int32
    first,  # group
    count,
    K,
    M,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    SINE: tl.constexpr,
):  # fmt: skip
    """ReLU(x + added + bias): its maximum over the neighbours, and where."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    begin = tl.program_id(1) * CHUNK
    c = begin + tl.arange(0, CHUNK)
    inside = (group < count)[:, None] & (c < WIDTH)[None, :]
    at = group.to(tl.int64)[:, None] * WIDTH + c[None, :]
    row = tl.minimum(group, count - 1) + tl.zeros((GROUPS,), tl.int64) + first * K
    shift = vector(bias, c, WIDTH)
    best = tl.full((GROUPS, CHUNK), -1.0, tl.float32)
    where = tl.zeros((GROUPS, CHUNK), tl.int32)
    for k in range(0, K):
        value = tl.load(added + at, inside, 0.0).to(tl.float32) + shift
        if x is not None:
            value += tl.load(x + at, inside, 0.0).to(tl.float32)
        else:
            value += first_rows(features, table, near, middle, offset, row, begin, M, WIDTH, CHUNK, SINE)
        value = relu(value)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        where = tl.where(better, k, where)
        at += count * WIDTH
        row += count
    to = (first + group).to(tl.int64)[:, None] * WIDTH + c[None, :]
    tl.store(out + to, best, inside)
    tl.store(argmax + to, where, inside)
