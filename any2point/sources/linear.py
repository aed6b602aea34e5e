"""The frozen linear layers: on a CPU, products by oneDNN; on CUDA, copies of the weights made once.

torch multiplies float32 matrices on a CPU by MKL, whose kernel for AMD processors has 100 GFLOP/s on a Zen
5 core; that of oneDNN, which comes with torch too, has 200. Autocast rounds weights that need no gradient
anew in every product. In TF32 products with weights as they lie are slower than with transposed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.triton import tf32_allowed


class _Copies(NamedTuple):
    """Weight and bias in another form, and what they were made of: the tensors and their versions."""

    tensors: list[Tensor]
    sources: list[Tensor]
    versions: list[int]


class Linear(nn.Linear):
    """`nn.Linear`; the gradient of a frozen one is that of its input alone.

    On CUDA a frozen one keeps its weights in the lower precision of autocast, and where torch allows TF32, in
    float16 or, for gradients, transposed. They follow changes of the parameters that PyTorch counts, as by
    `load_state_dict`, not those through `.data`.
    """

    _copies: dict[Any, _Copies] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if _is_product(x, self):
            return _Product.apply(x, self.weight, self.bias)
        if x.is_cuda and self.is_frozen(x):
            if torch.is_autocast_enabled("cuda"):
                return F.linear(x, *self.rounded(torch.get_autocast_dtype("cuda")))
            if torch.is_grad_enabled() and x.requires_grad and _in_tf32(x, self.weight):
                return _Transposed.apply(x, self.weight, self.bias, self._transposed())
        return super().forward(x)

    def is_frozen(self, x: Tensor) -> bool:
        """Whether copies of weights can be kept for a product with x: eager, and no gradient for them."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return False
        if any(p.requires_grad or p.is_inference() for p in self.parameters()):
            return False
        return torch._C._functorch.peek_interpreter_stack() is None

    def rounded(self, dtype: torch.dtype) -> list[Tensor]:
        """Weight, and bias if there is one, of a frozen layer on CUDA in another type."""
        sources = [p for p in (self.weight, self.bias) if p is not None]
        if all(source.dtype == dtype for source in sources):
            return sources
        return self._kept(dtype, sources, lambda source: [source.to(dtype)])

    def scaled(self) -> list[Tensor]:
        """Weight of a frozen layer times a power of 2, in float16, and that power's reciprocal, `[1]`."""
        return self._kept("scaled", [self.weight], scaled_weight)

    def _transposed(self) -> Tensor:
        """The weight `[in, out]`, contiguous."""
        return self._kept("transposed", [self.weight], lambda source: [source.t().contiguous()])[0]

    def _kept(self, form: Any, sources: list[Tensor], make: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """What `make` gives, anew only after changes."""
        versions = [source._version for source in sources]
        self._copies = self._copies or {}
        kept = self._copies.get(form)
        same = kept is not None and all(a is b for a, b in zip(kept.sources, sources))
        if same and kept.versions == versions:  # type: ignore[union-attr]
            return kept.tensors  # type: ignore[union-attr]
        with torch.inference_mode(False), torch.no_grad():
            tensors = [tensor for source in sources for tensor in make(source)]
            if torch.cuda.is_current_stream_capturing():  # not there before a replay
                return tensors
            if same:  # in place, where graphs look for them
                torch._foreach_copy_(kept.tensors, tensors)  # type: ignore[union-attr]
                tensors = kept.tensors  # type: ignore[union-attr]
            torch.cuda.current_stream(self.weight.device).synchronize()  # for calls on other streams
        self._copies[form] = _Copies(tensors, sources, versions)
        return tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        self._copies = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_copies"}


def scaled_weight(weight: Tensor) -> list[Tensor]:
    """The power brings the largest magnitude between 2 and 4; see any2point/triton/half_mlp.py."""
    exponent = torch.frexp(weight.abs().amax()).exponent.clamp(-100, 127)
    power = torch.ldexp(weight.new_ones(1), 2 - exponent)
    return [(weight * power).half(), power.reciprocal()]


def _in_tf32(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is in TF32, for which matrix units take operands whose rows are summed over."""
    return x.dtype == weight.dtype == torch.float32 and tf32_allowed()


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


class _Transposed(torch.autograd.Function):
    """The product of a frozen layer, whose gradient takes its weights from a transposed copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: Tensor) -> Tensor:
        ctx.save_for_backward(transposed)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (transposed,) = ctx.saved_tensors
        return F.linear(grad, transposed), None, None, None
