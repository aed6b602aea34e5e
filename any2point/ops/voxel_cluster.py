"""Points of one voxel get one number: the grouping behind pooling over a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from any2point.ops._checks import check_clouds, check_like, shape_text
from any2point.ops.group import checked


class VoxelCluster(NamedTuple):
    """What `voxel_cluster` returns; R is the number of rows, B * N or P."""

    cluster: Tensor  # [B, N] or [P] int64: number of each point's voxel, -1 for none
    start: Tensor  # [R + 1] int64: where each cluster begins in `order`
    order: Tensor  # [R] int64: rows sorted by cluster
    count: Tensor  # type: ignore[assignment]  # [] int64: number of clusters


def voxel_cluster(
    points: Tensor,
    size: float | Sequence[float],
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    origin: Tensor | None = None,
) -> VoxelCluster:
    """Number the occupied voxels of a batch of clouds, and list the points of each.

    Equals ``torch.unique(keys, dim=0, return_inverse=True)`` over rows ``(cloud, z, y, x)`` with
    ``voxel = ((points - origin) / size).trunc()``, but with shapes that do not depend on the values.

    Args:
        points: ``[B, N, D]``, or packed ``[P, D]`` with offsets; D = 1, 2 or 3; any floating dtype. float16
            and bfloat16 are raised to float32, and the voxel is computed in float32 (float64 for float64).
        size: edge of a voxel in the unit of the points, or one for each axis.
        lengths: ``[B]``, how many points of each cloud count.
        offsets: ``[B + 1]``, where the clouds of a packed tensor begin.
        origin: ``[D]`` or ``[B, D]``, a corner of the grid; by default the lowest coordinates of each cloud.
            Below it ``trunc`` rounds towards it, so the cells next to it are twice as wide.

    Returns:
        `VoxelCluster`. Clusters are numbered from 0 without gaps over the whole batch, by cloud, z, y and
        x. ``order`` lists rows of the flattened tensor by cluster, ascending within each, and at the end the
        rows of no cluster: padding and points with a coordinate that is not finite. The rows of cluster i are
        ``order[start[i]:start[i + 1]]``; beyond ``count``, ``start`` repeats its last value.

    Raises:
        ValueError: wrong shapes or devices, a size that is not positive and finite; on the CPU also a voxel
            with a coordinate outside of int32. On CUDA such a point gets no cluster.
        TypeError: a dtype that is not listed.

    Differentiable in: nothing.
    Deterministic: yes, and the same on every device.
    Complexity: O(R) for a radix sort; O(N^2) comparisons in one block per cloud for small clouds on CUDA.

    Example:
        >>> cluster, start, order, count = any2point.ops.voxel_cluster(points, 0.1)
        >>> pooled = any2point.ops.segment_pool(features, cluster, num_segments=cluster.numel(),
        ...                                     order=order, start=start)
    """
    clouds = check_clouds(points, lengths, offsets)
    dims = clouds.points.shape[-1]
    if dims not in (1, 2, 3):
        raise ValueError(f"points: expected 1, 2 or 3 coordinates, got {shape_text(clouds.points)}")
    if origin is not None:
        if not isinstance(origin, Tensor):
            raise TypeError(f"origin: expected a tensor [D] or [B, D], got {type(origin).__name__}")
        check_like("origin", origin, "points", clouds.points, dtype=False)
        if tuple(origin.shape) not in ((dims,), (clouds.batch, dims)):
            raise ValueError(
                f"origin: expected shape [{dims}] or [{clouds.batch}, {dims}], got {shape_text(origin)}"
            )
        origin = origin.to(clouds.points.dtype).expand(clouds.batch, dims)
    args = clouds.points, _edges(size, dims), clouds.lengths, clouds.offsets, origin
    return VoxelCluster(*checked(torch.ops.any2point.voxel_cluster.default, *args))


def _edges(size: object, dims: int) -> list[float]:
    edges = [size] * dims if isinstance(size, Real) else size
    if not isinstance(edges, Sequence) or not all(isinstance(e, Real) and e is not True for e in edges):
        raise TypeError(f"size: expected a number or a sequence of {dims} numbers, got {type(size).__name__}")
    if len(edges) != dims or not all(0 < e < math.inf for e in edges):
        raise ValueError(f"size: expected a positive number, or one for each of {dims} axes, got {size}")
    return [float(e) for e in edges]


@torch.library.register_fake("any2point::voxel_cluster")
def _voxel_cluster_fake(
    points: Tensor, size: list[float], lengths: Tensor | None, offsets: Tensor | None, origin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    cluster = points.new_empty(points.shape[:-1], dtype=torch.int64)
    rows = cluster.numel()
    return cluster, cluster.new_empty(rows + 1), cluster.new_empty(rows), cluster.new_empty(())
