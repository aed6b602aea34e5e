"""The frozen linear layers: on a CPU, products by oneDNN.

torch multiplies float32 matrices on a CPU by MKL, whose kernel for AMD processors has 100 GFLOP/s on a Zen
5 core; that of oneDNN, which comes with torch too, has 200.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear`; the gradient of a frozen one is that of its input alone."""

    def forward(self, x: Tensor) -> Tensor:
        if _is_product(x, self):
            return _Product.apply(x, self.weight, self.bias)
        return super().forward(x)


def _is_product(x: Tensor, layer: nn.Linear) -> bool:
    """Whether oneDNN can take over: eager, frozen, in float32; the op is torch's own and not public."""
    if x.device.type != "cpu" or type(x) is not Tensor:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not (x.dtype == layer.weight.dtype == torch.float32) or torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        return False
    if x.numel() == 0 or torch._C._functorch.peek_interpreter_stack() is not None:  # under vmap, say
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _multiply(x.contiguous(), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled() and grad.requires_grad:  # of a gradient
            return grad @ weight, None, None
        return _multiply(grad.contiguous(), weight.t(), None), None, None
