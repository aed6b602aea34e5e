"""Rows of features by index."""

from __future__ import annotations

import torch
from torch import Tensor


def group(features: Tensor, index: Tensor) -> Tensor:
    """Row ``index`` of ``features``, a zero row for -1.

    Args:
        features: ``[B, N, C]`` or packed ``[P, C]``, any dtype.
        index: ``[B, ...]`` rows of their own cloud, or any shape of packed rows; -1 for none.

    Returns:
        ``[B, ..., C]`` or ``[..., C]``.
    """
    rows, channels = features.shape[-2:]
    if index.numel() and not -1 <= int(index.min()) <= int(index.max()) < rows:
        raise ValueError(f"index: expected values in -1..{rows - 1}")
    extended = torch.cat([features, features.new_zeros(*features.shape[:-2], 1, channels)], -2)
    index = torch.where(index < 0, rows, index.long())
    if features.dim() == 2:
        return extended[index]
    flat = index.flatten(1)
    picked = extended.gather(1, flat[..., None].expand(*flat.shape, channels))
    return picked.reshape(*index.shape, channels)
