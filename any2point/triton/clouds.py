"""What a model does with a batch of clouds before the first search, in one launch each instead of a dozen.

A program takes a cloud, whose points it reads twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _point(points, row, known):
    """Coordinates of some rows `[R, 3]`, NaN beyond the known ones."""
    x = tl.load(points + 3 * row, mask=known, other=float("nan"))
    y = tl.load(points + 3 * row + 1, mask=known, other=float("nan"))
    z = tl.load(points + 3 * row + 2, mask=known, other=float("nan"))
    return x, y, z


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _counted(points, features, row, at, N, FEATURES: tl.constexpr):
    """Coordinates of the rows, and which of them count: at a place in the cloud, and finite."""
    known = at < N
    x, y, z = _point(points, row, known)
    valid = known & _is_finite(x) & _is_finite(y) & _is_finite(z)
    for channel in tl.static_range(FEATURES):
        more = tl.load(features + row * FEATURES + channel, mask=known, other=0.0)
        valid &= _is_finite(more.to(tl.float32))
    return x, y, z, valid


@triton.jit
def _prepare_kernel(
    points,  # [B, N, 3]
    features,  # [B, N, FEATURES], or nothing
    out,  # [B, N, 3]
    N,
    limit,
    CENTER: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    cloud = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total_x = tl.zeros((BLOCK,), tl.float64)
    total_y = tl.zeros((BLOCK,), tl.float64)
    total_z = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.int32)
    if CENTER:
        first = cloud * 0
        while first < N:
            at = first + lane
            x, y, z, valid = _counted(points, features, cloud * N + at, at, N, FEATURES)
            total_x += tl.where(valid, x.to(tl.float64), 0.0)
            total_y += tl.where(valid, y.to(tl.float64), 0.0)
            total_z += tl.where(valid, z.to(tl.float64), 0.0)
            count += valid.to(tl.int32)
            first += BLOCK
    held = tl.maximum(tl.sum(count), 1).to(tl.float64)
    middle_x, middle_y, middle_z = tl.sum(total_x) / held, tl.sum(total_y) / held, tl.sum(total_z) / held
    again = cloud * 0
    while again < N:
        at = again + lane
        row = cloud * N + at
        x, y, z, valid = _counted(points, features, row, at, N, FEATURES)
        wide_x, wide_y, wide_z = x.to(tl.float64), y.to(tl.float64), z.to(tl.float64)
        if CENTER:
            wide_x = tl.minimum(tl.maximum(wide_x - middle_x, -limit), limit)
            wide_y = tl.minimum(tl.maximum(wide_y - middle_y, -limit), limit)
            wide_z = tl.minimum(tl.maximum(wide_z - middle_z, -limit), limit)
        tl.store(out + 3 * row, tl.where(valid, wide_x, float("nan")).to(tl.float32), mask=at < N)
        tl.store(out + 3 * row + 1, tl.where(valid, wide_y, float("nan")).to(tl.float32), mask=at < N)
        tl.store(out + 3 * row + 2, tl.where(valid, wide_z, float("nan")).to(tl.float32), mask=at < N)
        again += BLOCK


@triton.jit
def _farthest_kernel(
    points,  # [B, N, 3]
    out,  # [B] int64
    N,
    BLOCK: tl.constexpr,
):
    cloud = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    total_x = tl.zeros((BLOCK,), tl.float32)
    total_y = tl.zeros((BLOCK,), tl.float32)
    total_z = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    first = cloud * 0
    while first < N:
        at = first + lane
        x, y, z, valid = _counted(points, None, cloud * N + at, at, N, 0)
        total_x += tl.where(valid, x, 0.0)
        total_y += tl.where(valid, y, 0.0)
        total_z += tl.where(valid, z, 0.0)
        count += valid.to(tl.int32)
        first += BLOCK
    held = tl.maximum(tl.sum(count), 1).to(tl.float32)
    middle_x, middle_y, middle_z = tl.sum(total_x) / held, tl.sum(total_y) / held, tl.sum(total_z) / held
    largest = tl.full((BLOCK,), -2.0, tl.float32)
    place = lane.to(tl.int64)
    first = cloud * 0
    while first < N:
        at = first + lane
        x, y, z, valid = _counted(points, None, cloud * N + at, at, N, 0)
        x, y, z = x - middle_x, y - middle_y, z - middle_z
        distance = tl.where(valid, x * x + y * y + z * z, -1.0)
        distance = tl.where(at < N, distance, -2.0)
        place = tl.where(distance > largest, at, place)
        largest = tl.maximum(largest, distance)
        first += BLOCK
    tl.store(out + cloud, tl.min(tl.where(largest == tl.max(largest), place, N)))


@triton.jit
def _repeat_kernel(
    index,  # [B, M] int64
    out,  # [B, M] int64
    M,
    BLOCK: tl.constexpr,
):
    cloud = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int32)
    first = cloud * 0
    while first < M:
        at = first + lane
        count += (tl.load(index + cloud * M + at, mask=at < M, other=-1) >= 0).to(tl.int32)
        first += BLOCK
    found = tl.maximum(tl.sum(count), 1)
    first = cloud * 0
    while first < M:
        at = first + lane
        value = tl.load(index + cloud * M + at % found, mask=at < M, other=-1)
        tl.store(out + cloud * M + at, value, mask=at < M)
        first += BLOCK


def prepare(points: Tensor, features: Tensor | None, limit: float, *, center: bool) -> Tensor:
    """`PointModel.prepare` without lengths: `[B, N, 3]` float32, NaN for points that do not count."""
    batch, count, _ = points.shape
    out = torch.empty(points.shape, dtype=torch.float32, device=points.device)
    with torch.cuda.device_of(points):
        _prepare_kernel[(batch,)](
            points.contiguous(),
            None if features is None else features.contiguous(),
            out, count, limit, CENTER=center, FEATURES=0 if features is None else features.shape[-1],
            BLOCK=_BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def farthest_from_mean(points: Tensor) -> Tensor:
    """The first of the points farthest from their mean, `[B]` int64, of those that are finite."""
    out = torch.empty(len(points), dtype=torch.int64, device=points.device)
    with torch.cuda.device_of(points):
        _farthest_kernel[(len(points),)](
            points.contiguous(), out, points.shape[1], BLOCK=_BLOCK, enable_fp_fusion=False
        )
    return out


def repeat(index: Tensor) -> Tensor:
    """Samples `[B, M]` int64 from their beginning again where there is -1."""
    out = torch.empty_like(index)
    with torch.cuda.device_of(index):
        _repeat_kernel[(len(index),)](index.contiguous(), out, index.shape[1], BLOCK=_BLOCK)
    return out
