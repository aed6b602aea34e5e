"""The rows x [B S K, C] of local aggregation, shared by its kernels: gather, offsets, sinusoid.

Row (b, s, k) is concat(features[neighbor], features[center]) + P(offset / divisor); see
any2point/reference/local_aggregate.py. A kernel calls `geometry` once for its rows and `columns` for each
chunk of channels. `prepare` computes before it what groups and channels share.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
_PLAIN = tl.constexpr(INTERPRETED)
_GROUPS = 16  # groups of a program of `_prepare_kernel`


def prepare(
    points: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    width: int,
    *,
    guard: bool,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    """What divides the offsets of each group, `[B, S, 3]`, and the table of channels `[2, width]`.

    The table has the wavelength of each channel (its reciprocal unless `exact`), and its phase: pi / 2 for
    cosines. `divisor` `[B]` takes the place of the largest offset of a group; all tensors are contiguous.
    """
    batch, centers, neighbors = neighbor.shape
    divisors = torch.empty(batch, centers, 3, dtype=torch.float32, device=points.device)
    table = torch.empty(2, width, dtype=torch.float32, device=points.device)
    grid = (triton.cdiv(batch * centers, _GROUPS) + 1,)
    _prepare_kernel[grid](
        points, center, neighbor, divisor, wavelength, divisors, table,
        points.shape[1], centers, batch * centers,
        K=neighbors, WIDTH=width, GUARD=guard, EXACT=exact, GROUPS=_GROUPS, STEP=32, CHANNELS=256,
    )  # fmt: skip
    return divisors, table


@triton.jit
def _prepare_kernel(
    points,  # [B, N, 3] float32
    center,  # [B, S] int64
    neighbor,  # [B, S, K] int64
    divisor,  # [B] float32, or None
    wavelength,  # [WIDTH // 6] float32
    divisors,  # out [B, S, 3]
    table,  # out [2, WIDTH]
    N,
    S,
    G,  # B S
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    GUARD: tl.constexpr,
    EXACT: tl.constexpr,
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    if tl.program_id(0) == tl.num_programs(0) - 1:  # the table
        count: tl.constexpr = WIDTH // 6
        for first in range(0, WIDTH, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            place = c % max(2 * count, 1)
            encoded = c < 6 * count
            cosine = (place >= count) & encoded
            length = tl.load(wavelength + tl.where(cosine, place - count, place), encoded, float("inf"))
            if not EXACT:
                length = 1.0 / length
            tl.store(table + c, length, c < WIDTH)
            tl.store(table + WIDTH + c, tl.where(cosine, 1.5707963267948966, 0.0), c < WIDTH)
    else:
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        group = tl.minimum(group, G - 1)
        cloud = group // S
        if divisor is not None:
            x = tl.load(divisor + cloud)
            y = x
            z = x
        else:
            middle = tl.load(center + group)
            cx, cy, cz = _point(points, cloud, middle, N)
            x = tl.zeros((GROUPS,), tl.float32)
            y = tl.zeros((GROUPS,), tl.float32)
            z = tl.zeros((GROUPS,), tl.float32)
            for first in range(0, K, STEP):
                k = tl.minimum(first + tl.arange(0, STEP), K - 1)  # again the last one: no new maximum
                near = tl.load(neighbor + group[:, None] * K + k[None, :])
                near = tl.where(near < 0, middle[:, None], near)
                px, py, pz = _point(points, cloud[:, None], near, N)
                x = tl.maximum(x, tl.max(tl.abs(px - cx[:, None]), 1))
                y = tl.maximum(y, tl.max(tl.abs(py - cy[:, None]), 1))
                z = tl.maximum(z, tl.max(tl.abs(pz - cz[:, None]), 1))
            if GUARD:
                x = tl.where(x > 1.1754943508222875e-38, x, 1.0)
                y = tl.where(y > 1.1754943508222875e-38, y, 1.0)
                z = tl.where(z > 1.1754943508222875e-38, z, 1.0)
        tl.store(divisors + group * 3, x)
        tl.store(divisors + group * 3 + 1, y)
        tl.store(divisors + group * 3 + 2, z)


@triton.jit
def _point(points, cloud, index, N):
    """Coordinates of rows `index` of `cloud`: zero for -1, NaN for what is no row."""
    inside = (index >= 0) & (index < N)
    at = points + (cloud * N + index) * 3
    wrong = tl.where(inside | (index == -1), 0.0, float("nan"))
    x = tl.load(at, inside, 0.0) + wrong
    y = tl.load(at + 1, inside, 0.0) + wrong
    z = tl.load(at + 2, inside, 0.0) + wrong
    return x, y, z


@triton.jit
def geometry(points, center, neighbor, divisors, group, k, beta, N, S, K):
    """Of rows (group, k), each [M] with group int64: where their features are, and their scaled offset.

    near, middle: rows of the features [B N, C / 2] of the neighbour and of the centre, -1 for none;
    x, y, z: beta * offset / divisor.
    """
    cloud = group // S
    middle = tl.load(center + group)
    near = tl.load(neighbor + group * K + k)
    near = tl.where(near < 0, middle, near)
    cx, cy, cz = _point(points, cloud, middle, N)
    px, py, pz = _point(points, cloud, near, N)
    x = tl.div_rn(px - cx, tl.load(divisors + group * 3)) * beta
    y = tl.div_rn(py - cy, tl.load(divisors + group * 3 + 1)) * beta
    z = tl.div_rn(pz - cz, tl.load(divisors + group * 3 + 2)) * beta
    base = cloud * N
    near = tl.where((near >= 0) & (near < N), base + near, -1)
    middle = tl.where((middle >= 0) & (middle < N), base + middle, -1)
    return near, middle, x, y, z


@triton.jit
def _exact_wave(offset, length, cosine):
    """Sine or cosine of offset / length within 1e-7, up to angles of 1e5; 0 for an infinite length."""
    if _PLAIN:  # the interpreter rounds twice in an fma
        angle = tl.div_rn(tl.broadcast_to(offset, (offset.shape[0], length.shape[1])), length)
        return tl.where(cosine, tl.cos(angle), tl.sin(angle))
    inverse = 1.0 / length
    length = tl.where(inverse > 0, length, 1.0)
    angle = offset * inverse
    angle = tl.fma(tl.fma(-angle, length, offset), inverse, angle)  # the quotient's rounding
    quarter = (angle * 0.63661977236758134 + 12582912.0) - 12582912.0  # to a whole number
    r = tl.fma(quarter, -1.5707963705062866, angle)
    r = tl.fma(quarter, 4.371139000186243e-08, r)
    r = tl.maximum(tl.minimum(r, 1.0, tl.PropagateNan.ALL), -1.0, tl.PropagateNan.ALL)
    s = r * r
    sine = tl.fma(tl.fma(tl.fma(s, -1.9515295891e-4, 8.3321608736e-3), s, -1.6666654611e-1), s * r, r)
    even = tl.fma(tl.fma(s, 2.443315711809948e-5, -1.388731625493765e-3), s, 4.166664568298827e-2)
    even = tl.fma(even, s * s, tl.fma(s, -0.5, 1.0))
    turn = quarter.to(tl.int32) + tl.where(cosine, 1, 0)
    wave = tl.where((turn & 1) == 1, even, sine)
    return tl.where((turn & 2) == 2, -wave, wave)


@triton.jit
def columns(
    features,  # [B N, WIDTH / 2]
    table,  # [2, WIDTH]
    near,  # [M] int64
    middle,  # [M] int64
    x,  # [M]
    y,  # [M]
    z,  # [M]
    first,  # the first channel
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    SINE: tl.constexpr,  # "exact"; "fast": 2e-6 (and 2^-24 of the angle) off; "plain": the same, interpreted
):
    """Channels first .. first + CHUNK of the rows, [M, CHUNK] float32; those beyond WIDTH are zero."""
    half: tl.constexpr = WIDTH // 2
    axis: tl.constexpr = 2 * (WIDTH // 6)
    c = first + tl.arange(0, CHUNK)
    if half % CHUNK == 0:  # a chunk has one source
        own = first >= half
        row = tl.where(own, middle, near)
        at = (features + row * half)[:, None] + (c - tl.where(own, half, 0))[None, :]
        feature = tl.load(at, (row >= 0)[:, None], 0.0)
    else:  # two loads whose addresses are contiguous
        own = (c >= half)[None, :]
        feature = tl.load(features + (near * half)[:, None] + c[None, :], (near >= 0)[:, None] & ~own, 0.0)
        at = features + (middle * half)[:, None] + (c - half)[None, :]
        other = tl.load(at, (middle >= 0)[:, None] & own & (c < WIDTH)[None, :], 0.0)
        feature = tl.where(own, other, feature)
    if WIDTH % 6 == 0 and axis % CHUNK == 0:  # and one axis
        offset = tl.where(first < axis, x, tl.where(first < 2 * axis, y, z))[:, None]
    else:
        offset = tl.where(
            (c < axis)[None, :], x[:, None], tl.where((c < 2 * axis)[None, :], y[:, None], z[:, None])
        )
    length = tl.load(table + c, c < WIDTH, float("inf") if SINE == "exact" else 0.0)
    phase = tl.load(table + WIDTH + c, c < WIDTH, 0.0)
    if SINE == "exact":
        wave = _exact_wave(offset, length[None, :], (phase > 0)[None, :])
    else:
        angle = offset * length[None, :] + phase[None, :]
        if SINE == "plain":
            wave = tl.sin(angle)
        else:  # pure, so that copies of it in layouts that turn out to be unused are dropped
            wave = tl.inline_asm_elementwise(
                "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
            )
    return feature.to(tl.float32) + wave


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
