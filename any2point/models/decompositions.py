"""The ops of the library in tensor operations that can be traced, for formats that do not know them.

Shapes depend on shapes alone and there is no control flow but one scan, unlike in `any2point.reference`,
which is written to be read. Inference only: what gradients would need is not returned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any2point.reference.squared_distance import squared_distance


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Operator -> function with the operator's arguments and results."""
    library = torch.ops.any2point
    return {
        library.farthest_point_sample.default: farthest_point_sample,
        library.knn.default: knn,
        library.group.default: group,
        library.interpolate.default: interpolate,
        library.voxel_cluster.default: voxel_cluster,
        library.segment_pool.default: segment_pool,
    }


def _padded_whole(lengths: Tensor | None, offsets: Tensor | None) -> None:
    if lengths is not None or offsets is not None:
        raise ValueError("`lengths`, `offsets`: expected None in an exported model, got a tensor")


def farthest_point_sample(
    points: Tensor,
    num_samples: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    start: Tensor | None,
    pointnet2: bool,
) -> tuple[Tensor, Tensor]:
    """See `any2point.ops.farthest_point_sample`; one step of a scan for each sample."""
    from torch._higher_order_ops.scan import scan_op

    _padded_whole(lengths, offsets)
    count = points.shape[1]
    finite = points.isfinite().all(-1)
    points = torch.where(finite[..., None], points, 0.0)
    lowest = finite.int().argmax(1, keepdim=True)
    first = lowest
    if start is not None:
        inside = (start >= 0) & (start < count)
        wanted = start.clamp(0, count - 1)[:, None]
        first = torch.where(inside[:, None] & finite.gather(1, wanted), wanted, lowest)
    level = torch.where(finite, torch.inf, -1.0).to(points.dtype)
    order = torch.arange(count, device=points.device)
    if pointnet2:
        far = squared_distance(points, torch.zeros_like(points)).double() > 1e-3
        level = torch.where(finite & far, 1e10, -1.0).to(points.dtype)
        order = _tree_order(count, order)

    def step(
        level: Tensor, pick: Tensor, reached: Tensor, _: Tensor, points: Tensor, order: Tensor, rest: Tensor
    ) -> tuple[Tensor, ...]:
        center = points.gather(1, pick[..., None].expand(-1, -1, points.shape[-1]))
        level = torch.where(level >= 0, torch.minimum(level, squared_distance(points, center)), -1.0)
        if not pointnet2:  # taken
            level = level.scatter(1, pick, -1.0)
        best = order[level[:, order].argmax(1, keepdim=True)]
        left = level.gather(1, best)
        if pointnet2:
            best = torch.where(left >= 0, best, rest)
            left = torch.where(left >= 0, left, 0.0)
        return level, best, left, pick[:, 0].clone(), reached[:, 0].clone()

    some = finite.any(1, keepdim=True)
    begin = torch.where(some, torch.inf, -1.0).to(points.dtype)
    steps = torch.zeros(num_samples, dtype=torch.int64, device=points.device)
    rest = torch.where(some, lowest, 0)  # not `lowest` itself: a scan takes no tensor twice
    results = scan_op(step, [level, first, begin], [steps], (points, order, rest))
    index, distance = results[3].T, results[4].T
    taken = (distance >= 0) & some
    return torch.where(taken, index, -1), torch.where(taken, distance, 0.0)


def _tree_order(count: int, point: Tensor) -> Tensor:
    """Points `[N]` in the order in which "pointnet2" decides ties: by bit-reversed thread, then by index."""
    bits = min(9, max(count.bit_length() - 1, 0))
    reverse = torch.zeros_like(point)
    for bit in range(bits):
        reverse = reverse + (point % 2**bits) // 2**bit % 2 * 2 ** (bits - 1 - bit)
    key = reverse * count + point
    rank = (key[:, None] > key[None, :]).sum(1)
    return torch.zeros_like(point).scatter(0, rank, point)


def knn(
    query: Tensor,
    points: Tensor,
    k: int,
    query_lengths: Tensor | None,
    lengths: Tensor | None,
    query_offsets: Tensor | None,
    offsets: Tensor | None,
    sorted: bool,
) -> tuple[Tensor, Tensor]:
    """See `any2point.ops.knn`; all distances and `topk`, whose ties ONNX decides by index as the op does."""
    _padded_whole(lengths if query_lengths is None else query_lengths, offsets)
    count = points.shape[1]
    valid = query.isfinite().all(-1)[:, :, None] & points.isfinite().all(-1)[:, None]
    query, points = (torch.where(x.isfinite(), x, 0.0) for x in (query, points))
    distance = squared_distance(query[:, :, None], points[:, None])
    # Also a distance that overflows is that of a neighbour.
    distance = torch.where(valid, distance.clamp(max=torch.finfo(distance.dtype).max), torch.inf)
    value, index = distance.topk(min(k, count), largest=False)
    if not sorted:
        index = torch.where(value < torch.inf, index, index + count).sort(-1).values
        index = torch.where(index >= count, index - count, index)
        value = distance.gather(2, index)
    index = torch.where(value < torch.inf, index, -1)
    missing = max(k - count, 0)
    pad = torch.nn.functional.pad
    return pad(value, (0, missing), value=torch.inf), pad(index, (0, missing), value=-1)


def group(features: Tensor, index: Tensor) -> Tensor:
    """See `any2point.ops.group`, of `features [B, N, C]` and `index [B, R]`."""
    batch, count, width = features.shape
    base = count * torch.arange(batch, device=index.device)[:, None]
    rows = features.reshape(batch * count, width)[(index.clamp(min=0) + base).reshape(-1)]
    return torch.where((index < 0)[..., None], 0, rows.reshape(batch, index.shape[1], width))


def interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """See `any2point.ops.interpolate`, of `features [B, N, C]` and `index [B, S, K]`."""
    rows = group(features, index.flatten(1)).unflatten(1, (index.shape[1], index.shape[2]))
    terms = torch.where(index[..., None] < 0, 0.0, rows.to(weight.dtype) * weight[..., None])
    return terms.sum(2).to(features.dtype)


def voxel_cluster(
    points: Tensor, size: list[float], lengths: Tensor | None, offsets: Tensor | None, origin: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `any2point.ops.voxel_cluster`: the number of a voxel is how many lower ones are occupied."""
    _padded_whole(lengths, offsets)
    batch, count = points.shape[:2]
    valid = points.isfinite().all(-1)
    low = torch.where(valid[..., None], points, torch.inf).amin(1) if origin is None else origin
    edge = torch.stack([torch.full((), s, dtype=points.dtype, device=points.device) for s in size])
    voxel = torch.where(valid[..., None], ((points - low[:, None]) / edge).trunc(), 0.0)
    # Lexicographic by z, y, x, of every point j and every point i, [B, i, j]
    lower = torch.zeros_like(valid[:, :, None] & valid[:, None])
    same = torch.ones_like(lower)
    for axis in reversed(range(points.shape[-1])):
        i, j = voxel[:, :, None, axis], voxel[:, None, :, axis]
        lower = lower | (same & (j < i))
        same = same & (j == i)
    position = torch.arange(count, device=points.device)
    earlier = same & valid[:, None] & (position[None, :] < position[:, None])
    leader = valid & ~earlier.any(-1)
    rank = (lower & leader[:, None]).sum(-1)
    occupied = leader.sum(1)
    cluster = torch.where(valid, rank + (occupied.cumsum(0) - occupied)[:, None], -1)
    flat = cluster.reshape(-1)
    rows = batch * count
    order = torch.where(flat < 0, rows, flat).sort(stable=True).indices
    sizes = flat.new_zeros(rows + 1).index_add(0, torch.where(flat < 0, rows, flat), torch.ones_like(flat))
    start = torch.cat([sizes.new_zeros(1), sizes[:rows].cumsum(0)])
    return cluster, start, order, occupied.sum()


def segment_pool(
    features: Tensor,
    segment: Tensor,
    num_segments: int,
    reduce: str,
    order: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `any2point.ops.segment_pool`; rows of no segment go to one more, which is cut off."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    segment = torch.where(segment < 0, num_segments, segment)
    rows = segment[:, None].expand(-1, features.shape[1])
    counts = wide.new_zeros(num_segments + 1).index_add(0, segment, torch.ones_like(wide[:, 0]))[:, None]
    shape = num_segments + 1, features.shape[1]
    if reduce == "max":
        pooled = wide.new_full(shape, -torch.inf).scatter_reduce(0, rows, wide, "amax")
        pooled = torch.where(counts > 0, pooled, 0.0)
    else:
        pooled = wide.new_zeros(shape).scatter_add(0, rows, wide)
        pooled = pooled / counts.clamp(min=1) if reduce == "mean" else pooled
    saved = {"sum": (0,), "mean": (num_segments,), "max": (num_segments, features.shape[1])}
    return pooled[:num_segments].to(features.dtype), segment.new_zeros(saved[reduce])
