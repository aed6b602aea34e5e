"""Rows of features by index: the gather behind every local neighbourhood."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from any2point.ops._checks import check_index, check_tensor, shape_text

_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)


def group(features: Tensor, index: Tensor) -> Tensor:
    """Take rows of features by index; a row for -1 is zero.

    Equals, without the -1, ``features[torch.arange(B)[:, None, None], index]`` (batched) or
    ``features[index]`` (packed).

    Args:
        features: ``[B, N, C]``, or packed ``[P, C]``; float16, bfloat16, float32, float64, an integer dtype
            or bool.
        index: int64 or int32. ``[B, ...]`` (usually ``[B, S, K]``) with rows of their own cloud, 0..N-1, or
            any shape with rows of the packed tensor, 0..P-1; -1 for no row.

    Returns:
        ``[B, ..., C]`` or ``[..., C]`` in the dtype of ``features``, also under autocast.

    Raises:
        ValueError: wrong shapes or devices. An index outside of -1..N-1 raises on the CPU; on CUDA, where
            looking would mean waiting for the device, its row is NaN (0 for integers) and gets no gradient.
        TypeError: a dtype that is not listed.

    Differentiable in: features, any number of times.
    Deterministic: yes, forward and backward. The gradient of a row is added up in the order of the index, in
        float32 (float64 for float64) and without atomics.
    Complexity: one read and one write per element; the backward pass builds a list of B * S * K integers.

    Example:
        >>> index = any2point.ops.knn(centers, points, 16).index   # [B, S, 16]
        >>> neighbourhoods = any2point.ops.group(features, index)  # [B, S, 16, C]
    """
    features, index = check_grouping(features, index)
    if features.dtype not in _DTYPES:
        raise TypeError(f"features: expected a floating, integer or bool dtype, got {features.dtype}")
    packed = features.dim() == 2
    flat = index.reshape(1, -1) if packed else index.flatten(1)
    picked = checked(torch.ops.any2point.group.default, features[None] if packed else features, flat)
    return picked.reshape(*index.shape, features.shape[-1])


def check_grouping(features: object, index: object, name: str = "index") -> tuple[Tensor, Tensor]:
    """features ``[B, N, C]`` with an int64 index ``[B, ...]``, or packed ``[P, C]`` with any index."""
    features = check_tensor("features", features, dims=(2, 3), layout="[B, N, C] or [P, C]")
    index = check_index(name, index, like=features, like_name="features")
    if features.dim() == 3 and (index.dim() < 2 or index.shape[0] != features.shape[0]):
        raise ValueError(
            f"{name}: expected shape [B, ...] with B = {features.shape[0]} as in `features`, "
            f"got {shape_text(index)}"
        )
    return features, index


def checked(op: Callable[..., Any], *args: Any) -> Any:
    """op(*args), with the kernel's complaint about a value as a ValueError.

    The CPU kernels find values out of range on their way, which costs nothing; an extension can only raise
    RuntimeError, and puts its file and line before the text.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        found = re.search(r"\w+: expected .*", str(error).partition("\n")[0])
        if not found:
            raise
        raise ValueError(found[0]) from None


@torch.library.register_fake("any2point::group")
def _group_fake(features: Tensor, index: Tensor) -> Tensor:
    return features.new_empty(features.shape[0], index.shape[1], features.shape[2])


@torch.library.register_fake("any2point::_group_backward")
def _group_backward_fake(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_rows, grad.shape[2])


def _setup_group(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    features, index = inputs
    ctx.save_for_backward(index)
    ctx.num_rows = features.shape[1]


def _group_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.any2point._group_backward.default(grad, index, ctx.num_rows), None


def _setup_group_backward(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _group_double_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return torch.ops.any2point.group.default(grad, index), None, None


torch.library.register_autograd("any2point::group", _group_backward, setup_context=_setup_group)
torch.library.register_autograd(
    "any2point::_group_backward", _group_double_backward, setup_context=_setup_group_backward
)
