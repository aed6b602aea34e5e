"""Local aggregation in training on the CPU: the kernels' passes, with batch statistics in float64 between.

csrc/local_aggregate/train.h has the passes and the identities. One unit on rows x [M, C] is

    y1 = x W1' + b1,  h = ReLU(n1(y1)),  y2 = h W2' + b2,  z = ReLU(x + n2(y2))

and only y1 [M, H] of each unit is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

# in_weight [H, C], in_bias [H], in_norm weight and bias [H], out_weight [C, H], out_bias, out_norm's two [C]
PER_UNIT = 8
# What is saved of a unit: y1, and in float64 the mean and 1 / deviation of y1 and of y2, the mean and the
# covariance of h.
SAVED = 7
_ops = torch.ops.any2point


class _Unit(NamedTuple):
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
    hidden_cov: Tensor

    def hidden(self) -> list[Tensor]:
        """y1 and what makes h of it."""
        scale = self.in_scale * self.in_deviation
        return [self.before, scale.float(), (self.in_shift - self.in_mean * scale).float()]

    def done(self) -> list[Tensor]:
        """The unit as later passes take it: `hidden`, and the second layer with its normalisation."""
        scale = self.out_scale * self.out_deviation
        weight = (self.out_weight * scale[:, None]).float().contiguous()
        return [*self.hidden(), weight, (self.out_shift + (self.out_bias - self.out_mean) * scale).float()]


@torch.library.custom_op("any2point::_local_aggregate_train", mutates_args=(), device_types="cpu")
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
    count, neighbors = neighbor.numel(), neighbor.shape[-1]
    done: list[Tensor] = []
    saved: list[Tensor] = []
    for first in range(0, len(parameters), PER_UNIT):
        own = parameters[first : first + PER_UNIT]
        before, means, spreads, counts = _ops._local_aggregate_project(*rows, done, own[0], own[1])
        hidden = before.shape[1]
        in_mean, in_var = _merge(means[:, :hidden], spreads[:, :hidden], counts)
        in_deviation = torch.rsqrt(in_var + eps)
        scale = own[2] * in_deviation
        gram, total = _ops._local_aggregate_gram(
            before, scale.float(), (own[3] - in_mean * scale).float(), neighbors
        )
        mean = total.double().sum(0) / count
        cov = gram.double().sum(0)[:hidden, :hidden] / count - mean[:, None] * mean
        weight = own[4].double()
        out_mean = weight @ mean + own[5]
        out_var = ((weight @ cov) * weight).sum(1).clamp(min=0)
        saved += [before, in_mean, in_deviation, out_mean, torch.rsqrt(out_var + eps), mean, cov]
        done += _Unit(*own, *saved[-SAVED:]).done()
    out, argmax = _ops._local_aggregate_max(*rows, done)
    return [out, argmax, *saved]


def _merge(mean: Tensor, spread: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of everything from those of its parts, [parts, H] and sizes [parts]."""
    mean, spread, count = mean.double(), spread.double(), count.double()[:, None]
    total = count.sum()
    overall = (mean * count).sum(0) / total
    return overall, (spread + count * (mean - overall).square()).sum(0) / total


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
    out = features.new_empty(*center.shape, 2 * features.shape[-1])
    rows = neighbor.shape[0] * neighbor.shape[1] * neighbor.shape[2]
    saved = []
    for first in range(0, len(parameters), PER_UNIT):
        hidden, width = parameters[first].shape
        sizes = [[hidden], [hidden], [width], [width], [hidden], [hidden, hidden]]
        saved += [features.new_empty(rows, hidden)]
        saved += [features.new_empty(size, dtype=torch.float64) for size in sizes]
    return [out, features.new_empty(out.shape, dtype=torch.int32), *saved]


@torch.library.custom_op("any2point::_local_aggregate_train_backward", mutates_args=(), device_types="cpu")
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
    count, neighbors = neighbor.numel(), neighbor.shape[-1]
    out, argmax, *saved = results
    units = [
        _Unit(*parameters[PER_UNIT * u : PER_UNIT * (u + 1)], *saved[SAVED * u : SAVED * (u + 1)])
        for u in range(len(parameters) // PER_UNIT)
    ]
    # After the last unit the gradient is one entry per group and channel; before, `dense` rows.
    entry: tuple[Tensor | None, Tensor | None] = (torch.where(out > 0, grad, 0.0).contiguous(), argmax)
    dense: Tensor | None = None
    last = units[-1]
    sums = _ops._local_aggregate_out_sums(
        *last.hidden(),
        *entry,
        neighbors,
        last.out_weight.contiguous(),
        last.out_bias.contiguous(),
        last.out_mean.float(),
        last.out_deviation.float(),
    )
    found: list[Tensor] = []
    for u in reversed(range(len(units))):
        unit = units[u]
        width, hidden = unit.out_weight.shape
        total, normed = sums[0].double().sum(0), sums[1].double().sum(0)
        weight = unit.out_weight.double()
        factor = unit.out_scale * unit.out_deviation
        bend = factor * unit.out_deviation * normed / count
        pull = weight * bend[:, None]
        product = sums[2].double().sum(0)[:width, :hidden]
        out_grad = factor[:, None] * (product - (total / count)[:, None] * (count * unit.hidden_mean))
        out_grad = out_grad - pull @ (count * unit.hidden_cov)
        q = weight.T @ pull
        constant = unit.hidden_mean @ q - (factor * total / count) @ weight
        carried = factor[:, None] * weight
        dz, plain, scaled = _ops._local_aggregate_hidden_grad(
            *unit.hidden(),
            *entry,
            dense,
            neighbors,
            (-q.T).float().contiguous(),
            constant.float(),
            (carried if dense is None else carried.T).float().contiguous(),
            unit.in_mean.float(),
            unit.in_deviation.float(),
        )
        plain, scaled = plain.double().sum(0), scaled.double().sum(0)
        norm = [unit.in_mean, unit.in_deviation, unit.in_scale * unit.in_deviation]
        norm = [x.float() for x in (*norm, plain / count, scaled / count)]
        done = [tensor for other in units[:u] for tensor in other.done()]
        below: list[Tensor] = []
        if u:
            under = units[u - 1]
            below = [under.out_weight, under.out_bias, under.out_mean, under.out_deviation]
            below = [x.float().contiguous() for x in below]
        in_weight, *rest = _ops._local_aggregate_rows_grad(
            *rows, done, unit.before, *entry, dense, dz, norm, unit.in_weight.T.contiguous(), below
        )
        found = [
            in_weight.double().sum(0)[:hidden, :width],
            torch.zeros_like(unit.in_bias),  # before a batch normalisation: exactly zero
            scaled,
            plain,
            out_grad,
            torch.zeros_like(unit.out_bias),
            normed,
            total,
            *found,
        ]
        if u:
            dense, *sums = rest
            entry = (None, None)
    by_neighbor, by_center, direct = rest
    half = features.shape[-1]
    first = units[0].in_weight
    features_grad = direct + by_neighbor @ first[:, :half] + by_center @ first[:, half:]
    return [features_grad, *(x.to(torch.float32) for x in found)]


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
    kept = [row for row in rows if row is not None]
    ctx.sizes = len(kept), len(parameters)
    ctx.save_for_backward(*kept, *parameters, *output)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rows, parameters = ctx.sizes
    kept = list(ctx.saved_tensors)
    inputs, parameters_, results = kept[:rows], kept[rows : rows + parameters], kept[rows + parameters :]
    if not ctx.has_divisor:
        inputs.insert(4, None)
    found = backward(grads[0].contiguous(), *inputs, ctx.beta, ctx.guard, parameters_, results)
    return None, found[0], None, None, None, None, None, None, None, found[1:]


torch.library.register_autograd("any2point::_local_aggregate_train", _backward, setup_context=_setup)
