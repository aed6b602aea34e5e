"""Local aggregation of the point tokenizer (Point-PN) in plain PyTorch: the written specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from any2point.reference.batch_norm import BatchNorm, batch_norm
from any2point.reference.group import group as reference_group


class ResidualUnit(NamedTuple):
    """One bottleneck: `x + BN(BN-ReLU(x in_weight^T + in_bias) out_weight^T + out_bias)`, then ReLU.

    `in_weight [H, C]`, `in_bias [H]`, `out_weight [C, H]`, `out_bias [C]`.
    """

    in_weight: Tensor
    in_bias: Tensor | None
    in_norm: BatchNorm
    out_weight: Tensor
    out_bias: Tensor | None
    out_norm: BatchNorm


def normalize_offsets(offset: Tensor, mode: str, *, guard: bool = True) -> Tensor:
    """Scale the offsets `[B, S, K, 3]` of neighbours from their centre to about unit size.

    "scan" divides by the largest absolute offset of each cloud, group and axis, "mn40" by the standard
    deviation of all offsets of a cloud. Without `guard` the two behave as the official code does: a group
    that is flat along an axis gives 0/0 = NaN, and the standard deviation is that of the whole batch.
    """
    if mode == "scan":
        largest = offset.abs().amax(2, keepdim=True)
        if guard:
            tiny = torch.finfo(offset.dtype).tiny
            largest = torch.where(largest > tiny, largest, torch.ones_like(largest))
        return offset / largest
    return offset / offset_deviation(offset, guard=guard)[:, None, None, None]


def offset_deviation(offset: Tensor, *, guard: bool = True) -> Tensor:
    """What "mn40" divides offsets `[B, S, K, 3]` by: `[B]`; without `guard` `[1]`, for the whole batch."""
    deviation = offset.flatten(1).std(1) if guard else offset.std()[None]
    return deviation + 1e-5


def group_offsets(
    points: Tensor, center: Tensor, neighbor: Tensor, group: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Offsets `[B, S, K, 3]` of the neighbours from their centre; a missing neighbour is the centre."""
    neighbor = torch.where(neighbor < 0, center[:, :, None], neighbor)
    return group(points, neighbor) - group(points, center)[:, :, None]


def wavelengths(width: int, alpha: float, *, like: Tensor) -> Tensor:
    """`alpha^(i / f)` for i < f = width // 6, in the dtype and on the device of `like`."""
    frequencies = width // 6
    exponent = torch.arange(frequencies, device=like.device, dtype=like.dtype) / frequencies
    return torch.pow(alpha, exponent)


def encode_offsets(offset: Tensor, width: int, *, alpha: float = 1000.0, beta: float = 100.0) -> Tensor:
    """Sine and cosine of `beta * offset / alpha^(i / f)`, i < f = width // 6: `[..., 3]` -> `[..., width]`.

    Channels are (axis, sine then cosine, i); those beyond 6 f stay zero.
    """
    angle = (beta * offset)[..., None] / wavelengths(width, alpha, like=offset)
    encoding = torch.stack([angle.sin(), angle.cos()], dim=-2).flatten(-3)
    return F.pad(encoding, (0, width % 6)) if width % 6 else encoding


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))


def local_aggregate(
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    units: Sequence[ResidualUnit],
    *,
    normalize: str = "scan",
    guard: bool = True,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    alpha: float = 1000.0,
    beta: float = 100.0,
    group: Callable[[Tensor, Tensor], Tensor] = reference_group,
) -> Tensor:
    """See `any2point.ops.local_aggregate`; `group` is the gather to use."""
    dtype = features.dtype
    features = features.to(torch.promote_types(dtype, torch.float32))
    offset = normalize_offsets(group_offsets(points, center, neighbor, group), normalize, guard=guard)
    neighbor = torch.where(neighbor < 0, center[:, :, None], neighbor)
    center_features = group(features, center)
    x = torch.cat(
        [group(features, neighbor), center_features[:, :, None].expand(*neighbor.shape, -1)], dim=-1
    )
    x = x + encode_offsets(offset, x.shape[-1], alpha=alpha, beta=beta).to(x.dtype)

    rows = x.flatten(0, 2)
    for unit in units:
        hidden = _linear(rows, unit.in_weight, unit.in_bias)
        hidden = batch_norm(hidden, unit.in_norm, training=training, momentum=momentum, eps=eps).relu()
        hidden = _linear(hidden, unit.out_weight, unit.out_bias)
        hidden = batch_norm(hidden, unit.out_norm, training=training, momentum=momentum, eps=eps)
        rows = (hidden + rows).relu()
    return rows.view(*neighbor.shape, -1).max(dim=2).values.to(dtype)
