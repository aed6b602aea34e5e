"""The squared distance with the library's fixed order of roundings."""

from __future__ import annotations

import torch
from torch import Tensor


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded once.

    In float32 through float64, where the product is exact and the sum is rounded twice: that differs from a
    true fma in about one of 2**29 cases. In float64 torch has no fma: two roundings.
    """
    if a.dtype == torch.float32:
        return (a.double() * b.double() + c.double()).float()
    return a * b + c


def squared_distance(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distance over the last axis, broadcasting the others.

    Equals ``(a - b).square().sum(-1)`` up to rounding. The roundings are fixed: with d = a - b,
    ``d1 * d1``, then ``fma(d0, d0, .)``, ``fma(d2, d2, .)``, ``fma(d3, d3, .)``, ...

    Args:
        a: ``[..., D]`` float32 or float64.
        b: ``[..., D]`` of the same dtype.

    Returns:
        ``[...]`` of the same dtype.
    """
    d = a - b
    parts = d.unbind(-1)
    if not parts:
        return d.sum(-1)
    if len(parts) == 1:
        return parts[0] * parts[0]
    total = _fma(parts[0], parts[0], parts[1] * parts[1])
    for part in parts[2:]:
        total = _fma(part, part, total)
    return total
