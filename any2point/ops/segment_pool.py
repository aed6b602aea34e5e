"""Mean, maximum or sum of the rows of each segment."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from any2point.ops._checks import check_floating, check_index, check_int, check_tensor, shape_text
from any2point.ops.group import checked


def segment_pool(
    features: Tensor,
    segment: Tensor,
    num_segments: int,
    reduce: Literal["mean", "max", "sum"] = "mean",
    *,
    order: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Pool the rows of every segment.

    Equals ``torch.stack([features[segment == s].mean(0) for s in range(num_segments)])`` (or ``amax``,
    ``sum``), with 0 for empty segments.

    Args:
        features: ``[R, C]``, or any ``[..., C]``; float16, bfloat16, float32 or float64.
        segment: ``[R]``, or ``[...]``: the segment of each row, -1 for none; int64 or int32, in any order.
        num_segments: S. A bound will do: unused segments are 0.
        reduce: "mean", "max" or "sum". NaN is the largest value to "max".
        order: rows sorted by segment, as `voxel_cluster` returns them; together with ``start`` it spares
            sorting them again. Both must belong to ``segment``.
        start: where each segment begins in ``order``; at least ``[S + 1]``.

    Returns:
        ``[S, C]`` in the dtype of ``features``, also under autocast; accumulated in float32 (float64 for
        float64).

    Raises:
        ValueError: wrong shapes or devices, an unknown ``reduce``. A segment outside of -1..S-1 raises on the
            CPU; on CUDA its row is left out.
        TypeError: a dtype that is not listed.

    Differentiable in: features, any number of times. The gradient of a maximum goes to the lowest of the rows
        that attain it.
    Deterministic: yes, forward and backward; rows are taken in ascending order, without atomics.
    Complexity: one read per element of ``features``, after an O(R) sort of ``segment``.

    Example:
        >>> voxels = any2point.ops.voxel_cluster(points, 0.1)
        >>> any2point.ops.segment_pool(features, voxels.cluster, voxels.cluster.numel(), "max",
        ...                            order=voxels.order, start=voxels.start)
    """
    if not isinstance(features, Tensor):
        raise TypeError(f"features: expected a tensor [R, C], got {type(features).__name__}")
    if features.dim() < 2:
        raise ValueError(f"features: expected shape [R, C] or [..., C], got {shape_text(features)}")
    check_floating("features", features)
    segment = check_index("segment", segment, like=features, like_name="features")
    if segment.shape != features.shape[:-1]:
        raise ValueError(
            f"segment: expected shape {shape_text(features[..., 0])} like the rows of `features`, "
            f"got {shape_text(segment)}"
        )
    num_segments = check_int("num_segments", num_segments, at_least=0)
    if reduce not in ("mean", "max", "sum"):
        raise ValueError(f"reduce: expected 'mean', 'max' or 'sum', got {reduce!r}")
    if (order is None) != (start is None):
        raise ValueError("order, start: expected both or neither, got one")
    if order is not None and start is not None:
        rows_text = f"[{segment.numel()}]"
        order = check_tensor("order", order, dims=1, layout=f"[R] = {rows_text}")
        start = check_tensor("start", start, dims=1, layout="[S + 1] or longer")
        order = check_index("order", order, like=features, like_name="features")
        start = check_index("start", start, like=features, like_name="features")
        if order.shape[0] != segment.numel():
            raise ValueError(f"order: expected shape [R] = {rows_text}, got {shape_text(order)}")
        if start.shape[0] <= num_segments:
            raise ValueError(f"start: expected at least {num_segments + 1} values, got {shape_text(start)}")
    rows = features.flatten(0, -2), segment.flatten()
    op = torch.ops.any2point.segment_pool.default
    return checked(op, *rows, num_segments, reduce, order, start)[0]


@torch.library.register_fake("any2point::segment_pool")
def _segment_pool_fake(
    features: Tensor,
    segment: Tensor,
    num_segments: int,
    reduce: str,
    order: Tensor | None,
    start: Tensor | None,
) -> tuple[Tensor, Tensor]:
    pooled = features.new_empty(num_segments, features.shape[1])
    shapes = {"sum": (0,), "mean": (num_segments,), "max": tuple(pooled.shape)}
    return pooled, segment.new_empty(shapes[reduce])


@torch.library.register_fake("any2point::_segment_pool_backward")
def _segment_pool_backward_fake(grad: Tensor, segment: Tensor, saved: Tensor, reduce: str) -> Tensor:
    return grad.new_empty(segment.shape[0], grad.shape[1])


def _setup_segment_pool(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, segment, _, ctx.reduce, *_ = inputs
    ctx.save_for_backward(segment, output[1])


def _segment_pool_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    segment, saved = ctx.saved_tensors
    grad_features = torch.ops.any2point._segment_pool_backward.default(grad, segment, saved, ctx.reduce)
    return grad_features, None, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    grad, segment, saved, ctx.reduce = inputs
    ctx.num_segments = grad.shape[0]
    ctx.save_for_backward(segment, saved)


def _double_backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
    segment, saved = ctx.saved_tensors
    if ctx.reduce != "max":
        op = torch.ops.any2point.segment_pool.default
        return op(outer, segment, ctx.num_segments, ctx.reduce, None, None)[0], None, None, None
    # The maximum picks one element per segment and channel, so its transpose's transpose picks the same one.
    padded = torch.cat([outer, outer.new_zeros(1, outer.shape[1])])
    return padded.gather(0, torch.where(saved < 0, outer.shape[0], saved)), None, None, None


torch.library.register_autograd(
    "any2point::segment_pool", _segment_pool_backward, setup_context=_setup_segment_pool
)
torch.library.register_autograd(
    "any2point::_segment_pool_backward", _double_backward, setup_context=_setup_backward
)
