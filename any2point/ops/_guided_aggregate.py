"""Guided aggregation by kernels: what is computed once per batch, the registered ops, their gradient.

csrc/guided_aggregate/kernel.h has the passes. A cell's row is the mean over its tokens of

    x + proj' [heads; 1],

where `heads` is the attention's output and the last row of `proj` is the bias: pooling commutes with the
projection, so that only heads are pooled per token, and cells are projected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from any2point.ops._checks import exporting
from any2point.ops.group import checked
from any2point.reference.batch_norm import BatchNorm, are_shared
from any2point.reference.guided_aggregate import CellAttention

_ops = torch.ops.any2point
_DEVICES = ("cpu", "cuda")  # those with kernels


class GuidedPlan(NamedTuple):
    """What all blocks share, see `any2point.ops.plan_guided`.

    Layers of segments: cells of the V views, then voxels if there are any; R = B * S tokens.

    `order [L, R]` (tokens by segment), `segment [L, R]` (of each token), `start [L, R + 1]` (of each segment
    in `order`), `held [L, B]` (segments that hold tokens), all int32; `qkv_weight [V * 3M, C]`, `qkv_bias
    [V * 3M]`, `proj [V, M + 1, C]`. Where there is a kernel for the product in autocast's dtype: `low`, the
    weight in it, and `sums [V * 3M]` of its rows.
    """

    order: Tensor
    segment: Tensor
    start: Tensor
    held: Tensor
    qkv_weight: Tensor
    qkv_bias: Tensor
    proj: Tensor
    low: Tensor | None
    sums: Tensor | None


def make_plan(
    features: Tensor, cell: Tensor, cluster: Tensor | None, attention: CellAttention, *, num_cells: int
) -> GuidedPlan:
    """Lists of the tokens of every cell and voxel, and the attention's weights as the kernels take them."""
    lists = checked(_ops._guided_lists.default, cell.clamp(0, num_cells - 1), cluster, num_cells)
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias = (x.float() for x in attention)
    bias = qkv_bias + (qkv_weight * norm_bias[:, None]).sum(-1)
    proj = torch.cat([proj_weight.transpose(1, 2), proj_bias[:, None]], dim=1)
    order, segment, start, held = lists
    weight = (qkv_weight * norm_weight[:, None]).flatten(0, 1)
    low = sums = None
    if dtype := _product_dtype(features):
        low = weight.detach().to(dtype)
        sums = low.float().sum(-1)
    return GuidedPlan(order, segment, start, held, weight, bias.flatten(), proj, low, sums)


def _product_dtype(features: Tensor) -> torch.dtype | None:
    """The 16 bits in which a kernel takes LayerNorm and the product of queries, keys and values, if any.

    That rounds the weights, which sharp attention shows: without autocast they stay as they are.
    """
    width = features.shape[-1]
    if not features.is_cuda or not torch.is_autocast_enabled("cuda") or width % 8 or width > 1024:
        return None
    dtype = torch.get_autocast_dtype("cuda")
    if not _takes(features, dtype) or torch.cuda.get_device_capability(features.device) < (9, 0):
        return None
    return dtype


def _takes(features: Tensor, low: torch.dtype) -> bool:
    """Whether the kernels' rows may be of this dtype: bfloat16 has the range of float32."""
    if low not in (torch.float16, torch.bfloat16):
        return False
    return features.dtype == low or (features.dtype, low) == (torch.float32, torch.bfloat16)


def is_fused(features: Tensor, tensors: Sequence[Tensor], training: bool) -> bool:
    """Whether kernels can take over; exported graphs are for any device."""
    if features.device.type not in _DEVICES or exporting():
        return False
    if any(tensor.dtype == torch.float64 for tensor in (features, *tensors)):
        return False
    return all(tensor.numel() > 0 for tensor in tensors) and not (training and are_shared())


def fused(
    features: Tensor,
    plan: GuidedPlan,
    view_norm: BatchNorm,
    space_norm: BatchNorm | None,
    *,
    num_cells: int,
    num_heads: int,
    coefficient: float,
    scale: float,
    pooling: str,
    ensemble: str,
    count_empty: bool,
    drop_path: float,
    drop_path_rows: bool,
    training: bool,
    momentum: float,
    eps: float,
    norm_eps: float,
) -> Tensor:
    """`any2point.ops.guided_aggregate` after its checks."""
    batch, count, width = features.shape
    views = plan.proj.shape[0]
    rows = features
    if plan.low is not None and _takes(features, plan.low.dtype):
        qkv, _, rounded = _ops._guided_product.default(
            features, plan.qkv_weight, plan.low, plan.sums, plan.qkv_bias, norm_eps
        )
        rows = features if features.dtype == plan.low.dtype else rounded
    else:
        normalized = F.layer_norm(features.float(), (width,), eps=norm_eps)
        qkv = F.linear(normalized, plan.qkv_weight, plan.qkv_bias)
    keep = None
    if training and drop_path > 0:
        drawn = torch.rand(views, batch, count if drop_path_rows else 1, device=features.device)
        keep = ((drawn >= drop_path).float() / (1 - drop_path)).expand(views, batch, count).contiguous()
    both = [view_norm] if space_norm is None or ensemble != "adaptive" else [view_norm, space_norm]
    norms = [tensor.float().contiguous() for norm in both for tensor in (norm.weight, norm.bias)]
    statistics = [tensor for norm in both for tensor in (norm.running_mean, norm.running_var)]
    running = [] if training else [tensor.float().contiguous() for tensor in statistics]
    apart = rows.dtype != features.dtype  # the sum with float32 features loses none of their bits
    rows = rows if width % 4 == 0 else rows.float()  # 16-bit rows are read four channels at a time
    out, mean, _, unbiased, *_ = checked(
        _ops._guided_aggregate.default,
        rows.contiguous(),
        qkv.view(batch, count, views, 3, plan.proj.shape[1] - 1),
        plan.proj,
        norms,
        running,
        plan.order,
        plan.segment,
        plan.start,
        plan.held,
        keep,
        num_heads,
        scale,
        coefficient,
        pooling == "max+mean",
        ensemble,
        batch * num_cells if count_empty else 0,
        eps,
        features.contiguous() if apart else None,
    )
    if training:
        with torch.no_grad():
            new = [mean[:views], unbiased[:views], mean[-1], unbiased[-1]][: len(statistics)]
            new = [value.to(old.dtype) for value, old in zip(new, statistics)]
            torch._foreach_lerp_(statistics, new, momentum)
    return out.to(features.dtype)


@torch.library.register_fake("any2point::_guided_lists")
def _lists_fake(
    cell: Tensor, cluster: Tensor | None, num_cells: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, views, count = cell.shape
    layers, rows = views + int(cluster is not None), batch * count

    def make(*size: int) -> Tensor:
        return cell.new_empty(size, dtype=torch.int32)

    return make(layers, rows), make(layers, rows), make(layers, rows + 1), make(layers, batch)


@torch.library.register_fake("any2point::_guided_product")
def _product_fake(features: Tensor, weight: Tensor, low: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, count, _ = features.shape
    out = features.new_empty(batch, count, weight.shape[0], dtype=torch.float32)
    rounded = low.new_empty(0 if features.dtype == low.dtype else features.shape)
    return out, features.new_empty(2, batch * count, dtype=torch.float32), rounded


@torch.library.register_fake("any2point::_guided_product_backward")
def _product_backward_fake(
    grad: Tensor, product: Tensor, features: Tensor, low: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.empty_like(low, dtype=torch.float32)
    return torch.empty_like(features), weight, weight.new_empty(low.shape[0])


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, _, low, sums, bias, _ = inputs
    ctx.dtype = features.dtype
    ctx.set_materialize_grads(False)  # of what is kept: zeros
    rows = features if features.dtype == low.dtype else output[2]
    ctx.save_for_backward(output[0], rows, low, sums, bias, output[1])


def _product_backward(
    ctx: Any, grad: Tensor | None, _: Tensor | None, grad_rounded: Tensor | None
) -> tuple[Any, ...]:
    if grad is None:
        own = None if grad_rounded is None else grad_rounded.to(ctx.dtype)
        return own, None, None, None, None, None
    own, *found = _ops._guided_product_backward.default(grad, *ctx.saved_tensors)
    own = own if grad_rounded is None else own + grad_rounded
    return own.to(ctx.dtype), found[0], None, None, found[1], None


torch.library.register_autograd("any2point::_guided_product", _product_backward, setup_context=_product_setup)


@torch.library.register_fake("any2point::_guided_aggregate")
def _fake(
    features: Tensor,
    qkv: Tensor,
    proj: Tensor,
    norms: list[Tensor],
    running: list[Tensor],
    order: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    views, inner, width = proj.shape
    rows = order.shape[1]
    shapes: list[tuple[int, ...]] = [(order.shape[0], width)] * 3
    if features.device.type == "cuda":  # kept for the backward pass
        adaptive = len(norms) == 4
        shapes += [(views, rows, (inner + 3) // 4 * 4), (2 * views + 1, rows) if adaptive else (0, 0)]
    else:
        shapes += [(0, 0, 0), (0, 0)]
    out = torch.empty_like(features if rest[-1] is None else rest[-1])
    return out, *(features.new_empty(s, dtype=torch.float32) for s in shapes)


@torch.library.register_fake("any2point::_guided_aggregate_backward")
def _backward_fake(
    grad: Tensor, features: Tensor, qkv: Tensor, proj: Tensor, norms: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    shapes = [torch.empty_like(norm) for norm in norms]
    return torch.empty_like(features), torch.empty_like(qkv), torch.empty_like(proj), shapes


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, qkv, proj, norms, running, *lists = inputs[:9]
    keep, *options, _, base = inputs[9:]
    ctx.options = *options, not running, base is None
    ctx.norms, ctx.running = len(norms), len(running)
    ctx.set_materialize_grads(False)  # of what is kept: zeros
    ctx.save_for_backward(features, qkv, proj, *norms, *output[1:3], *output[4:], *lists, keep)


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return None, None, None, [None] * ctx.norms, [None] * ctx.running, *[None] * 13
    features, qkv, proj, *rest = ctx.saved_tensors
    norms, rest = rest[: ctx.norms], rest[ctx.norms :]
    found = _ops._guided_aggregate_backward.default(
        grad.to(features.dtype).contiguous(), features, qkv, proj, norms, *rest, *ctx.options
    )
    base = None if ctx.options[-1] else grad
    return *found, [None] * ctx.running, *[None] * 12, base


torch.library.register_autograd("any2point::_guided_aggregate", _backward, setup_context=_setup)
