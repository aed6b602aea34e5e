"""Local aggregation in training: an op forward and one backward, which put the passes together.

One unit on rows x [M, C] is

    y1 = x W1' + b1,  h = ReLU(n1(y1)),  y2 = h W2' + b2,  z = ReLU(x + n2(y2))

and only y1 [M, H] of each unit is kept, or with `recompute` nothing of the rows. Batch statistics, and what
follows from them, are in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from any2point.ops import _local_aggregate_recompute as again
from any2point.ops._local_aggregate_passes import PER_UNIT, SAVED, CudaPasses, Passes, Unit
from any2point.reference.batch_norm import are_shared, over_processes

# Channels 2 C, hidden channels and number of units that csrc/local_aggregate/hopper.h has kernels for.
HOPPER_SIZES = {(192, 96, 2), (384, 192, 1), (768, 32, 1)}
if not torch._C._dispatch_has_kernel_for_dispatch_key("any2point::_local_aggregate_hopper", "CUDA"):
    HOPPER_SIZES = set()  # built without sm_90


def on_hopper(features: Tensor, hidden: list[int], dtype: torch.dtype) -> bool:
    """Whether there are kernels for sm_90a for such features in that dtype and the units' hidden channels."""
    width = 2 * features.shape[-1]
    if not any(hidden == [size] * units for wide, size, units in HOPPER_SIZES if wide == width):
        return False
    device = torch.cuda.get_device_properties(features.device)
    low = dtype in (torch.float16, torch.bfloat16)
    return low and features.numel() < 1 << 33 and (device.major, device.minor) == (9, 0)


def _kind(rows: tuple[Any, ...], parameters: list[Tensor]) -> type[Passes]:
    """The passes for such rows and units."""
    if not rows[0].is_cuda:
        return Passes
    if on_hopper(rows[1], [len(weight) for weight in parameters[::PER_UNIT]], rows[1].dtype):
        return CudaPasses
    from any2point.triton.local_aggregate_train import TritonPasses

    return TritonPasses


def _dense(x: Any) -> Any:
    """A tensor as kernels read it: contiguous, which the same centres for all clouds are not, and aligned."""
    if not isinstance(x, Tensor):
        return x
    x = x.contiguous()
    return x.clone() if x.is_cuda and x.data_ptr() % 16 else x


def _exact(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The function in the precision that it says, also under autocast, on tensors that kernels can read."""

    @functools.wraps(function)
    def call(*args: Any) -> list[Tensor]:
        with torch.autocast(args[0].device.type, enabled=False), torch.cuda.device_of(args[0]):
            return function(*(tree_map(_dense, arg) for arg in args))

    return call


@torch.library.custom_op("any2point::_local_aggregate_train", mutates_args=(), device_types=("cpu", "cuda"))
@_exact
def forward(
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    beta: float,
    guard: bool,
    eps: float,
    half: bool,
    parameters: list[Tensor],
    recompute: bool,
) -> list[Tensor]:
    """out [B, S, C], argmax [B, S, C] int32, and `SAVED` tensors per unit. `half`: operands in float16.

    With `recompute` y1 is empty, and argmax, -1 where out is not positive, as small as it can be.
    """
    operand = features.half() if half else features
    rows = (points, operand, center, neighbor, divisor, wavelength, beta, guard)
    kind = _kind(rows, parameters)

    def part(clouds: slice) -> Passes:
        passes = kind(again.rows_of(rows, clouds))
        passes.single = features[clouds] if half else None
        return passes

    passes = part(slice(None))
    if recompute:
        out, argmax, *rest = again.results(passes, part, parameters, eps)
        return [out, torch.where(out > 0, argmax, -1).to(_index_dtype(neighbor)), *rest]
    done: list[Tensor] = []
    saved: list[Tensor] = []
    for first in range(0, len(parameters), PER_UNIT):
        own = parameters[first : first + PER_UNIT]
        before, means, spreads, counts = passes.project(done, own[0], own[1])
        found = passes.in_statistics(means, spreads, counts, own[2], own[3], eps)
        grams = passes.gram(before, *found[2][:2])
        saved += [before, *found, *passes.out_statistics(*grams, own[4:], eps)]
        done += Unit(*own, *saved[-SAVED:]).done
    return [*passes.maximum(done), *saved]


@forward.register_fake
def _(
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    beta: float,
    guard: bool,
    eps: float,
    half: bool,
    parameters: list[Tensor],
    recompute: bool,
) -> list[Tensor]:
    features = features.half() if half else features
    out = features.new_empty(*center.shape, 2 * features.shape[-1], dtype=torch.float32)
    rows = 0 if recompute else neighbor.shape[0] * neighbor.shape[1] * neighbor.shape[2]
    saved = []
    for first in range(0, len(parameters), PER_UNIT):
        hidden, width = parameters[first].shape
        double, single = torch.float64, torch.float32
        saved += [features.new_empty(rows, hidden)]
        saved += [features.new_empty(hidden, dtype=double) for _ in range(2)]
        saved += [features.new_empty(4, hidden, dtype=single)]
        saved += [features.new_empty(width, dtype=double) for _ in range(2)]
        saved += [features.new_empty(hidden, dtype=double) for _ in range(2)]
        saved += [features.new_empty(hidden, hidden, dtype=double)]
        saved += [features.new_empty(2, width, dtype=single), features.new_empty(width, hidden)]
        saved += [features.new_empty(width, dtype=single)]
    index = _index_dtype(neighbor) if recompute else torch.int32
    return [out, features.new_empty(out.shape, dtype=index), *saved]


@torch.library.custom_op(
    "any2point::_local_aggregate_train_backward", mutates_args=(), device_types=("cpu", "cuda")
)
@_exact
def backward(
    grad: Tensor,
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    beta: float,
    guard: bool,
    half: bool,
    parameters: list[Tensor],
    results: list[Tensor],
    recompute: bool,
) -> list[Tensor]:
    """Gradients of the features and of every parameter.

    `results` are those of `forward`, with `recompute` without the first.
    """
    operand = features.half() if half else features
    rows = (points, operand, center, neighbor, divisor, wavelength, beta, guard)
    out, argmax, *saved = [results[0] + 1.0, *results] if recompute else results
    units = [
        Unit(*parameters[PER_UNIT * u : PER_UNIT * (u + 1)], *saved[SAVED * u : SAVED * (u + 1)])
        for u in range(len(parameters) // PER_UNIT)
    ]
    kind = _kind(rows, parameters)
    entries, factor = _entries(grad, out, units[-1], operand.dtype == torch.float16, kind is CudaPasses)
    del out

    def part(clouds: slice, entered: bool = True) -> Passes:
        if not entered:
            return kind(again.rows_of(rows, clouds))
        at = argmax[clouds].clamp(min=0).int() if recompute else argmax
        return kind(again.rows_of(rows, clouds), entries[clouds], at)

    passes = part(slice(None))
    if recompute:
        found, features_grad = again.Backward(passes, part, units, factor, features.dtype).gradients()
    else:
        found, features_grad = _gradients(passes, units, factor, features.dtype)
    found = [x.float() for x in found]
    if factor is not None:
        found = list(torch._foreach_mul(found, factor))
    of_units = []
    for u, unit in enumerate(units):
        in_weight, scaled, plain, out_grad, normed, total = found[6 * u : 6 * u + 6]
        # Biases before a batch normalisation: exactly zero.
        in_bias, out_bias = torch.zeros_like(unit.in_bias), torch.zeros_like(unit.out_bias)
        of_units += [in_weight, in_bias, scaled, plain, out_grad, out_bias, normed, total]
    return [features_grad, *(x.contiguous() for x in of_units)]


def _gradients(
    passes: Passes, units: list[Unit], factor: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Gradients of each unit's weights, as the passes give them, and of the features."""
    found: list[Tensor] = []
    for u in reversed(range(len(units))):
        unit = units[u]
        passes.out_sums(unit)
        (out_grad, normed, total), linear = passes.pull(unit)
        plain, scaled = passes.hidden_grad(unit, linear)
        in_weight = passes.rows_grad(units[: u + 1], passes.hidden_means(plain, scaled))
        found = [in_weight, scaled, plain, out_grad, normed, total, *found]
    return found, passes.features_grad(units[0], factor, dtype)


def _index_dtype(neighbor: Tensor) -> torch.dtype:
    """The least one that holds a row of a group, or -1."""
    return torch.int16 if neighbor.shape[2] < 1 << 15 else torch.int32


def _entries(
    grad: Tensor, out: Tensor, unit: Unit, scaled: bool, kernels: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The gradient below the last ReLU, perhaps times a size, and the factor that takes the size away again.

    The size is a power of two that brings the hidden layer's gradient into the middle of float16's range.
    The backward pass is linear in the gradient, so what is multiplied here is divided at the end.
    """
    if kernels and not are_shared():
        layer = (unit.out_weight, unit.out_scale, unit.out_deviation)
        entries, sizes = torch.ops.any2point._local_aggregate_entries(grad, out, *layer, scaled)
        return entries, sizes[1] if scaled else None
    grad = torch.where(out > 0, grad, 0.0).contiguous()
    if not scaled:
        return grad, None
    carried = unit.out_weight.double() * (unit.out_scale * unit.out_deviation)[:, None]
    (largest,) = over_processes(grad.abs().amax() * carried.square().sum(0).amax().sqrt().clamp(min=1))
    exponent = 6 - torch.log2(largest).ceil()
    size = torch.exp2(torch.where(exponent.isfinite(), exponent, 0.0).clamp(-100, 100)).float()
    return grad * size, size.reciprocal()


@backward.register_fake
def _(
    grad: Tensor,
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    beta: float,
    guard: bool,
    half: bool,
    parameters: list[Tensor],
    results: list[Tensor],
    recompute: bool,
) -> list[Tensor]:
    return [torch.empty_like(features), *(torch.empty_like(p) for p in parameters)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *rows, ctx.beta, ctx.guard, _, ctx.half, parameters, ctx.recompute = inputs
    ctx.has_divisor = rows[4] is not None
    ctx.set_materialize_grads(False)  # of what is saved: zeros, and as large
    kept = [row for row in rows if row is not None]
    ctx.sizes = len(kept), len(parameters)
    ctx.save_for_backward(*kept, *parameters, *output[1 if ctx.recompute else 0 :])


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rows, parameters = ctx.sizes
    kept = list(ctx.saved_tensors)
    inputs, parameters_, results = kept[:rows], kept[rows : rows + parameters], kept[rows + parameters :]
    if not ctx.has_divisor:
        inputs.insert(4, None)
    if grads[0] is None:
        return (*[None] * 10, [None] * parameters, None)
    grad = grads[0].contiguous()
    found = backward(grad, *inputs, ctx.beta, ctx.guard, ctx.half, parameters_, results, ctx.recompute)
    return None, found[0], *[None] * 8, found[1:], None


torch.library.register_autograd("any2point::_local_aggregate_train", _backward, setup_context=_setup)
