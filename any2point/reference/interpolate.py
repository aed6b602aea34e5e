"""Weighted sums of neighbouring rows, and weights that fall with the distance."""

from __future__ import annotations

import torch
from torch import Tensor

from any2point.reference.group import group


def interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The sum over K of ``weight * features[index]``, nothing for -1.

    Args:
        features: ``[B, N, C]`` or packed ``[P, C]``.
        index: ``[B, S, K]`` or ``[S, K]``.
        weight: the shape of ``index``.

    Returns:
        ``[B, S, C]`` or ``[S, C]`` in the dtype of ``features``; the sum is taken in float32 or float64.
    """
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = group(features.to(dtype), index) * weight.to(dtype)[..., None]
    # A row that is missing does not count, even with an infinite weight.
    return torch.where(index[..., None] < 0, 0.0, rows).sum(-2).to(features.dtype)


def inverse_distance_weight(distance: Tensor, eps: float = 1e-8) -> Tensor:
    """1 / (distance + eps), normalised over the last axis; 0 for infinite distances."""
    weight = 1 / (distance + eps)
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1.0)
