"""Reference of `any2point.ops.ball_query`."""

from __future__ import annotations

import torch
from torch import Tensor

from any2point.reference.knn import distance_matrix, per_cloud, select


def ball_query(
    query: Tensor,
    points: Tensor,
    radius: float,
    k: int,
    *,
    query_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    offsets: Tensor | None = None,
    mode: str = "nearest",
) -> tuple[Tensor, Tensor, Tensor]:
    """Up to k points closer than `radius` to every query; see `any2point.ops.ball_query`."""

    def inside(query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        distance, valid = distance_matrix(query, points)
        limit = torch.tensor(radius, dtype=distance.dtype, device=distance.device).square()
        valid = valid & (distance < limit)
        distance = torch.where(valid, distance, torch.inf)
        key = distance.detach() if mode == "nearest" else (~valid).long()
        return select(distance, valid, key.sort(dim=1, stable=True).indices, k, sorted=True)

    index, distance = per_cloud(inside, query, points, k, query_lengths, lengths, query_offsets, offsets)
    return index, distance, (index >= 0).sum(-1)
