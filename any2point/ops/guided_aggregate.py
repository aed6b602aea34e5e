"""Guided aggregation: tokens pooled in the cells of every source view, blended by their agreement with 3D."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from any2point.ops._checks import check_floating, check_index, check_tensor, shape_text
from any2point.ops._guided_aggregate import GuidedPlan, fused, is_fused, make_plan
from any2point.ops.group import group
from any2point.ops.segment_pool import segment_pool
from any2point.reference.batch_norm import BatchNorm
from any2point.reference.guided_aggregate import CellAttention
from any2point.reference.guided_aggregate import guided_aggregate as _composition

__all__ = ["BatchNorm", "CellAttention", "GuidedPlan", "guided_aggregate", "plan_guided"]


def guided_aggregate(
    features: Tensor,
    cell: Tensor,
    cluster: Tensor | None,
    attention: CellAttention,
    view_norm: BatchNorm,
    space_norm: BatchNorm | None,
    *,
    plan: GuidedPlan | None = None,
    num_cells: int,
    num_heads: int,
    coefficient: float,
    scale: float | None = None,
    pooling: str = "mean",
    ensemble: str = "adaptive",
    count_empty: bool = False,
    drop_path: float = 0.0,
    drop_path_rows: bool = False,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Add to every token a blend of what the cells of V views, guided by its 3D voxel, hold around it.

    For each view v, tokens attend to the tokens of their cell and are averaged over it:
    `g_v = GELU(BN_v(mean_cell(x + attention_v(LN_v(x)))))`, spread back to the tokens. With
    `s = GELU(BN(max_voxel x + mean_voxel x))` the result is
    `x + coefficient * sum_v w_v g_v / sum_v w_v`, `w_v = (cos(g_v, s) + 1) / 2`. With another `ensemble` the
    blend is the mean of the `g_v` or their elementwise maximum, and voxels play no part.

    Args:
        features: `[B, S, C]` tokens x, without class token; float16 and bfloat16 are computed in float32 and
            rounded at the end. Autocast rounds the operands of the product with `qkv_weight`; on CUDA
            (sm_90) in bfloat16 also the tokens that are pooled and the blend, which float32 features are
            added to in float32.
        cell: `[B, V, S]` int64 or int32, cell of every token in every view, in `[0, num_cells)`.
        cluster: `[B, S]`, voxel of every token, numbered consecutively over the batch from 0. None is enough
            unless `ensemble` is "adaptive".
        attention: weights of LayerNorm and attention inside cells, stacked over the views.
        view_norm: batch normalisations of the views, tensors `[V, C]`; running statistics updated in place
            when training.
        space_norm: batch normalisation of the voxels, tensors `[C]`; None likewise.
        plan: what `plan_guided` made of the same cell, cluster (None unless `ensemble` is "adaptive"),
            attention and num_cells, for calls to share; made by the call without it.
        num_cells: cells per view and cloud.
        num_heads: heads of the attention; the inner width M is `attention.proj_weight.shape[-1]`.
        coefficient: factor on the blend.
        scale: factor on the attention's scores, `M^-0.5` by default (of the inner width, as officially).
        pooling: of the tokens of a cell: "mean", or "max+mean" (their sum).
        ensemble: how the views are blended: "adaptive" as above, "mean" or "max".
        count_empty: official rule: cells without a token enter the statistics of `view_norm` as zeros.
        drop_path: probability of dropping the attention branch when training.
        drop_path_rows: official rule: drop it per token instead of per cloud.
        training: batch statistics (True) or running ones.
        momentum: of the running statistics.
        eps: of the batch normalisations.
        norm_eps: of the layer normalisations.

    Returns:
        `[B, S, C]`.

    Raises:
        ValueError: shapes do not fit each other, or an option (`pooling`, `ensemble`) is unknown.
        TypeError: an argument has another dtype than listed.

    Differentiable in: features and every weight.
    Deterministic: yes.
    Complexity: O(B V S (C + S M)) time and O(B V S C) memory when training. Kernels, where there are some for
        the device, hold rows of occupied cells alone and differentiate once. The composition of torch ops
        takes over in float64, in exported graphs, and when processes share their statistics.

    Source: Any2Point (Tang et al., ECCV 2024), any-to-3D guided adapter.

    Example:
        >>> tokens = torch.rand(2, 128, 768)
        >>> out = guided_aggregate(tokens, cell, cluster, attention, view_norm, space_norm,
        ...                        num_cells=39, num_heads=6, coefficient=0.3)
        >>> out.shape
        torch.Size([2, 128, 768])
    """
    features = check_tensor("features", features, dims=3, layout="[B, S, C]")
    check_floating("features", features)
    batch, count, width = features.shape
    cell = check_index("cell", cell, like=features, like_name="features")
    if cell.dim() != 3 or cell.shape[0] != batch or cell.shape[2] != count:
        raise ValueError(f"cell: expected shape [{batch}, V, {count}], got {shape_text(cell)}")
    if ensemble not in ("adaptive", "mean", "max"):
        raise ValueError(f"ensemble: expected 'adaptive', 'mean' or 'max', got {ensemble!r}")
    if ensemble == "adaptive":
        cluster = check_index("cluster", cluster, like=features, like_name="features")
        if cluster.shape != (batch, count):
            raise ValueError(f"cluster: expected shape [{batch}, {count}], got {shape_text(cluster)}")
        if space_norm is None:
            raise ValueError("space_norm: expected tensors for ensemble 'adaptive', got None")
        if space_norm.weight.shape != (width,):
            got = shape_text(space_norm.weight)
            raise ValueError(f"space_norm: expected tensors [{width}], got {got}")
    views, inner = cell.shape[1], attention.proj_weight.shape[-1]
    if attention.proj_weight.shape != (views, width, inner):
        got = shape_text(attention.proj_weight)
        raise ValueError(f"attention: expected proj_weight [{views}, {width}, M], got {got}")
    if attention.qkv_weight.shape != (views, 3 * inner, width):
        got = shape_text(attention.qkv_weight)
        raise ValueError(f"attention: expected qkv_weight [{views}, {3 * inner}, {width}], got {got}")
    if num_heads < 1 or inner % num_heads:
        raise ValueError(f"num_heads: expected a divisor of the inner width {inner}, got {num_heads}")
    if view_norm.weight.shape != (views, width):
        got = shape_text(view_norm.weight)
        raise ValueError(f"view_norm: expected tensors [{views}, {width}], got {got}")
    if pooling not in ("mean", "max+mean"):
        raise ValueError(f"pooling: expected 'mean' or 'max+mean', got {pooling!r}")
    if not 0 <= drop_path < 1:
        raise ValueError(f"drop_path: expected a probability below 1, got {drop_path}")
    options: dict[str, Any] = {
        "num_cells": num_cells,
        "num_heads": num_heads,
        "coefficient": coefficient,
        "scale": inner**-0.5 if scale is None else scale,
        "pooling": pooling,
        "ensemble": ensemble,
        "count_empty": count_empty,
        "drop_path": drop_path,
        "drop_path_rows": drop_path_rows,
        "training": training,
        "momentum": momentum,
        "eps": eps,
        "norm_eps": norm_eps,
    }
    tensors = [*attention, *view_norm, *(space_norm or ())]
    if is_fused(features, tensors, training):
        if plan is None:
            voxels = cluster if ensemble == "adaptive" else None
            plan = make_plan(features, cell, voxels, attention, num_cells=num_cells)
        return fused(features, plan, view_norm, space_norm, **options)
    attention = CellAttention(*(tensor.contiguous() for tensor in attention))
    return _composition(
        features.contiguous(),
        cell,
        cluster,
        attention,
        view_norm,
        space_norm,
        **options,
        group=group,
        segment_pool=segment_pool,
    )


def plan_guided(
    features: Tensor,
    cell: Tensor,
    cluster: Tensor | None,
    attention: CellAttention,
    *,
    num_cells: int,
    training: bool = False,
) -> GuidedPlan | None:
    """What calls of `guided_aggregate` with the same cells, voxels and attention share, for its `plan`.

    Args:
        features: of any of the calls.
        cell: as there, and so are the others.
        cluster: None unless the calls' `ensemble` is "adaptive".
        attention: weights.
        num_cells: cells per view and cloud.
        training: as there.

    Returns:
        The plan, differentiable in the weights; None where the calls would have no use for it.
    """
    if not is_fused(features, attention, training):
        return None
    cell = check_index("cell", cell, like=features, like_name="features")
    if cluster is not None:
        cluster = check_index("cluster", cluster, like=features, like_name="features")
    return make_plan(features, cell, cluster, attention, num_cells=num_cells)
