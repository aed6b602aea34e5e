"""Local aggregation in training: the kernels' passes, with batch statistics in float64 between.

csrc/local_aggregate/train.h has the identities and the passes. One unit on rows x [M, C] is

    y1 = x W1' + b1,  h = ReLU(n1(y1)),  y2 = h W2' + b2,  z = ReLU(x + n2(y2))

and only y1 [M, H] of each unit is kept. Rows, y1, gradients of rows and operands of products are in the dtype
of the features: float32 on the CPU, float16 or bfloat16 on CUDA.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from any2point.reference.batch_norm import over_processes

# in_weight [H, C], in_bias [H], in_norm weight and bias [H], out_weight [C, H], out_bias, out_norm's two [C]
PER_UNIT = 8
# What is saved of a unit: y1, and in float64 the mean and 1 / deviation of y1 and of y2, the mean of h, the
# sum of h, that of (h - mean) h'. Means are of all processes that share statistics, sums of this one's rows.
SAVED = 8
_ops = torch.ops.any2point


@dataclass(frozen=True)
class _Unit:
    """Parameters of a unit and what the forward pass saved, with what follows from the two."""

    in_weight: Tensor
    in_bias: Tensor
    in_scale: Tensor
    in_shift: Tensor
    out_weight: Tensor
    out_bias: Tensor
    out_scale: Tensor
    out_shift: Tensor
    before: Tensor
    in_mean: Tensor
    in_deviation: Tensor
    out_mean: Tensor
    out_deviation: Tensor
    hidden_mean: Tensor
    hidden_sum: Tensor
    hidden_outer: Tensor

    @functools.cached_property
    def hidden(self) -> list[Tensor]:
        """y1 and what makes h of it."""
        scale = self.in_scale * self.in_deviation
        return [self.before, scale.float(), (self.in_shift - self.in_mean * scale).float()]

    def done(self) -> list[Tensor]:
        """The unit as later passes take it: `hidden`, and the second layer with its normalisation.

        The mean that is taken away is that of the rounded weight's products.
        """
        scale = self.out_scale * self.out_deviation
        weight = (self.out_weight * scale[:, None]).to(self.before.dtype).contiguous()
        return [*self.hidden, weight, (self.out_shift - weight.double() @ self.hidden_mean).float()]


class _Passes:
    """The passes. Below the maximum the gradient after a unit is an `entry` per group and channel.

    Before that it is `dense` rows.
    """

    def __init__(
        self, rows: tuple[Any, ...], grad: Tensor | None = None, argmax: Tensor | None = None
    ) -> None:
        self.rows, self.neighbors = rows, rows[3].shape[-1]
        self.dtype = rows[1].dtype
        self.entry = (grad, argmax)
        self.dense: Tensor | None = None
        self.sums: list[Tensor] = []

    def project(self, done: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        weight = weight.to(self.dtype)
        before, means, spreads, counts = _ops._local_aggregate_project(*self.rows, done, weight, bias)
        hidden = before.shape[1]
        return before, means[:, :hidden], spreads[:, :hidden], counts

    def gram(self, before: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        hidden = before.shape[1]
        gram, total = _ops._local_aggregate_gram(before, scale, shift, self.neighbors)
        return gram[:, :hidden, :hidden], total

    def maximum(self, done: list[Tensor]) -> tuple[Tensor, Tensor]:
        return _ops._local_aggregate_max(*self.rows, done)

    def out_sums(self, unit: _Unit) -> tuple[Tensor, Tensor, Tensor]:
        if not self.sums:
            statistics = [unit.out_mean.float(), unit.out_deviation.float()]
            weights = [unit.out_weight.contiguous(), unit.out_bias.contiguous()]
            self.sums = _ops._local_aggregate_out_sums(
                *unit.hidden, *self.entry, self.neighbors, *weights, *statistics
            )
        width, hidden = unit.out_weight.shape
        total, normed, outer = (part.double().sum(0) for part in self.sums)
        return total, normed, outer[:width, :hidden]

    def hidden_grad(self, unit: _Unit, q: Tensor, constant: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        self.dz, plain, scaled = _ops._local_aggregate_hidden_grad(
            *unit.hidden,
            *self.entry,
            self.dense,
            self.neighbors,
            q.T.to(self.dtype).contiguous(),
            constant.float(),
            (carried if self.dense is None else carried.T).to(self.dtype).contiguous(),
            unit.in_mean.float(),
            unit.in_deviation.float(),
        )
        return plain.double().sum(0), scaled.double().sum(0)

    def rows_grad(self, units: list[_Unit], norm: list[Tensor]) -> Tensor:
        unit = units[-1]
        done = [tensor for other in units[:-1] for tensor in other.done()]
        below: list[Tensor] = []
        if done:
            under = units[-2]
            below = [under.out_bias, under.out_mean, under.out_deviation]
            below = [under.out_weight.to(self.dtype).contiguous(), *(x.float().contiguous() for x in below)]
        norm = [x.float() for x in norm]
        weight = unit.in_weight.T.to(self.dtype).contiguous()
        found, *self.rest = _ops._local_aggregate_rows_grad(
            *self.rows, done, unit.before, *self.entry, self.dense, self.dz, norm, weight, below
        )
        if done:
            self.dense, *self.sums = self.rest
            self.entry = (None, None)
        hidden, width = unit.in_weight.shape
        return found.double().sum(0)[:hidden, :width]

    def features_grad(self, unit: _Unit) -> Tensor:
        if len(self.rest) == 1:  # on CUDA: dy1, of every row
            center, neighbor = self.rows[2:4]
            points = self.rows[0].shape[1]
            self.rest = _ops._local_aggregate_points_grad(
                *self.rest, *self.entry, self.dense, center, neighbor, points
            )
        by_neighbor, by_center, direct = self.rest
        first, half = unit.in_weight, direct.shape[-1]
        return direct + by_neighbor @ first[:, :half] + by_center @ first[:, half:]


def _exact(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """The function in the precision that it says, also under autocast."""

    @functools.wraps(function)
    def call(first: Tensor, *args: Any) -> list[Tensor]:
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

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
    parameters: list[Tensor],
) -> list[Tensor]:
    """out [B, S, C], argmax [B, S, C] int32, and `SAVED` tensors per unit."""
    rows = (points, features, center, neighbor, divisor, wavelength, beta, guard)
    passes = _Passes(rows)
    done: list[Tensor] = []
    saved: list[Tensor] = []
    for first in range(0, len(parameters), PER_UNIT):
        own = parameters[first : first + PER_UNIT]
        before, *statistics = passes.project(done, own[0], own[1])
        in_mean, in_var, count = _merge(*statistics)
        in_deviation = torch.rsqrt(in_var + eps)
        scale = own[2] * in_deviation
        parts = passes.gram(before, scale.float(), (own[3] - in_mean * scale).float())
        gram, total = (part.sum(0, dtype=torch.float64) for part in parts)
        whole_gram, whole_total = over_processes(gram, total)
        mean = whole_total / count
        cov = whole_gram / count - mean[:, None] * mean
        weight = own[4].double()
        out_mean = weight @ mean + own[5]
        out_var = ((weight @ cov) * weight).sum(1).clamp(min=0)
        saved += [before, in_mean, in_deviation, out_mean, torch.rsqrt(out_var + eps), mean]
        saved += [total, gram - mean[:, None] * total]
        done += _Unit(*own, *saved[-SAVED:]).done()
    return [*passes.maximum(done), *saved]


def _merge(mean: Tensor, spread: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and size of everything from those of its parts, [parts, H] and sizes [parts]."""
    mean, spread, count = mean.double(), spread.double(), count.double()[:, None]
    summed, total = over_processes((mean * count).sum(0), count.sum())
    overall = summed / total
    (spread,) = over_processes((spread + count * (mean - overall).square()).sum(0))
    return overall, spread / total, total


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
    parameters: list[Tensor],
) -> list[Tensor]:
    out = features.new_empty(*center.shape, 2 * features.shape[-1], dtype=torch.float32)
    rows = neighbor.shape[0] * neighbor.shape[1] * neighbor.shape[2]
    saved = []
    for first in range(0, len(parameters), PER_UNIT):
        hidden, width = parameters[first].shape
        sizes = [[hidden], [hidden], [width], [width], [hidden], [hidden], [hidden, hidden]]
        saved += [features.new_empty(rows, hidden)]
        saved += [features.new_empty(size, dtype=torch.float64) for size in sizes]
    return [out, features.new_empty(out.shape, dtype=torch.int32), *saved]


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
    parameters: list[Tensor],
    results: list[Tensor],
) -> list[Tensor]:
    """Gradients of the features and of every parameter; `results` are those of `forward`."""
    rows = (points, features, center, neighbor, divisor, wavelength, beta, guard)
    (count,) = over_processes(points.new_full((), neighbor.numel(), dtype=torch.float64))
    out, argmax, *saved = results
    units = [
        _Unit(*parameters[PER_UNIT * u : PER_UNIT * (u + 1)], *saved[SAVED * u : SAVED * (u + 1)])
        for u in range(len(parameters) // PER_UNIT)
    ]
    grad = torch.where(out > 0, grad, 0.0).contiguous()
    size = _scale(grad, units[-1]) if features.dtype == torch.float16 else None
    passes = _Passes(rows, grad if size is None else grad * size, argmax)
    found: list[Tensor] = []
    for u in reversed(range(len(units))):
        unit = units[u]
        total, normed, product = passes.out_sums(unit)
        whole_total, whole_normed = over_processes(total, normed)
        weight = unit.out_weight.double()
        factor = unit.out_scale * unit.out_deviation
        bend = factor * unit.out_deviation * whole_normed / count
        pull = weight * bend[:, None]
        out_grad = factor[:, None] * (product - (whole_total / count)[:, None] * unit.hidden_sum)
        out_grad = out_grad - pull @ unit.hidden_outer
        q = weight.T @ pull
        constant = unit.hidden_mean @ q - (factor * whole_total / count) @ weight
        plain, scaled = passes.hidden_grad(unit, -q, constant, factor[:, None] * weight)
        means = [whole / count for whole in over_processes(plain, scaled)]
        norm = [unit.in_mean, unit.in_deviation, unit.in_scale * unit.in_deviation, *means]
        in_weight = passes.rows_grad(units[: u + 1], norm)
        found = [
            in_weight,
            torch.zeros_like(unit.in_bias),  # before a batch normalisation: exactly zero
            scaled,
            plain,
            out_grad,
            torch.zeros_like(unit.out_bias),
            normed,
            total,
            *found,
        ]
    found = [passes.features_grad(units[0]), *found]
    if size is not None:
        found = [x / size for x in found]
    return [found[0].to(features.dtype), *(x.float().contiguous() for x in found[1:])]


def _scale(grad: Tensor, unit: _Unit) -> Tensor:
    """A power of two that brings the hidden layer's gradient into the middle of float16's range.

    The backward pass is linear in the gradient, so what is multiplied here is divided at the end.
    """
    carried = unit.out_weight.double() * (unit.out_scale * unit.out_deviation)[:, None]
    (largest,) = over_processes(grad.abs().amax() * carried.square().sum(0).amax().sqrt().clamp(min=1))
    exponent = 6 - torch.log2(largest).ceil()
    return torch.exp2(torch.where(exponent.isfinite(), exponent, 0.0).clamp(-100, 100)).float()


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
    parameters: list[Tensor],
    results: list[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(features), *(torch.empty_like(p) for p in parameters)]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *rows, ctx.beta, ctx.guard, _, parameters = inputs
    ctx.has_divisor = rows[4] is not None
    ctx.set_materialize_grads(False)  # of what is saved: zeros, and as large
    kept = [row for row in rows if row is not None]
    ctx.sizes = len(kept), len(parameters)
    ctx.save_for_backward(*kept, *parameters, *output)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rows, parameters = ctx.sizes
    kept = list(ctx.saved_tensors)
    inputs, parameters_, results = kept[:rows], kept[rows : rows + parameters], kept[rows + parameters :]
    if not ctx.has_divisor:
        inputs.insert(4, None)
    if grads[0] is None:
        return (*[None] * 9, [None] * parameters)
    grad = grads[0].contiguous()
    found = backward(grad, *inputs, ctx.beta, ctx.guard, parameters_, results)
    return None, found[0], None, None, None, None, None, None, None, found[1:]


torch.library.register_autograd("any2point::_local_aggregate_train", _backward, setup_context=_setup)
