"""The passes of local aggregation in training, and what lies between them.

csrc/local_aggregate/train.h has the identities and the passes, train_algebra.h the kernels for what lies
between on sm_90, and any2point/triton/local_aggregate_train.py the passes for other sizes and GPUs. Rows, y1,
gradients of rows and the operands of products are in the dtype of the features: float32 on the CPU, 16 bits
on sm_90, and either in Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from any2point.reference.batch_norm import are_shared, over_processes

# in_weight [H, C], in_bias [H], in_norm weight and bias [H], out_weight [C, H], out_bias, out_norm's two [C]
PER_UNIT = 8
# What is saved of a unit: the fields of `Unit` behind its parameters.
SAVED = 12
_ops = torch.ops.any2point


@dataclass(frozen=True)
class Unit:
    """Parameters of a unit and what the forward pass saved.

    Deviations are 1 / sqrt(variance + eps). Means are of all processes that share statistics, sums of this
    one's rows.
    """

    in_weight: Tensor
    in_bias: Tensor
    in_scale: Tensor
    in_shift: Tensor
    out_weight: Tensor
    out_bias: Tensor
    out_scale: Tensor
    out_shift: Tensor
    before: Tensor  # y1 [M, H]
    in_mean: Tensor  # of y1, float64
    in_deviation: Tensor  # float64
    in_single: Tensor  # [4, H] float32: factor and sum that normalise y1, its mean and deviation
    out_mean: Tensor  # of y2, float64
    out_deviation: Tensor  # float64
    hidden_mean: Tensor  # of h, float64
    hidden_sum: Tensor  # of h, float64
    hidden_outer: Tensor  # of (h - mean) h', float64
    out_single: Tensor  # [2, C] float32: mean and deviation of y2
    folded: Tensor  # W2 with its normalisation, in the dtype of y1
    folded_bias: Tensor  # float32

    @property
    def hidden(self) -> list[Tensor]:
        """y1 and what makes h of it."""
        return [self.before, *self.in_single[:2]]

    @property
    def done(self) -> list[Tensor]:
        """The unit as later passes take it: `hidden`, and the second layer with its normalisation."""
        return [*self.hidden, self.folded, self.folded_bias]


class Passes:
    """The passes. Below the maximum the gradient after a unit is an `entry` per group and channel.

    Before that it is `dense` rows. `single` are features in float32, if those of the rows were rounded.
    """

    single: Tensor | None = None
    in_place = False  # whether y1 may take the place of another unit's

    def __init__(
        self, rows: tuple[Any, ...], grad: Tensor | None = None, argmax: Tensor | None = None
    ) -> None:
        self.rows, self.neighbors = rows, rows[3].shape[-1]
        self.dtype = rows[1].dtype
        self.entry = (grad, argmax)
        self.dense: Tensor | None = None
        self.dz: Tensor | None = None
        self.sums: list[Tensor] = []
        self.rest: list[Tensor] = []
        self.number = rows[3].numel()

    @cached_property
    def count(self) -> float | Tensor:
        """Rows of all processes."""
        if not are_shared():
            return self.number
        return over_processes(self.rows[0].new_full((), self.number, dtype=torch.float64))[0]

    def add_up(self, part: Tensor) -> Tensor:
        return part.sum(0, dtype=torch.float64)

    def joined(self, sums: Sequence[list[Tensor]]) -> list[Tensor]:
        """Sums of several chunks of rows, in a single part."""
        return [self.add_up(torch.stack(parts))[None].float() for parts in zip(*sums)]

    def factor(self, weight: Tensor) -> Tensor:
        """A weight as products take it."""
        return weight.to(self.dtype).contiguous()

    def project(
        self, done: list[Tensor], weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y1 and its statistics."""
        weight = self.factor(weight)
        before, means, spreads, counts = _ops._local_aggregate_project(*self.rows, done, weight, bias)
        hidden = before.shape[1]
        return before, means[:, :hidden], spreads[:, :hidden], counts

    def before(self, done: list[Tensor], weight: Tensor, bias: Tensor, to: Tensor | None = None) -> Tensor:
        """What `project` gives without its statistics, perhaps in `to`."""
        before = self.project(done, weight, bias)[0]
        return before if to is None else to.copy_(before)

    def project_to(self, to: Tensor, done: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
        """`project` with y1 in `to`, which may be that of the last unit done; returns the statistics."""
        before, *statistics = self.project(done, weight, bias)
        to.copy_(before)
        return statistics

    def in_statistics(
        self, means: Tensor, spreads: Tensor, counts: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> list[Tensor]:
        """`Unit`'s in_mean to in_single, from the parts that `project` returns."""
        means, spreads, counts = means.double(), spreads.double(), counts.double()[:, None]
        (summed,) = over_processes((means * counts).sum(0))
        mean = summed / self.count
        (spread,) = over_processes((spreads + counts * (means - mean).square()).sum(0))
        deviation = torch.rsqrt(spread / self.count + eps)
        factor = scale * deviation
        single = torch.stack([factor, shift - mean * factor, mean, deviation]).float()
        return [mean, deviation, single]

    def gram(self, before: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        hidden = before.shape[1]
        gram, total = _ops._local_aggregate_gram(before, scale, shift, self.neighbors)
        return gram[:, :hidden, :hidden], total

    def out_statistics(self, grams: Tensor, sums: Tensor, layer: list[Tensor], eps: float) -> list[Tensor]:
        """`Unit`'s out_mean to folded_bias, from the parts that `gram` returns.

        The mean that the folded bias takes away is that of the rounded weight's products.
        """
        gram, total = grams.sum(0, dtype=torch.float64), sums.sum(0, dtype=torch.float64)
        whole_gram, whole_total = over_processes(gram, total)
        mean = whole_total / self.count
        cov = whole_gram / self.count - mean[:, None] * mean
        weight = layer[0].double()
        out_mean = weight @ mean + layer[1]
        deviation = torch.rsqrt(((weight @ cov) * weight).sum(1).clamp(min=0) + eps)
        folded = self.factor(layer[0] * (layer[2] * deviation)[:, None])
        bias = (layer[3] - folded.double() @ mean).float()
        single = torch.stack([out_mean, deviation]).float()
        outer = gram - mean[:, None] * total
        return [out_mean, deviation, mean, total, outer, single, folded, bias]

    def maximum(self, done: list[Tensor]) -> tuple[Tensor, Tensor]:
        return _ops._local_aggregate_max(*self.rows, done)

    def out_sums(self, unit: Unit) -> None:
        if not self.sums:
            self.sums = _ops._local_aggregate_out_sums(
                *unit.hidden, *self.entry, self.neighbors, unit.out_weight, unit.out_bias, *unit.out_single
            )

    def pull(self, unit: Unit) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of W2 and of the normalisation's weight and bias; and what `hidden_grad` takes."""
        width, hidden = unit.out_weight.shape
        total, normed, product = (self.add_up(part) for part in self.sums)
        product = product[:width, :hidden]
        whole_total, whole_normed = over_processes(total, normed)
        weight = unit.out_weight.double()
        factor = unit.out_scale * unit.out_deviation
        pull = weight * (factor * unit.out_deviation * whole_normed / self.count)[:, None]
        out_grad = factor[:, None] * (product - (whole_total / self.count)[:, None] * unit.hidden_sum)
        out_grad = out_grad - pull @ unit.hidden_outer
        q = weight.T @ pull
        constant = unit.hidden_mean @ q - (factor * whole_total / self.count) @ weight
        carried = factor[:, None] * weight
        carried = carried if self.dense is None else carried.T
        linear = [x.float().contiguous() for x in (-q.T, constant, carried)]
        return [out_grad, normed, total], linear

    def hidden_grad(
        self, unit: Unit, linear: list[Tensor], to: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums of `dz`, which goes to `to` if that is there."""
        dense, self.dz = self.dense_rows(), self.place_for_dz(unit) if to is None else to
        plain, scaled = _ops._local_aggregate_hidden_grad(
            *unit.hidden, *self.entry, dense, self.neighbors, *linear, *unit.in_single[2:], self.dz, []
        )
        return self.add_up(plain), self.add_up(scaled)

    def dense_rows(self) -> list[Tensor]:
        return [] if self.dense is None else [self.dense]

    def place_for_dz(self, unit: Unit) -> Tensor:
        return torch.empty_like(unit.before)

    def hidden_means(self, plain: Tensor, scaled: Tensor) -> list[Tensor]:
        """What `rows_grad` takes of the sums that `hidden_grad` returns."""
        return [(whole / self.count).float() for whole in over_processes(plain, scaled)]

    def rows_grad(self, units: list[Unit], means: list[Tensor]) -> Tensor:
        unit = units[-1]
        done = [tensor for other in units[:-1] for tensor in other.done]
        below: list[Tensor] = []
        if done:
            done[3::5] = [weight.float() for weight in done[3::5]]
            below = [units[-2].out_weight, units[-2].out_bias, *units[-2].out_single]
        factor, _, mean, deviation = unit.in_single
        dz, self.dz = self.dz, None  # as large as y1: not kept any longer than needed
        found, *self.rest = _ops._local_aggregate_rows_grad(
            *self.rows,
            done,
            unit.before,
            *self.entry,
            self.dense_rows(),
            dz,
            [mean, deviation, factor, *means],
            unit.in_weight.T.contiguous(),
            below,
        )
        if done:
            self.dense, self.sums, self.rest = self.rest[0], self.rest[-3:], self.rest[1:-3]
            self.entry = (None, None)
        hidden, width = unit.in_weight.shape
        return self.add_up(found)[:hidden, :width]

    def features_grad(self, unit: Unit, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
        by_neighbor, by_center, direct = self.rest
        first, half = unit.in_weight, direct.shape[-1]
        return direct + by_neighbor @ first[:, :half] + by_center @ first[:, half:]

    def dense_grad(self, unit: Unit, factor: Tensor | None) -> Tensor:
        """What of `features_grad` comes past the unit, whose gradient is `dense`; in float32."""
        clouds, points = self.rows[0].shape[:2]
        center, neighbor = self.rows[2:4]
        assert self.dense is not None
        dense = self.dense.view(clouds, -1, self.neighbors, self.dense.shape[-1])
        near, middle = dense.chunk(2, -1)
        first = torch.arange(clouds, device=center.device)[:, None] * points
        found = near.new_zeros(clouds * points + 1, near.shape[-1])  # the last one: of missing rows
        for index, values in (
            (torch.where(neighbor < 0, center[..., None], neighbor), near),
            (center, middle.sum(2)),
        ):
            index = index.flatten(1)
            index = torch.where(index < 0, clouds * points, index + first).flatten()
            found.index_add_(0, index, values.reshape(len(index), -1))
        return found[:-1].view(clouds, points, -1)


class CudaPasses(Passes):
    """What lies between the passes in kernels, unless processes share statistics.

    Gradients of rows take each other's place. Of du there is `dense`, the first half of its channels, and
    `center`, the second, until dz takes its place; `by_center` are sums of this half over groups. To maxima
    is given back what rounding rows to float16 took from them.
    """

    in_place = True
    center: Tensor
    by_center: Tensor
    lists: list[Tensor] = []  # of the rows of each point, once they are known

    def maximum(self, done: list[Tensor]) -> tuple[Tensor, Tensor]:
        out, argmax = super().maximum(done)
        if self.single is not None and importlib.util.find_spec("triton"):
            from any2point.triton.local_aggregate_residual import add_rounding

            add_rounding(out, argmax, done, self.rows[0], self.single, *self.rows[2:])
        return out, argmax

    def add_up(self, part: Tensor) -> Tensor:
        return part[0] if len(part) == 1 else part.sum(0)

    def before(self, done: list[Tensor], weight: Tensor, bias: Tensor, to: Tensor | None = None) -> Tensor:
        layer = (done, self.factor(weight), bias, False, to)
        before: Tensor = _ops._local_aggregate_project(*self.rows, *layer)[0]
        return before if to is None else to

    def project_to(self, to: Tensor, done: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
        layer = (done, self.factor(weight), bias, True, to)
        return [*_ops._local_aggregate_project(*self.rows, *layer)[1:]]

    def in_statistics(
        self, means: Tensor, spreads: Tensor, counts: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> list[Tensor]:
        if are_shared():
            return super().in_statistics(means, spreads, counts, scale, shift, eps)
        return [*_ops._local_aggregate_in_statistics(means, spreads, counts, scale, shift, eps)]

    def out_statistics(self, grams: Tensor, sums: Tensor, layer: list[Tensor], eps: float) -> list[Tensor]:
        if are_shared():
            return super().out_statistics(grams, sums, layer, eps)
        like = self.rows[1]
        return [*_ops._local_aggregate_out_statistics(like, grams, sums, *layer, eps, self.number)]

    def pull(self, unit: Unit) -> tuple[list[Tensor], list[Tensor]]:
        if are_shared():
            return super().pull(unit)
        hidden = (unit.out_deviation, unit.hidden_mean, unit.hidden_sum, unit.hidden_outer)
        out_grad, *linear = _ops._local_aggregate_pull(
            *self.sums, unit.out_weight, unit.out_scale, *hidden, self.number, self.dense is not None
        )
        total, normed = self.sums[:2]
        return [out_grad, normed[0], total[0]], linear

    def dense_rows(self) -> list[Tensor]:
        return [] if self.dense is None else [self.dense, self.center]

    def hidden_sums(self, unit: Unit, linear: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What `hidden_grad` returns, without dz."""
        return self.hidden_grad(unit, linear, unit.before[:0])

    def before_grad(self, unit: Unit, linear: list[Tensor], means: list[Tensor]) -> None:
        """dy1 in the place of y1, of the last of two units."""
        norm = (*unit.in_single[2:], unit.before, [unit.in_single[0], *means])
        _ops._local_aggregate_hidden_grad(*unit.hidden, *self.entry, [], self.neighbors, *linear, *norm)

    def place_for_dz(self, unit: Unit) -> Tensor:
        return super().place_for_dz(unit) if self.dense is None else self.center

    def rows_grad(self, units: list[Unit], means: list[Tensor]) -> Tensor:
        dz = self.dz  # in its place: dy1, or the second half of du
        assert dz is not None
        found = super().rows_grad(units, means)
        if len(units) > 1:
            self.center, (self.by_center,), self.rest = dz, self.rest, []
        else:
            self.rest = [dz]
        return found

    def features_grad(self, unit: Unit, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
        layout = (*self.rows[2:4], unit.in_weight, factor, self.rows[0].shape[1])
        dense = [] if self.dense is None else [self.dense, self.by_center]
        single = dtype == torch.float32
        return _ops._local_aggregate_points_grad(
            self.rest[0], *self.entry, dense, *layout, single, self.lists
        )

    def find_lists(self) -> None:
        self.lists = [*_ops._local_aggregate_point_lists(*self.rows[2:4], self.rows[0].shape[1])]

    def by_point(self, some: CudaPasses, clouds: slice, to: Tensor) -> None:
        """The sums over points of `dense` of some clouds, which may take its place for all."""
        _ops._local_aggregate_point_sums(some.dense, self.lists, clouds.start, to[clouds])
