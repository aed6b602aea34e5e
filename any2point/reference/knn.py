"""Reference of `any2point.ops.knn`."""

from __future__ import annotations

import torch
from torch import Tensor

from any2point.reference.squared_distance import squared_distance


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    *,
    query_lengths: Tensor | None = None,
    lengths: Tensor | None = None,
    query_offsets: Tensor | None = None,
    offsets: Tensor | None = None,
    sorted: bool = True,
    exclude_self: bool = False,
    k_per_cloud: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest points of every query, from the full matrix of distances; see `any2point.ops.knn`."""
    each = iter([] if k_per_cloud is None else k_per_cloud.tolist())

    def nearest(query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        distance, valid = distance_matrix(query, points)
        if exclude_self:
            valid = valid & ~torch.eye(*valid.shape, dtype=torch.bool, device=valid.device)
            distance = torch.where(valid, distance, torch.inf)
        # Stable by distance, with invalid pairs last even behind infinite distances.
        order = distance.detach().sort(dim=1, stable=True).indices
        order = order.gather(
            1, valid.gather(1, order).long().sort(dim=1, stable=True, descending=True).indices
        )
        wanted = next(each, k)
        index, chosen = select(distance, valid, order, wanted, sorted)
        return (
            torch.nn.functional.pad(index, (0, k - wanted), value=-1),
            torch.nn.functional.pad(chosen, (0, k - wanted), value=torch.inf),
        )

    return per_cloud(nearest, query, points, k, query_lengths, lengths, query_offsets, offsets)


def distance_matrix(query: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """``[S, D], [N, D] -> [S, N]`` squared distances, and which pairs are finite on both sides."""
    valid = query.isfinite().all(1)[:, None] & points.isfinite().all(1)[None]
    # Cleaned before they are used, so that no NaN reaches a gradient.
    query, points = (torch.where(x.isfinite(), x, 0.0) for x in (query, points))
    return torch.where(valid, squared_distance(query[:, None], points[None]), torch.inf), valid


def select(distance: Tensor, valid: Tensor, order: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """The first k valid pairs of each row of `order` ``[S, N]``, padded with index -1 and distance inf."""
    order = order[:, :k]
    if not sorted:  # by index; pairs that are not valid stay at the end
        rows = distance.shape[1]
        key = torch.where(valid.gather(1, order), order, order + rows)
        order = key.sort(dim=1).values
        order = torch.where(order >= rows, order - rows, order)
    missing = k - order.shape[1]
    index = torch.where(valid.gather(1, order), order, -1)
    chosen = distance.gather(1, order)
    return (
        torch.nn.functional.pad(index, (0, missing), value=-1),
        torch.nn.functional.pad(chosen, (0, missing), value=torch.inf),
    )


def per_cloud(function, query, points, k, query_lengths, lengths, query_offsets, offsets):
    """`function` ``([S, D], [N, D]) -> (index [S, k], distance [S, k])`` on every cloud of a batch."""
    if offsets is not None:
        assert query_offsets is not None
        rows, base = points.tensor_split(offsets.cpu()[1:-1]), offsets[:-1].tolist()
        results = [function(*pair) for pair in zip(query.tensor_split(query_offsets.cpu()[1:-1]), rows)]
        index = [torch.where(i >= 0, i + b, -1) for (i, _), b in zip(results, base)]
        empty = query.new_zeros(0, k)
        return torch.cat([empty.long(), *index]), torch.cat([empty, *(d for _, d in results)])
    size = query.shape[1]
    index, distance = [query.new_zeros(0, size, k, dtype=torch.long)], [query.new_zeros(0, size, k)]
    for b in range(query.shape[0]):
        s = size if query_lengths is None else int(query_lengths[b])
        n = points.shape[1] if lengths is None else int(lengths[b])
        i, d = function(query[b, :s], points[b, :n])
        index.append(torch.nn.functional.pad(i, (0, 0, 0, size - s), value=-1)[None])
        distance.append(torch.nn.functional.pad(d, (0, 0, 0, size - s), value=torch.inf)[None])
    return torch.cat(index), torch.cat(distance)
