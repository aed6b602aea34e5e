"""k nearest neighbours, exact, for any k and any number of coordinates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from any2point.ops._checks import (
    Clouds,
    check_clouds,
    check_index,
    check_int,
    check_like,
    readable,
    shape_text,
)


class KNN(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # [B, S, k] int64
    distance: Tensor  # [B, S, k] squared


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
) -> KNN:
    """The k nearest points of every query, within its cloud.

    Equals, for one cloud of finite points::

        distance, index = torch.cdist(query, points).square().sort(dim=1, stable=True)
        index, distance = index[:, :k], distance[:, :k]

    Exact: neighbours are ordered by (distance, index), so equal distances go to the lowest index. Points
    with a NaN or infinite coordinate are nobody's neighbour, and a query with one has no neighbour.

    Args:
        query: ``[B, S, D]`` float32 or float64 (float16 and bfloat16 are raised to float32), any D >= 1; or
            ``[Q, D]`` with `query_offsets`. Any unit, any scale.
        points: ``[B, N, D]`` of the same dtype; or ``[P, D]`` with `offsets`. May be `query` itself: a point
            is then its own first neighbour.
        k: Neighbours per query, at least 0, no upper limit; more than there are points is legal, see Returns.
        query_lengths: ``[B]`` int64, how many of the S rows of each cloud are queries.
        lengths: ``[B]`` int64, how many of the N rows belong to each cloud; the others are ignored.
        query_offsets: ``[B + 1]`` int64; the queries of cloud b are rows ``query_offsets[b]`` to
            ``query_offsets[b + 1]`` of the packed queries. Goes with `offsets`.
        offsets: ``[B + 1]`` int64, the same for packed points.
        sorted: False gives the same neighbours in ascending order of index.
        exclude_self: Query i is point i, and not its own neighbour; other points at the same place are. Needs
            as many rows of queries as of points.
        k_per_cloud: ``[B]`` int64 in 0..k, how many neighbours the queries of each cloud get; missing ones
            follow up to k.

    Returns:
        ``(index, distance)``, each ``[B, S, k]``, or ``[Q, k]`` if packed. index is int64: rows of the cloud
        (of the packed tensor with `offsets`). distance is the *squared* Euclidean distance. Where there are
        fewer than k neighbours, and in rows beyond `query_lengths`, the end is index -1, distance +inf.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape, a device or a value is wrong, or query and points differ in batch size.

    Differentiable in: query and points, through distance (twice too); index -1 carries no gradient.
    Deterministic: yes, backward included; CPU and CUDA give the same bits.
    Complexity: O(S N D) work, O((N + S) D + S k) memory. Large clouds go through a tree: O(S (k + log N)) for
    points spread like those of a surface or a volume, whatever their density. On the CPU with D <= 3, and
    with D <= 16 where it keeps most points away, which some of the queries tell. On CUDA with D <= 3 in
    float32 for k <= 280, with about 100 bytes of workspace a point. `exclude_self` searches for k + 1.

    Example:
        >>> points = torch.rand(2, 1024, 3)
        >>> index, distance = knn(points[:, :512], points, 16)
        >>> index.shape
        torch.Size([2, 512, 16])
    """
    k = check_int("k", k, at_least=0)
    queries, clouds = check_pair(query, points, query_lengths, lengths, query_offsets, offsets)
    rows = queries.points.shape[-2]
    if exclude_self and rows != clouds.points.shape[-2]:
        raise ValueError(
            f"query: expected {clouds.points.shape[-2]} rows like `points`, as exclude_self is given, "
            f"got shape {shape_text(queries.points)}"
        )
    if k_per_cloud is not None:
        k_per_cloud = check_index("k_per_cloud", k_per_cloud, like=queries.points, like_name="query")
        if k_per_cloud.shape != (queries.batch,):
            raise ValueError(
                f"k_per_cloud: expected shape [B] = [{queries.batch}], got {shape_text(k_per_cloud)}"
            )
        if (
            readable(k_per_cloud)
            and len(k_per_cloud)
            and not 0 <= int(k_per_cloud.min()) <= int(k_per_cloud.max()) <= k
        ):
            raise ValueError(f"k_per_cloud: expected values in 0..k = {k}, got {k_per_cloud.tolist()[:8]}")
    distance, index = torch.ops.any2point.knn.default(
        queries.points,
        clouds.points,
        k + 1 if exclude_self else k,
        queries.lengths,
        clouds.lengths,
        queries.offsets,
        clouds.offsets,
        bool(sorted) or k_per_cloud is not None,
    )
    if exclude_self:
        # What follows the query itself moves up. If it is not there, k + 1 others of lower index coincide
        # with it, and the last of them goes.
        place = torch.arange(k + 1, device=index.device)
        own = torch.arange(rows, device=index.device)[:, None]
        later = place[:k] >= torch.where(index == own, place, k).amin(-1, keepdim=True)
        index, distance = (torch.where(later, x[..., 1:], x[..., :-1]) for x in (index, distance))
    if k_per_cloud is not None:
        index, distance = _first_of_each(index, distance, queries, k_per_cloud)
        if not sorted:
            order = torch.where(index < 0, torch.iinfo(torch.int64).max, index).argsort(-1)
            index, distance = index.gather(-1, order), distance.gather(-1, order)
    return KNN(index, distance)


def _first_of_each(index: Tensor, distance: Tensor, queries: Clouds, k: Tensor) -> tuple[Tensor, Tensor]:
    """Neighbours with all but the first `k` ``[B]`` of each cloud missing."""
    if queries.offsets is None:
        most = k[:, None, None]
    else:
        row = torch.arange(len(index), device=index.device)
        most = k[torch.bucketize(row, queries.offsets[1:-1].contiguous(), right=True)][:, None]
    missing = torch.arange(index.shape[-1], device=index.device) >= most
    return index.masked_fill(missing, -1), distance.masked_fill(missing, torch.inf)


def check_pair(
    query: object,
    points: object,
    query_lengths: object,
    lengths: object,
    query_offsets: object,
    offsets: object,
) -> tuple[Clouds, Clouds]:
    """Queries and points of the same clouds, both padded or both packed."""
    if (query_offsets is None) != (offsets is None):
        missing, given = (
            ("query_offsets", "offsets") if query_offsets is None else ("offsets", "query_offsets")
        )
        raise ValueError(f"{missing}: expected a tensor, as {given} is given (both packed, or both padded)")
    queries = check_clouds(query, query_lengths, query_offsets, name="query", prefix="query_")
    clouds = check_clouds(points, lengths, offsets)
    check_like("query", queries.points, "points", clouds.points)
    if clouds.points.shape[-1] < 1:
        raise ValueError(f"points: expected D >= 1, got shape {shape_text(clouds.points)}")
    if queries.points.shape[-1] != clouds.points.shape[-1]:
        raise ValueError(
            f"query: expected D = {clouds.points.shape[-1]} like `points`, "
            f"got shape {shape_text(queries.points)}"
        )
    if queries.batch != clouds.batch:
        raise ValueError(f"query: expected {clouds.batch} clouds like `points`, got {queries.batch}")
    return queries, clouds


def distance_backward(grad: Tensor, query: Tensor, points: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and points for one of the distances, ``[B, S, k]`` or ``[Q, k]``; differentiable.

    grad_query is the sum of 2 g (q - p) over a query's neighbours; grad_points is minus the same terms summed
    over the pairs of each point, in a fixed order and without atomics, as in the gradient of `group`.
    """
    packed = points.dim() == 2
    if packed:
        grad, query, points, index = (x[None] for x in (grad, query, points, index))
    batch, rows, k = index.shape
    dim = points.shape[-1]
    flat = index.reshape(batch, rows * k)
    valid = (index >= 0)[..., None]
    difference = query[:, :, None] - torch.ops.any2point.group.default(points, flat).view(batch, rows, k, dim)
    # Masked before the product: the query of a missing pair may be infinite, and its gradient anything.
    term = torch.where(valid, difference, 0.0) * torch.where(valid, 2 * grad[..., None], 0.0)
    grad_query = term.sum(2)
    grad_points = -torch.ops.any2point._group_backward.default(
        term.view(batch, rows * k, dim), flat, points.shape[1]
    )
    return (grad_query[0], grad_points[0]) if packed else (grad_query, grad_points)


@torch.library.register_fake("any2point::knn")
def _fake(
    query: Tensor,
    points: Tensor,
    k: int,
    query_lengths: Tensor | None,
    lengths: Tensor | None,
    query_offsets: Tensor | None,
    offsets: Tensor | None,
    sorted: bool,
) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:-1], k)
    return query.new_empty(shape), query.new_empty(shape, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx: Any, grad: Tensor, _index: Any) -> tuple[Tensor | None, ...]:
    query, points, index = ctx.saved_tensors
    return *distance_backward(grad, query, points, index), *(None,) * 6


torch.library.register_autograd("any2point::knn", _backward, setup_context=_setup_context)
