"""What stands between the matrix products of a block: normalise, add up, quick GELU.

In plain PyTorch, and on CUDA by kernels that do each in one pass (any2point/triton/block.py). Those are left
out where a compiler sees the model, which fuses by itself, and where weights of the source are trained.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor, nn

_TRITON = importlib.util.find_spec("triton") is not None
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def _has_kernels(device: int) -> bool:
    return _TRITON and torch.cuda.get_device_capability(device) >= (8, 0)


def _fused(x: Tensor, *constants: Tensor | None) -> bool:
    """Whether the kernels can take over: CUDA, and no gradient for what they take for constants."""
    if not x.is_cuda or torch.compiler.is_compiling() or x.dtype not in _FLOATS:
        return False
    learned = torch.is_grad_enabled() and any(c is not None and c.requires_grad for c in constants)
    return not learned and _has_kernels(x.get_device())


def fork_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x [..., C]` for the residual, and its normalisation for products in `dtype` (or in autocast's)."""
    if not _fused(x, norm.weight, norm.bias):
        return x, norm(x)
    from any2point.triton.block import ForkNorm

    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return ForkNorm.apply(x, norm.weight, norm.bias, norm.eps, dtype)


def join(x: Tensor, y: Tensor, scale: Tensor | None, z: Tensor | None) -> Tensor:
    """`x + scale y + z`, all `[..., C]`; `scale [C]` and z may be None."""
    if not _fused(x, scale):
        y = y if scale is None else scale * y
        return x + y if z is None else x + y + z
    from any2point.triton.block import Join

    return Join.apply(x, y, scale, z)


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's activation, `x sigmoid(1.702 x)`."""
    if not _fused(x):
        return x * torch.sigmoid(1.702 * x)
    from any2point.triton.block import QuickGELU

    return QuickGELU.apply(x)
