"""Mean, maximum or sum of the rows of each segment."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_pool(
    features: Tensor,
    segment: Tensor,
    num_segments: int,
    reduce: str = "mean",
    *,
    order: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Pools the rows of every segment.

    Args:
        features: ``[..., C]``.
        segment: ``[...]``, values in ``-1 .. num_segments - 1``; -1 is no segment.
        num_segments: S.
        reduce: "mean", "max" (NaN wins; the gradient goes to the lowest row) or "sum".
        order: ignored, as is `start`: a list of the rows of each segment, for the kernels.
        start: ignored.

    Returns:
        ``[S, C]``, 0 for empty segments.
    """
    rows, segment = features.flatten(0, -2), segment.flatten()
    if len(segment) and not -1 <= int(segment.min()) <= int(segment.max()) < num_segments:
        raise ValueError(f"segment: expected values in -1..{num_segments - 1}")
    wide = rows if rows.dtype == torch.float64 else rows.float()
    pooled = [_pool(wide[segment == s], reduce) for s in range(num_segments)]
    return (torch.stack(pooled) if pooled else wide[:0]).to(features.dtype)


def _pool(rows: Tensor, reduce: str) -> Tensor:
    if not len(rows):
        return rows.sum(0)
    if reduce != "max":
        return rows.mean(0) if reduce == "mean" else rows.sum(0)
    hit = (rows == rows.amax(0)) | rows.isnan()
    first = hit.int().argmax(0, keepdim=True)  # the first of several, as documented
    return rows.gather(0, first)[0]
