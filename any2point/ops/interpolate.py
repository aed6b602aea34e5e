"""Weighted sums of neighbouring rows: features carried from one set of points to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from any2point.ops._checks import check_float, check_floating, check_tensor, shape_text
from any2point.ops.group import check_grouping, checked


def interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum rows of features with weights, without writing the rows out.

    Equals ``(group(features, index) * weight[..., None]).sum(-2)``; an index of -1 adds nothing.

    Args:
        features: ``[B, N, C]``, or packed ``[P, C]``; float16, bfloat16, float32 or float64.
        index: ``[B, S, K]`` rows of their own cloud, or ``[S, K]`` rows of the packed tensor; int64 or int32,
            -1 for none.
        weight: the shape of ``index``, any floating dtype; used in float32 (float64 with float64 features).

    Returns:
        ``[B, S, C]`` or ``[S, C]`` in the dtype of ``features``, also under autocast; the sum is
        taken in float32 or float64.

    Raises:
        ValueError: wrong shapes or devices. An index outside of -1..N-1 raises on the CPU; on CUDA its result
            is NaN.
        TypeError: a dtype that is not listed.

    Differentiable in: features and weight, any number of times.
    Deterministic: yes, forward and backward; no atomics.
    Complexity: K reads and one write per element; the backward pass builds a list of B * S * K integers.

    Source: three_interpolate of PointNet++ (Qi et al. 2017, equation 2), for any K.

    Example:
        >>> distance, index = ...  # of the 3 nearest centres of every point, [B, N, 3]
        >>> weight = any2point.ops.inverse_distance_weight(distance)
        >>> features = any2point.ops.interpolate(center_features, index, weight)  # [B, N, C]
    """
    features, index = check_grouping(features, index)
    check_floating("features", features)
    dims = features.dim()
    if index.dim() != dims:
        layout = "[B, S, K]" if dims == 3 else "[S, K]"
        raise ValueError(f"index: expected shape {layout}, got {shape_text(index)}")
    weight = check_tensor("weight", weight, dims=dims, layout="like `index`")
    check_floating("weight", weight)
    if weight.shape != index.shape or weight.device != features.device:
        raise ValueError(
            f"weight: expected shape {shape_text(index)} on {features.device} like `index`, "
            f"got {shape_text(weight)} on {weight.device}"
        )
    weight = weight.to(torch.float64 if features.dtype == torch.float64 else torch.float32)
    op = torch.ops.any2point.interpolate.default
    if dims == 2:
        return checked(op, features[None], index[None], weight[None])[0]
    return checked(op, features, index, weight)


def inverse_distance_weight(distance: Tensor, eps: float = 1e-8) -> Tensor:
    """Weights for `interpolate` that fall with the (squared) distance and sum to 1.

    Equals ``w / w.sum(-1, keepdim=True)`` with ``w = 1 / (distance + eps)``.

    Args:
        distance: ``[..., K]``, not negative, as `knn` returns it: squared, infinite for a missing neighbour.
        eps: added to the distance, so that a point on top of a neighbour takes that neighbour's row.

    Returns:
        ``[..., K]`` in float32 (float64 for float64); 0 for infinite distances, also if all of a row are.

    Raises:
        TypeError: ``distance`` is not a floating tensor, or ``eps`` not a number.
        ValueError: ``eps`` is not positive.

    Differentiable in: distance.
    Deterministic: yes.
    Complexity: O(K) per row; plain torch ops.

    Example:
        >>> any2point.ops.inverse_distance_weight(torch.tensor([1.0, 3.0, torch.inf]))
        tensor([0.7500, 0.2500, 0.0000])
    """
    if not isinstance(distance, Tensor):
        raise TypeError(f"distance: expected a tensor [..., K], got {type(distance).__name__}")
    check_floating("distance", distance)
    if distance.dim() == 0:
        raise ValueError("distance: expected shape [..., K], got []")
    eps = check_float("eps", eps)
    if distance.dtype != torch.float64:
        distance = distance.float()  # eps vanishes in 16 bits
    weight = (distance + eps).reciprocal()
    total = weight.sum(-1, keepdim=True)
    return weight / torch.where(total > 0, total, 1.0)


@torch.library.register_fake("any2point::interpolate")
def _interpolate_fake(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], index.shape[1], features.shape[2])


@torch.library.register_fake("any2point::_interpolate_features_grad")
def _interpolate_features_grad_fake(grad: Tensor, index: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_rows, grad.shape[2])


@torch.library.register_fake("any2point::_interpolate_weight_grad")
def _interpolate_weight_grad_fake(grad: Tensor, features: Tensor, index: Tensor) -> Tensor:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.new_empty(index.shape, dtype=dtype)


# The three ops are the three partial contractions of one form, linear in each of features, weight and grad:
#     sum over (s, k) of weight[s, k] * grad[s] . features[index[s, k]].
# Leaving out one of the three is an op; so the gradients of every op are again ops of this family.
def _without_grad(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.any2point.interpolate.default(features, index, weight)


def _without_features(grad: Tensor, index: Tensor, weight: Tensor, num_rows: int) -> Tensor:
    return torch.ops.any2point._interpolate_features_grad.default(grad, index, weight, num_rows)


def _without_weight(grad: Tensor, features: Tensor, index: Tensor) -> Tensor:
    return torch.ops.any2point._interpolate_weight_grad.default(grad, features, index)


def _setup_interpolate(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _interpolate_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    features, index, weight = ctx.saved_tensors
    need_features, _, need_weight = ctx.needs_input_grad
    grad_features = _without_features(grad, index, weight, features.shape[1]) if need_features else None
    return grad_features, None, _without_weight(grad, features, index) if need_weight else None


def _setup_features_grad(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _features_grad_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
    grad, index, weight = ctx.saved_tensors
    need_grad, _, need_weight, _ = ctx.needs_input_grad
    grad_grad = _without_grad(outer, index, weight) if need_grad else None
    return grad_grad, None, _without_weight(grad, outer, index) if need_weight else None, None


def _setup_weight_grad(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _weight_grad_backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    grad, features, index = ctx.saved_tensors
    need_grad, need_features, _ = ctx.needs_input_grad
    grad_grad = _without_grad(features, index, outer) if need_grad else None
    rows = features.shape[1]
    return grad_grad, _without_features(grad, index, outer, rows) if need_features else None, None


for _name, _backward, _setup in (
    ("interpolate", _interpolate_backward, _setup_interpolate),
    ("_interpolate_features_grad", _features_grad_backward, _setup_features_grad),
    ("_interpolate_weight_grad", _weight_grad_backward, _setup_weight_grad),
):
    torch.library.register_autograd(f"any2point::{_name}", _backward, setup_context=_setup)
