"""What rounding rows to float16 took from the maximum over neighbours, given back.

The kernels for sm_90a (csrc/local_aggregate/hopper_rows.cuh) add a unit's branch to rows x that they round to
float16, and round the rows between two units; TF32 leaves both in float32. The largest row is known for each
channel, so that what was rounded there can be made again, without the other rows, and the difference added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from any2point.triton._rows import _PLAIN, prepare


@triton.jit
def _wave(angle, cosine):
    """Sine or cosine, as the kernels for sm_90a take them."""
    if _PLAIN:
        wave = tl.where(cosine, tl.cos(angle), tl.sin(angle))
    else:
        sine = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        other = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
        )
        wave = tl.where(cosine, other, sine)
    return wave


@triton.jit
def _residual_kernel(
    points,  # [B, N, 3]
    features,  # [B, N, WIDTH / 2] float32
    center,  # [B, S] int64
    neighbor,  # [B, S, K] int64
    divisors,  # [B, S, 3]
    table,  # [2, WIDTH] reciprocals of wavelengths, phases
    before,  # y1 of the first of two units, [B, S, K, H] float16, or nothing
    factor,  # [2, H] what makes h of it
    weight,  # [WIDTH, H] float16
    bias,  # [WIDTH]
    argmax,  # [B, S, WIDTH] int32
    out,  # [B, S, WIDTH], in place
    beta,
    N,
    S,
    K,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    H: tl.constexpr,
    STEP: tl.constexpr,
):
    half: tl.constexpr = WIDTH // 2
    axis: tl.constexpr = 2 * (WIDTH // 6)
    group = tl.program_id(0).to(tl.int64)
    cloud = group // S
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    known = c < WIDTH
    at = group * WIDTH + c
    middle = tl.load(center + group)
    k = tl.load(argmax + at, known, 0)
    near = tl.load(neighbor + group * K + k, known, 0)
    near = tl.where(near < 0, middle, near)
    place = tl.where(c < axis, 0, tl.where(c < 2 * axis, 1, 2))
    inside = known & (near >= 0) & (near < N)
    from_ = tl.load(points + (cloud * N + near) * 3 + place, inside, 0.0)
    own = (middle >= 0) & (middle < N)
    to = tl.load(points + (cloud * N + middle) * 3 + place, known & own, 0.0)
    offset = (from_ - to) * (1.0 / tl.load(divisors + group * 3 + place, known, 1.0)) * beta
    wave = _wave(offset * tl.load(table + c, known, 0.0), tl.load(table + WIDTH + c, known, 0.0) > 0)
    row = tl.where(c < half, near, middle)
    real = known & (row >= 0) & (row < N)
    feature = tl.load(features + (cloud * N + row) * half + tl.where(c < half, c, c - half), real, 0.0)
    x = feature + wave
    rounded = (feature.to(tl.float16) + wave.to(tl.float16)).to(tl.float32)
    if before is not None:
        branch = tl.load(bias + c, known, 0.0)
        for first in range(0, H, STEP):
            j = first + tl.arange(0, STEP)
            inner = (j < H)[None, :] & known[:, None]
            y = tl.load(before + (group * K + k)[:, None] * H + j[None, :], inner, 0.0).to(tl.float32)
            scale = tl.load(factor + j, j < H, 0.0)[None, :]
            h = tl.fma(y, scale, tl.load(factor + H + j, j < H, 0.0)[None, :])
            h = tl.maximum(h.to(tl.float16), 0.0).to(tl.float32)
            by = tl.load(weight + c[:, None] * H + j[None, :], inner, 0.0).to(tl.float32)
            branch += tl.sum(h * by, 1)
        x = tl.maximum(x + branch, 0.0)
        rounded = tl.maximum(rounded + branch, 0.0).to(tl.float16).to(tl.float32)
    value = tl.load(out + at, known, 0.0)
    more = x - rounded
    tl.store(out + at, tl.where(value > 0, tl.maximum(value + more, 0.0), value), known)


def add_rounding(
    out: Tensor,
    argmax: Tensor,
    done: list[Tensor],
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    beta: float,
    guard: bool,
) -> None:
    """Changes `out`, the maximum after one or two units, where it is positive.

    `done` are the units as the passes take them (any2point/ops/_local_aggregate_passes.py).
    """
    groups, width = neighbor[..., 0].numel(), out.shape[-1]
    if groups == 0:
        return
    shared = points, center.contiguous(), neighbor.contiguous(), divisor, wavelength
    divisors, table = prepare(*shared, width, guard=guard, exact=False)
    first: list[Tensor | None] = [None] * 4
    if len(done) > 5:
        first = [done[0], torch.stack(done[1:3]), *done[3:5]]
    chunk = 64 if len(done) > 5 else 256
    _residual_kernel[(groups, triton.cdiv(width, chunk))](
        points, features, shared[1], shared[2], divisors, table, *first, argmax, out, beta,
        points.shape[1], *neighbor.shape[1:], WIDTH=width, CHUNK=chunk, H=done[0].shape[1], STEP=32,
        num_warps=2,
    )  # fmt: skip
