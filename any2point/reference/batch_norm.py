"""Batch normalisation of rows of which only some count: shared by the aggregation references.

Statistics are those of the rows given, or inside `shared_statistics` those of the rows of all processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BatchNorm(NamedTuple):
    """Weight, bias and running statistics of one batch normalisation, each `[C]` (`[V, C]` for V of them)."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


_add_up: Callable[[Tensor], Tensor] | None = None


@contextlib.contextmanager
def shared_statistics(add_up: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, processes that share a batch normalise by the statistics of all of it when training.

    Args:
        add_up: differentiable sum of a tensor over the processes.
    """
    global _add_up
    before, _add_up = _add_up, add_up
    try:
        yield
    finally:
        _add_up = before


def are_shared() -> bool:
    """Whether `shared_statistics` holds."""
    return _add_up is not None


def over_processes(*sums: Tensor) -> tuple[Tensor, ...]:
    """Inside `shared_statistics` the sums over all processes; otherwise the tensors as they are."""
    if _add_up is None:
        return sums
    whole = _add_up(torch.cat([value.reshape(-1) for value in sums]))
    parts = whole.split([value.numel() for value in sums])
    return tuple(part.view_as(value) for part, value in zip(parts, sums))


def batch_norm(rows: Tensor, norm: BatchNorm, *, training: bool, momentum: float, eps: float) -> Tensor:
    """Batch normalisation of `rows [R, C]` ; updates the running statistics when training."""
    if training and are_shared():
        every = rows.new_ones(len(rows), dtype=torch.bool)
        return masked_batch_norm(rows, norm, every, training=True, momentum=momentum, eps=eps)
    dtype = torch.promote_types(rows.dtype, torch.float32)
    weight, bias, mean, var = (tensor.to(dtype).contiguous() for tensor in norm)
    out = F.batch_norm(rows.to(dtype), mean, var, weight, bias, training, momentum, eps)
    if training and mean is not norm.running_mean:
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return out


def masked_batch_norm(
    rows: Tensor,
    norm: BatchNorm,
    occupied: Tensor,
    total: int | None = None,
    *,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation whose statistics are those of the occupied rows, and of zero rows up to `total`.

    Equals `F.batch_norm(rows[occupied])` (or, with `total`, of the occupied rows stacked on
    `total - occupied.sum()` rows of zeros) at the occupied rows, without a shape that depends on data.

    Args:
        rows: `[R, C]` floating point; values at rows that are not occupied are ignored.
        norm: parameters and running statistics `[C]`; the statistics are updated in place when training.
        occupied: `[R]` bool.
        total: number of rows the statistics count, or None for the occupied ones alone.
        training: batch statistics (True) or running ones (False).
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.

    Returns:
        `[R, C]`, at least float32; rows that are not occupied hold values of no meaning, but finite ones.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if not training:
        scale = norm.weight * torch.rsqrt(norm.running_var + eps)
        return rows * scale + (norm.bias - norm.running_mean * scale)
    kept = torch.where(occupied[:, None], rows, 0.0)
    present = occupied.sum().to(rows.dtype)
    counted = present if total is None else torch.full_like(present, total)
    summed, present, counted = over_processes(kept.sum(0), present, counted)
    count = counted.clamp(min=1) if total is None else counted
    mean = summed / count
    centered = rows - mean
    (spread,) = over_processes(torch.where(occupied[:, None], centered, 0.0).square().sum(0))
    var = (spread + (count - present).clamp(min=0) * mean.square()) / count
    with torch.no_grad():
        unbiased = var * (count / (count - 1).clamp(min=1))
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
    return centered * (torch.rsqrt(var + eps) * norm.weight) + norm.bias
