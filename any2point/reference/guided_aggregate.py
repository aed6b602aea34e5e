"""Any-to-3D guided aggregation in plain PyTorch: the written specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from any2point.reference.batch_norm import BatchNorm, masked_batch_norm
from any2point.reference.group import group as reference_group
from any2point.reference.segment_pool import segment_pool as reference_segment_pool


class CellAttention(NamedTuple):
    """Weights of the attention inside cells, stacked over V views; M is its inner width.

    `norm_weight`, `norm_bias [V, C]`, `qkv_weight [V, 3M, C]`, `qkv_bias [V, 3M]`, `proj_weight [V, C, M]`,
    `proj_bias [V, C]`.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj_weight: Tensor
    proj_bias: Tensor


def first_in_cell(cell: Tensor, num_cells: int) -> Tensor:
    """Index of the first token in the same cell: `[B, V, S]` cells below `num_cells` -> `[B, V, S]`."""
    count = cell.shape[-1]
    token = torch.arange(count, device=cell.device).expand(cell.shape)
    first = cell.new_full((*cell.shape[:-1], num_cells), count)
    return first.scatter_reduce(-1, cell, token, "amin").gather(-1, cell)


def attend_in_cells(
    features: Tensor, cell: Tensor, attention: CellAttention, *, num_heads: int, scale: float, eps: float
) -> Tensor:
    """Heads' output before their projection, `[B, V, S, M]`: attention among the tokens of each cell.

    LayerNorm's weight and bias are folded into the projections, so that one normalisation and one matrix
    product serve all views.
    """
    batch, views, count = cell.shape
    normalized = F.layer_norm(features, features.shape[-1:], eps=eps)
    weight = attention.qkv_weight * attention.norm_weight[:, None]
    bias = attention.qkv_bias + (attention.qkv_weight * attention.norm_bias[:, None]).sum(-1)
    qkv = F.linear(normalized, weight.flatten(0, 1), bias.flatten())
    qkv = qkv.view(batch, count, views, 3, num_heads, -1).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    same = (cell[..., :, None] == cell[..., None, :]).flatten(0, 1)[:, None]
    heads = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=same, scale=scale)
    return heads.transpose(1, 2).reshape(batch, views, count, -1)


def _drop_path(branch: Tensor, rate: float, *, rows: bool) -> Tensor:
    """Zero the branch `[B, S, C]` of whole clouds (of single tokens with `rows`) with probability `rate`."""
    shape = (branch.shape[0], branch.shape[1] if rows else 1, 1)
    keep = torch.rand(shape, device=branch.device) >= rate
    return branch * (keep.to(branch.dtype) / (1 - rate))


def guided_aggregate(
    features: Tensor,
    cell: Tensor,
    cluster: Tensor | None,
    attention: CellAttention,
    view_norm: BatchNorm,
    space_norm: BatchNorm | None,
    *,
    num_cells: int,
    num_heads: int,
    coefficient: float,
    scale: float,
    pooling: str = "mean",
    ensemble: str = "adaptive",
    count_empty: bool = False,
    drop_path: float = 0.0,
    drop_path_rows: bool = False,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    norm_eps: float = 1e-5,
    group: Callable[[Tensor, Tensor], Tensor] = reference_group,
    segment_pool: Callable[..., Tensor] = reference_segment_pool,
) -> Tensor:
    """See `any2point.ops.guided_aggregate`; `group` and `segment_pool` are the primitives to use."""
    dtype = features.dtype
    features = features.to(torch.promote_types(dtype, torch.float32))
    attention = CellAttention(*(tensor.to(features.dtype) for tensor in attention))
    cell = cell.clamp(0, num_cells - 1)
    batch, views, count = cell.shape
    rows = batch * count
    flat = features.flatten(0, 1)
    row = torch.arange(rows, device=features.device)
    step: dict[str, Any] = {"training": training, "momentum": momentum, "eps": eps}

    space: Tensor | None = None
    if ensemble == "adaptive":
        assert cluster is not None
        assert space_norm is not None
        space = segment_pool(flat, cluster.flatten(), rows, "max")
        space = space + segment_pool(flat, cluster.flatten(), rows, "mean")
        space = masked_batch_norm(space, space_norm, row <= cluster.max(), **step)
        space = group(F.gelu(space), cluster.flatten())

    heads = attend_in_cells(features, cell, attention, num_heads=num_heads, scale=scale, eps=norm_eps)
    leader = first_in_cell(cell, num_cells) + count * torch.arange(batch, device=cell.device)[:, None, None]
    total = batch * num_cells if count_empty else None
    dropped = training and drop_path > 0
    blend, weights = torch.zeros_like(flat), flat.new_zeros(rows, 1)
    for view in range(views):
        segment = leader[:, view].flatten()
        proj_weight, proj_bias = attention.proj_weight[view], attention.proj_bias[view]
        if pooling == "mean" and not dropped:
            # A mean commutes with the projection: pool M channels and project cells instead of tokens.
            inner = segment_pool(heads[:, view].flatten(0, 1), segment, rows, "mean")
            guided = segment_pool(flat, segment, rows, "mean") + F.linear(inner, proj_weight, proj_bias)
        else:
            branch = F.linear(heads[:, view], proj_weight, proj_bias)
            if dropped:
                branch = _drop_path(branch, drop_path, rows=drop_path_rows)
            attended = flat + branch.flatten(0, 1)
            guided = segment_pool(attended, segment, rows, "mean")
            if pooling == "max+mean":
                guided = guided + segment_pool(attended, segment, rows, "max")
        norm = BatchNorm(*(tensor[view] for tensor in view_norm))
        guided = masked_batch_norm(guided, norm, segment == row, total, **step)
        guided = group(F.gelu(guided), segment)
        if space is not None:
            weight = (F.cosine_similarity(guided, space, dim=-1, eps=1e-8)[:, None] + 1) / 2
            blend = blend + weight * guided
            weights = weights + weight
        elif ensemble == "mean":
            blend = blend + guided / views
        else:
            blend = guided if view == 0 else torch.maximum(blend, guided)
    if space is not None:
        blend = blend / weights.clamp(min=torch.finfo(weights.dtype).tiny)
    return (features + coefficient * blend.view_as(features)).to(dtype)
