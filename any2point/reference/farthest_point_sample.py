"""Farthest point sampling in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from any2point.reference.squared_distance import squared_distance


def farthest_point_sample(
    points: Tensor,
    num_samples: int,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    start: int | Tensor = 0,
    return_distance: bool = False,
    tie: str = "lowest",
) -> Tensor | tuple[Tensor, Tensor]:
    """The specification of :func:`any2point.ops.farthest_point_sample` (but for ``start="random"``)."""
    points = points.float() if points.dtype in (torch.float16, torch.bfloat16) else points
    if offsets is not None:
        ends = offsets.tolist()
        clouds = [points[a:b] for a, b in pairwise(ends)]
    else:
        sizes = [points.shape[1]] * len(points) if lengths is None else lengths.tolist()
        ends, clouds = [0] * (len(points) + 1), [cloud[:n] for cloud, n in zip(points, sizes)]
    index = torch.full((len(clouds), num_samples), -1)
    distance = points.new_zeros(len(clouds), num_samples)
    for b, cloud in enumerate(clouds):
        wanted = start[b].reshape(-1).tolist() if isinstance(start, Tensor) else [start]
        pick, levels = (_as_pointnet2 if tie == "pointnet2" else _sample)(cloud, num_samples, wanted)
        index[b, : len(pick)] = torch.tensor(pick, dtype=torch.int64) + ends[b]
        distance[b, : len(levels)] = torch.tensor(levels, dtype=points.dtype)
    index = index.to(points.device)
    return (index, distance) if return_distance else index


def _first(cloud: Tensor, wanted: int) -> tuple[int, Tensor]:
    """The start, or the lowest finite point (-1: none) if it is not one; and which points are finite."""
    finite = cloud.isfinite().all(-1)
    if 0 <= wanted < len(cloud) and finite[wanted]:
        return wanted, finite
    return (int(finite.nonzero()[0]) if finite.any() else -1), finite


def _sample(cloud: Tensor, num_samples: int, wanted: list[int]) -> tuple[list[int], list[float]]:
    pick, finite = _first(cloud, wanted[0])
    level = cloud.new_full((len(cloud),), torch.inf).where(finite, -1.0)
    picks: list[int] = []
    levels: list[float] = []
    while len(picks) < num_samples and pick >= 0 and level[pick] >= 0:
        picks.append(pick)
        levels.append(float(level[pick]))
        level = level.minimum(squared_distance(cloud, cloud[pick])).where(level >= 0, -1.0)
        level[pick] = -1.0  # taken
        pick = int((level == level.max()).nonzero()[0])  # the lowest index on ties
        given = wanted[len(picks)] if len(picks) < len(wanted) else -1
        if 0 <= given < len(cloud) and level[given] >= 0:
            pick = given
    return picks, levels


def _as_pointnet2(cloud: Tensor, num_samples: int, wanted: list[int]) -> tuple[list[int], list[float]]:
    pick, finite = _first(cloud, wanted[0])
    fallback, _ = _first(cloud, 0)
    # Its block has min(512, 2**floor(log2 n)) threads; thread t visits t, t + threads, ...; ties go to the
    # smallest bit-reversed t, then to the smallest index.
    bits = min(9, max(len(cloud).bit_length() - 1, 0))
    k = torch.arange(len(cloud))
    thread = k % 2**bits
    reverse = sum((((thread >> b) & 1) << (bits - 1 - b) for b in range(bits)), torch.zeros_like(k))
    order = torch.argsort(reverse * len(cloud) + k)
    far = squared_distance(cloud, torch.zeros_like(cloud[:1])).double() > 1e-3
    level = cloud.new_full((len(cloud),), 1e10).where(finite & far, -1.0)
    picks: list[int] = []
    levels: list[float] = []
    reached = torch.inf
    while len(picks) < num_samples and pick >= 0:
        picks.append(pick)
        levels.append(reached)
        level = level.minimum(squared_distance(cloud, cloud[pick])).where(level >= 0, -1.0)
        best = order[(level[order] == level.max()).nonzero()[0]]
        reached = float(level[best])
        if reached < 0:
            pick, reached = fallback, 0.0  # nothing takes part
        else:
            pick = int(best)
    return picks, levels
