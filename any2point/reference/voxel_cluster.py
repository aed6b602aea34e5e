"""Points of one voxel get one number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def voxel_cluster(
    points: Tensor,
    size: float | Sequence[float],
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    origin: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers the occupied voxels of a batch by (cloud, z, y, x); see `any2point.ops.voxel_cluster`.

    Args:
        points: ``[B, N, D]`` or, with offsets, ``[P, D]``; D = 1, 2 or 3.
        size: edge of a voxel, or one for each axis.
        lengths: ``[B]`` points of each cloud.
        offsets: ``[B + 1]`` where clouds begin in a packed tensor.
        origin: ``[D]`` or ``[B, D]``; by default the lowest coordinates of each cloud.

    Returns:
        cluster ``[B, N]`` or ``[P]``, start ``[R + 1]``, order ``[R]``, count ``[]``; all int64.
    """
    if points.dtype in (torch.float16, torch.bfloat16):
        points = points.float()
    dims = points.shape[-1]
    edge = torch.tensor([size] * dims if isinstance(size, (int, float)) else size, dtype=points.dtype)
    flat = points.reshape(-1, dims)
    rows = torch.arange(len(flat))
    if offsets is None:
        clouds = points.shape[0]
        cloud, place = rows // max(points.shape[1], 1), rows % max(points.shape[1], 1)
        valid = place < lengths[cloud] if lengths is not None else torch.ones_like(rows, dtype=torch.bool)
    else:
        clouds = len(offsets) - 1
        cloud = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        valid = torch.ones_like(rows, dtype=torch.bool)
    valid = valid & flat.isfinite().all(-1)
    kept, cloud = rows[valid], cloud[valid]

    if origin is None:
        low = flat.new_full((clouds, dims), torch.inf)
        low = low.scatter_reduce(0, cloud[:, None].expand(-1, dims), flat[kept], "amin")
    else:
        low = origin.to(points.dtype).expand(clouds, dims)
    voxel = ((flat[kept] - low[cloud]) / edge).trunc()
    if not bool(((voxel >= -(2.0**31)) & (voxel < 2.0**31)).all()):
        raise ValueError("size: expected voxels large enough to be numbered in int32 from the origin")
    keys = torch.cat([cloud[:, None], voxel.long().flip(-1)], 1)
    _, number, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
    if not len(kept):  # torch.unique refuses nothing, but gives no shape to rely on
        number, counts = rows[:0], rows[:0]

    cluster = torch.full_like(rows, -1)
    cluster[kept] = number
    order = torch.where(cluster < 0, len(rows), cluster).argsort(stable=True)
    start = torch.full((len(rows) + 1,), len(kept))
    start[: len(counts)] = counts.cumsum(0) - counts
    return cluster.reshape(points.shape[:-1]), start, order, torch.tensor(len(counts))
