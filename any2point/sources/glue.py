"""What stands between the matrix products of a block: normalise, attend, add up, adapt, quick GELU.

In plain PyTorch, and on CUDA by kernels that do each in one pass (any2point/triton/adapter.py, attention.py
and block.py). Those are left out where a compiler sees the model, which fuses by itself, and where weights of
the source are trained.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.sources.linear import Linear
from any2point.triton import tf32_allowed

_TRITON = importlib.util.find_spec("triton") is not None
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def has_kernels(device: int) -> bool:
    """Whether Triton compiles for this CUDA device."""
    return _TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def in_kernels(x: Tensor) -> bool:
    """Whether kernels in Triton can be launched: on CUDA, and not where a compiler sees the model."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return has_kernels(x.get_device())


def _fused(x: Tensor, *constants: Tensor | None) -> bool:
    """Whether the kernels can take over: CUDA, and constants without gaps and without gradients."""
    if x.dtype not in _FLOATS or not in_kernels(x):
        return False
    given = [c for c in constants if c is not None]
    if not all(c.is_contiguous() for c in given):
        return False
    return not (torch.is_grad_enabled() and any(c.requires_grad for c in given))


def is_hooked(*modules: nn.Module) -> bool:
    """Whether somebody waits for calls of these modules, so that kernels must not pass them by."""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def fork_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x [..., C]` for the residual, and its normalisation for products in `dtype` (or in autocast's)."""
    if not _fused(x, norm.weight, norm.bias) or is_hooked(norm):
        return x, norm(x)
    x, _, y = fork_norm_stacked(x, None, norm, dtype)
    return x, y


def fork_norm_stacked(
    x: Tensor, tail: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`fork_norm` on CUDA, of x and of what is stacked below it, if anything is."""
    from any2point.triton.block import ForkNorm

    return ForkNorm.apply(x, tail, norm.weight, norm.bias, norm.eps, _of_products(dtype))


def _of_products(dtype: torch.dtype) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype


def join_norm(
    x: Tensor, y: Tensor, scale: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`join(x, y, scale, None)` and, as from `fork_norm`, its normalisation."""
    if not _fused(x, scale, norm.weight, norm.bias) or is_hooked(norm):
        return fork_norm(join(x, y, scale, None).to(x.dtype), norm, dtype)
    x, _, y = join_norm_stacked(x, None, y, scale, norm, dtype)
    return x, y


def join_norm_stacked(
    x: Tensor, tail: Tensor | None, y: Tensor, scale: Tensor | None, norm: nn.LayerNorm, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`join_norm` on CUDA, of x and of what is stacked below it, if anything is; y has the rows of both."""
    from any2point.triton.block import JoinNorm

    return JoinNorm.apply(x, tail, y, scale, norm.weight, norm.bias, norm.eps, _of_products(dtype))


def join(x: Tensor, y: Tensor, scale: Tensor | None, z: Tensor | None) -> Tensor:
    """`x + scale y + z`, all `[..., C]`; `scale [C]` and z may be None."""
    if not _fused(x, scale):
        y = y if scale is None else scale * y
        return x + y if z is None else x + y + z
    from any2point.triton.block import Join

    return Join.apply(x, y, scale, z)


class Bottleneck(NamedTuple):
    """Weights of an adapter: `down [r, C]`, `down_bias [r]`, `up [C, r]` and `up_bias [C]`."""

    down: Tensor
    down_bias: Tensor
    up: Tensor
    up_bias: Tensor


def joins(x: Tensor, dtype: torch.dtype, layer_scale: Tensor | None, adapter: Bottleneck) -> bool:
    """Whether `join_adapted` takes these, and a branch of this dtype."""
    if not _fused(x, layer_scale) or dtype not in _FLOATS or adapter.down.dtype not in _FLOATS:
        return False
    if not all(tensor.is_contiguous() for tensor in adapter):
        return False
    from any2point.triton.adapter import WIDEST

    return len(adapter.down) <= WIDEST and (torch.is_autocast_enabled("cuda") or dtype == adapter.down.dtype)


def join_adapted(
    x: Tensor,
    tail: Tensor | None,
    y: Tensor,
    layer_scale: Tensor | None,
    adapter: Bottleneck,
    factor: float,
    dropout: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`x + z + factor (up dropout(quick_gelu(down z)))` of a branch `z = layer_scale y`, all `[..., C]`.

    With a tail stacked below x, y has the rows of both, and so have the two results. What dropout keeps may
    be given, `[..., r]`.
    """
    from any2point.triton.adapter import AdapterJoin

    if dropout and keep is None:
        keep = torch.empty(*y.shape[:-1], len(adapter.down), dtype=torch.uint8, device=y.device)
        keep.bernoulli_(1 - dropout)
    rescale = 1 / (1 - dropout) if dropout < 1 else 0.0
    dtype = _of_products(y.dtype)
    return AdapterJoin.apply(x, tail, y, layer_scale, *adapter, keep, factor, rescale, dtype)


def attend(
    qkv: Tensor, heads: int, *, over_batch: bool = False, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """Attention `[B, T, 3 C]` -> `[B, T, C]` over the tokens of a cloud, or over the batch of a slot."""
    length = qkv.shape[0 if over_batch else 1]
    width = qkv.shape[-1] // 3 // heads
    if not (causal or dropout) and _fused(qkv) and attends(qkv.dtype, length, width, qkv.get_device()):
        return attend_stacked(qkv, heads, len(qkv), 0, over_batch=over_batch)
    # Not three indices: the gradient of `unbind` is one pass.
    parts = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    query, key, value = (part.permute(1, 2, 0, 3) if over_batch else part.transpose(1, 2) for part in parts)
    y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=causal)
    return (y.permute(2, 0, 1, 3) if over_batch else y.transpose(1, 2)).flatten(2)


def attends(dtype: torch.dtype, length: int, width: int, device: int) -> bool:
    """Whether the attention kernel takes sequences of this length and heads of this width, on this GPU."""
    if dtype not in _FLOATS or (dtype == torch.float32 and not tf32_allowed()):
        return False
    from any2point.triton.attention import HEAD_WIDTHS, LONGEST, shared_memory
    from any2point.triton.block import shared_memory_of

    fits = width in HEAD_WIDTHS and length <= LONGEST
    return fits and shared_memory(width) <= shared_memory_of(device)


def attend_stacked(qkv: Tensor, heads: int, batch: int, prefix: int, *, over_batch: bool) -> Tensor:
    """`attend` on CUDA; with a prefix, of rows: the first tokens of all clouds, then the others."""
    from any2point.triton.attention import Attention

    return Attention.apply(qkv, heads, batch, prefix, over_batch)


def hidden_layer(x: Tensor, layer: Linear, activation: str) -> Tensor | None:
    """`activation(layer(x))` of a frozen layer in one kernel, or None where there is none or none as fast."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not in_kernels(x) or not _has_tma(x.get_device()):
        return None
    from any2point.triton.mlp import ACTIVATIONS, FEWEST, Hidden

    if activation not in ACTIVATIONS or x.numel() < FEWEST * x.shape[-1]:
        return None
    if (torch.is_grad_enabled() and x.requires_grad) or is_hooked(layer) or not layer.is_frozen(x):
        return None
    dtype = x.dtype if torch.is_autocast_enabled("cuda") else layer.weight.dtype
    if x.shape[-1] % 8 or len(layer.weight) % 8 or not x.dtype == _of_products(x.dtype) == dtype:
        return None
    weight, bias = layer.rounded(dtype)
    return Hidden.apply(x, weight, bias, activation)


def half_mlp(x: Tensor, first: Linear, second: Linear, activation: str) -> Tensor | None:
    """`second(act(first(x)))` of frozen layers in float32 with factors in float16, where torch allows TF32.

    None where there are no kernels, or x has so few rows that they are not worth it.
    """
    if (
        x.dtype != torch.float32
        or torch.is_autocast_enabled("cuda")
        or not in_kernels(x)
        or not tf32_allowed()
    ):
        return None
    from any2point.triton.half_mlp import ACTIVATIONS, FEWEST, WIDEST, HalfMLP

    layers = first, second
    if activation not in ACTIVATIONS or x.numel() < FEWEST * x.shape[-1] or x.shape[-1] > WIDEST:
        return None
    if is_hooked(*layers) or not all(layer.is_frozen(x) and layer.bias is not None for layer in layers):
        return None
    if any(tensor.dtype != torch.float32 for layer in layers for tensor in layer.parameters()):
        return None
    return HalfMLP.apply(x, *first.scaled(), first.bias, *second.scaled(), second.bias, activation)


@functools.cache
def _has_tma(device: int) -> bool:
    from any2point.triton.block import shared_memory_of

    return torch.cuda.get_device_capability(device) >= (9, 0) and shared_memory_of(device) >= 200_000


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, `x sigmoid(1.702 x)`."""
    if not _fused(x):
        return x * torch.sigmoid(1.702 * x)
    from any2point.triton.block import QuickGELU

    return QuickGELU.apply(x)
