"""Neighbours within a radius, at most k of them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from any2point.ops._checks import check_float, check_int
from any2point.ops.knn import check_pair, distance_backward


class BallQuery(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # [B, S, k] int64
    distance: Tensor  # [B, S, k] squared
    count: Tensor  # type: ignore[assignment]  # [B, S] int64


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
    mode: Literal["nearest", "first"] = "nearest",
) -> BallQuery:
    """Up to k points of the cloud that are closer to a query than `radius`.

    Equals, for one query of a cloud of finite points::

        distance = squared_distance(query, points)
        index = (distance < radius * radius).nonzero()[:, 0]     # rising
        if mode == "nearest":
            index = index[distance[index].argsort(stable=True)]
        index, count = index[:k], len(index[:k])

    The comparison is strict and in the dtype of the coordinates, the square of the radius included. Points
    with a NaN or infinite coordinate are nobody's neighbour, and a query with one has no neighbour.

    Args:
        query: ``[B, S, D]`` float32 or float64 (float16 and bfloat16 are raised to float32), any D >= 1; or
            ``[Q, D]`` with `query_offsets`.
        points: ``[B, N, D]`` of the same dtype; or ``[P, D]`` with `offsets`.
        radius: In the unit of the coordinates, more than 0; may be infinite.
        k: Most neighbours per query, at least 0, no upper limit.
        query_lengths: ``[B]`` int64, how many of the S rows of each cloud are queries.
        lengths: ``[B]`` int64, how many of the N rows belong to each cloud; the others are ignored.
        query_offsets: ``[B + 1]`` int64; the queries of cloud b are rows ``query_offsets[b]`` to
            ``query_offsets[b + 1]`` of the packed queries. Goes with `offsets`.
        offsets: ``[B + 1]`` int64, the same for packed points.
        mode: ``"nearest"``: the k nearest, by (distance, index). ``"first"``: the k of lowest index, rising,
            as ``pointnet2_ops`` does (which repeats the first one instead of padding).

    Returns:
        ``(index, distance, count)``: index and distance ``[B, S, k]``, or ``[Q, k]`` if packed, as in
        :func:`knn`, padded with index -1, distance +inf; count ``[B, S]`` or ``[Q]`` int64, how many entries
        are neighbours.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape, a device or a value is wrong, or query and points differ in batch size.

    Differentiable in: query and points, through distance (twice too); index -1 carries no gradient.
    Deterministic: yes, backward included; CPU and CUDA give the same bits.
    Complexity: that of :func:`knn`; a scan for the ``"first"`` stops at the k-th hit, and so balls that hold
        very many are scanned for them in large clouds too.

    Source: C. R. Qi et al., "PointNet++", 2017, section 3.2.

    Example:
        >>> points = torch.rand(2, 1024, 3)
        >>> ball_query(points[:, :512], points, 0.2, 32).count.shape
        torch.Size([2, 512])
    """
    k = check_int("k", k, at_least=0)
    radius = check_float("radius", radius)
    if mode not in ("nearest", "first"):
        raise ValueError(f'mode: expected "nearest" or "first", got {mode!r}')
    queries, clouds = check_pair(query, points, query_lengths, lengths, query_offsets, offsets)
    distance, index, count = torch.ops.any2point.ball_query.default(
        queries.points,
        clouds.points,
        radius,
        k,
        queries.lengths,
        clouds.lengths,
        queries.offsets,
        clouds.offsets,
        mode == "nearest",
    )
    return BallQuery(index, distance, count)


@torch.library.register_fake("any2point::ball_query")
def _fake(
    query: Tensor,
    points: Tensor,
    radius: float,
    k: int,
    query_lengths: Tensor | None,
    lengths: Tensor | None,
    query_offsets: Tensor | None,
    offsets: Tensor | None,
    nearest: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = query.shape[:-1]
    index = query.new_empty((*rows, k), dtype=torch.int64)
    return query.new_empty((*rows, k)), index, query.new_empty(rows, dtype=torch.int64)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward(ctx: Any, grad: Tensor, _index: Any, _count: Any) -> tuple[Tensor | None, ...]:
    query, points, index = ctx.saved_tensors
    return *distance_backward(grad, query, points, index), *(None,) * 7


torch.library.register_autograd("any2point::ball_query", _backward, setup_context=_setup_context)
