"""Local aggregation in training on GPUs of sm_80 and newer, for any sizes: what launches the passes.

A pass goes over the rows x [M, C], M = B S K, between two batch statistics; any2point/ops/
_local_aggregate_train.py has the identities. Rows are made again in every pass, 64 at a time and in
registers; of a unit y1 [M, H] is kept, in the dtype of the features, and rows [M, C] are stored only as the
gradient between two units. Sums are one per tile or program, added up in float64 in their order. Products
take factors in the dtype of the features, float32 as TF32 where torch allows it and otherwise in three
products of TF32.

H200, forward and backward of 32 clouds, beside the composition of torch ops: the tokenizer's three stages
(K = 81) in float16 13.6 + 6.7 + 2.2 ms and up to 1.5 GB, for 40.8 + 26.8 + 13.3 ms and 9.2 GB; 512 groups of
16, C = 128, three units of H = 48, in float16 3.4 ms and 0.26 GB for 6.1 ms and 1.5 GB; 256 groups of 33, C =
180, H = 45, in bfloat16 1.6 ms for 3.8 ms. The first stage in TF32 takes 19.0 ms for 23.5 ms; in three
products of TF32, as exact as float32, 32 ms for 36 ms, and these compile for half a minute the first time.
Limits: loads wait for products, and each 64 rows read the weights and each 64 channels the hidden layers
again; deeper pipelines and tiles of 128 rows made single kernels up to a quarter faster and are not in use.
csrc/local_aggregate/train_*.sm90a.* do better for 16 bits and three sizes on sm_90 (6.5 ms for the stages).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from any2point.ops._local_aggregate_passes import Passes, Unit
from any2point.reference.batch_norm import are_shared
from any2point.triton import tf32_allowed
from any2point.triton._rows import INTERPRETED, prepare
from any2point.triton.local_aggregate import _round
from any2point.triton.local_aggregate_train_backward_kernels import (
    before_grad_kernel,
    below_kernel,
    group_sums_kernel,
    hidden_grad_kernel,
    out_sums_kernel,
    point_sums_kernel,
)
from any2point.triton.local_aggregate_train_kernels import (
    in_statistics_kernel,
    maximum_kernel,
    merge_kernel,
    outer_kernel,
    pairs_kernel,
    project_kernel,
)

_ROWS = 64
_PARTS = 64  # of statistics
_PROGRAMS = 1056  # whose sums are added up, about: eight per multiprocessor of an H200


def _block(count: int, most: int) -> int:
    """Columns at a time: a power of two of at least 16, as products need it."""
    return min(most, max(16, triton.next_power_of_2(count)))


def _piece(count: int, most: int) -> int:
    """The same where columns that are not there would cost time."""
    sizes = [size for size in (64, 32, 16) if size <= most]
    return min(sizes, key=lambda size: triton.cdiv(count, size) * size)


class TritonPasses(Passes):
    """The passes of training in Triton."""

    def __init__(
        self, rows: tuple[Any, ...], grad: Tensor | None = None, argmax: Tensor | None = None
    ) -> None:
        super().__init__(rows)
        self.pairs = rows[3].numel()
        points, features, center, neighbor, divisor, wavelength, beta, guard = rows
        batch, self.points, half = features.shape
        self.width, self.groups = 2 * half, batch * neighbor.shape[1]
        single = self.dtype == torch.float32
        self.tf32 = single and tf32_allowed()
        exact = self.exact = single and not self.tf32
        sine = "exact" if exact else "plain" if INTERPRETED else "fast"
        self.precision = {"PRECISION": "tf32x3" if exact else "tf32"}
        self.block = 128 if exact else 256  # columns of what a program adds up, at most
        self.piece = 32 if single else 64  # columns of a factor at a time, at most
        self.chunk = _block(self.width, 64)
        self.tiles = triton.cdiv(self.pairs, _ROWS)
        divisors, table = prepare(
            points, center, neighbor, divisor, wavelength, self.width, guard=guard, exact=exact
        )
        near = torch.empty(self.pairs, dtype=torch.int32, device=points.device)
        middle = torch.empty_like(near)
        offset = torch.empty(3, self.pairs, dtype=torch.float32, device=points.device)
        pairs_kernel[(triton.cdiv(self.pairs, 256),)](
            points, center, neighbor, divisors, near, middle, offset, beta, self.points, neighbor.shape[1],
            self.pairs, K=self.neighbors, ROWS=256,
        )  # fmt: skip
        self.made = features, table, near, middle, offset
        self.how = self.precision | {"WIDTH": self.width, "SINE": sine}
        if grad is not None and argmax is not None:
            entry = self.factor(grad).view(self.groups, self.width)
            self.entry = entry, argmax.view(self.groups, self.width).to(torch.int16)

    def factor(self, weight: Tensor) -> Tensor:
        if not self.tf32:
            return weight.to(self.dtype).contiguous()
        return _round(weight.float().contiguous())

    def room(self, *shape: int) -> Tensor:
        return self.made[1].new_empty(shape)

    def after(self, done: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What makes the rows after the units that are done: arguments of kernels."""
        hidden = [before.shape[1] for before in done[::5]]
        sizes = {"HIDDEN": tuple(hidden), "PIECES": tuple(_piece(count, self.piece) for count in hidden)}
        return (*self.made, tuple(done)), self.how | sizes

    def project(
        self, done: list[Tensor], weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden = len(weight)
        block = _block(hidden, self.block)
        before = self.rows[1].new_empty(self.pairs, hidden)
        found = self.room(self.tiles, hidden), self.room(self.tiles, hidden), self.room(self.tiles)
        made, how = self.after(done)
        project_kernel[(self.tiles, triton.cdiv(hidden, block))](
            *made, self.factor(weight), bias, before, *found, self.pairs, H=hidden, BLOCK=block,
            CHUNK=self.chunk if done else min(32, self.chunk), ROWS=_ROWS, **how,
            num_warps=8 if block == 256 else 4, num_stages=1 if done else 3 if block < 256 else 2,
        )  # fmt: skip
        parts, size = min(_PARTS, self.tiles), _block(hidden, 64)
        merged = self.room(parts, hidden), self.room(parts, hidden), self.room(parts)
        merge_kernel[(parts, triton.cdiv(hidden, size))](
            *found, *merged, self.tiles, H=hidden, ROWS=8, SIZE=size
        )
        return before, *merged

    def outer(
        self, left: Tensor, norm: list[Tensor], right: Tensor | None, done: list[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Parts of left' right, [parts, H, C], and of the sums of what is on the left.

        With `norm` left is a hidden layer y1, which also takes the place of `right` if there is none; with
        `done` rows after those units do.
        """
        hidden = left.shape[1]
        made, how = self.after(done or [])
        made = made if done is not None else (None,) * 5 + ((),)
        alike = right is None and done is None
        width = hidden if alike else self.width
        if alike:
            block = _block(hidden, 64 if self.dtype == torch.float32 else 128)
        else:
            block = _block(hidden, 64 if hidden > 128 and not done else self.block)
        chunk = block if alike else _block(width, 64)
        blocks, chunks = triton.cdiv(hidden, block), triton.cdiv(width, chunk)
        parts = max(1, min(_PROGRAMS // (blocks * chunks), self.tiles))
        out, total = self.room(parts, hidden, width), self.room(parts, hidden)
        outer_kernel[(parts, blocks, chunks)](
            left, *(norm or (None, None)), right, *made, out, total, self.pairs, H=hidden, BLOCK=block,
            CHUNK=chunk, ROWS=_ROWS, **(how | {"WIDTH": width}), num_stages=1,
        )  # fmt: skip
        return out, total

    def in_statistics(
        self, means: Tensor, spreads: Tensor, counts: Tensor, scale: Tensor, shift: Tensor, eps: float
    ) -> list[Tensor]:
        if are_shared():
            return super().in_statistics(means, spreads, counts, scale, shift, eps)
        parts, hidden = means.shape
        mean, single = means.new_empty(hidden, dtype=torch.float64), self.room(4, hidden)
        deviation, size = torch.empty_like(mean), _block(hidden, 32)
        in_statistics_kernel[(triton.cdiv(hidden, size),)](
            means, spreads, counts, scale, shift, mean, deviation, single, eps, PARTS=parts, H=hidden,
            ROWS=triton.next_power_of_2(parts), SIZE=size,
        )  # fmt: skip
        return [mean, deviation, single]

    def gram(self, before: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer(before, [scale, shift], None, None)

    def maximum(self, done: list[Tensor]) -> tuple[Tensor, Tensor]:
        out = self.room(*self.rows[2].shape, self.width)
        argmax = torch.empty_like(out, dtype=torch.int32)
        step = min(16, triton.next_power_of_2(self.neighbors))
        count = _ROWS // step
        made, how = self.after(done)
        maximum_kernel[(triton.cdiv(self.groups, count), triton.cdiv(self.width, self.chunk))](
            *made, out, argmax, self.groups, self.pairs, K=self.neighbors, CHUNK=self.chunk, GROUPS=count,
            STEP=step, **how, num_stages=1,
        )  # fmt: skip
        return out, argmax

    def out_sums(self, unit: Unit) -> None:
        if self.sums:
            return
        hidden, size, chunk = unit.before.shape[1], _piece(unit.before.shape[1], 64), 32
        chunks, blocks = triton.cdiv(self.width, chunk), triton.cdiv(hidden, size)
        parts = max(1, min(4 * _PROGRAMS // (chunks * blocks), self.groups))
        outer, total = self.room(parts, self.width, hidden), self.room(parts, self.width)
        out_sums_kernel[(chunks, blocks, parts)](
            *unit.hidden, *self.entry, outer, total, self.groups, K=self.neighbors, WIDTH=self.width,
            H=hidden, CHUNK=chunk, SIZE=size, **self.precision,
        )  # fmt: skip
        self._set_sums(unit, self.add_up(outer), self.add_up(total))

    def _set_sums(self, unit: Unit, outer: Tensor, total: Tensor) -> None:
        """`sums` from du' h and the sums of du."""
        apart = outer - total[:, None] * unit.hidden_mean
        normed = (unit.out_weight.double() * apart).sum(1) * unit.out_deviation
        self.sums = [x[None] for x in (total, normed, outer)]

    def hidden_grad(
        self, unit: Unit, linear: list[Tensor], to: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        before, hidden = unit.before, unit.before.shape[1]
        q, constant, carried = linear
        carried = carried if self.dense is None else carried.T
        q = q if self.exact else _round(q)
        dz = torch.empty_like(before) if to is None else to
        plain, scaled = self.room(self.tiles, hidden), self.room(self.tiles, hidden)
        block = _block(hidden, 64 if self.dtype == torch.float32 or hidden > 128 else 128)
        hidden_grad_kernel[(self.tiles, triton.cdiv(hidden, block))](
            *unit.hidden, *self.entry, self.dense, self.factor(carried), q, constant,
            *unit.in_single[2:], dz, plain, scaled, self.pairs, K=self.neighbors, H=hidden,
            BLOCK=block, PIECE=_piece(hidden, self.piece), WIDTH=self.width, CHUNK=self.chunk, ROWS=_ROWS,
            **self.precision, num_stages=1,
        )  # fmt: skip
        self.dz = dz
        return self.add_up(plain), self.add_up(scaled)

    def rows_grad(self, units: list[Unit], means: list[Tensor]) -> Tensor:
        """Gradient of the last unit's W1; then du is that of the unit below, if there is one."""
        unit, hidden = units[-1], units[-1].before.shape[1]
        done = [tensor for other in units[:-1] for tensor in other.done]
        factor, _, mean, deviation = unit.in_single
        dy, self.dz = self.dz, None
        assert dy is not None
        by_center = self.room(self.groups, hidden)
        size = _block(hidden, 128)
        before_grad_kernel[(triton.cdiv(self.groups, 8), triton.cdiv(hidden, size))](
            unit.before, dy, mean, deviation, factor, *means, by_center, self.groups, K=self.neighbors,
            H=hidden, GROUPS=8, SIZE=size,
        )  # fmt: skip
        found = self.add_up(self.outer(dy, [], None, done)[0])
        self.rest = [dy, by_center]
        if done:
            below = dy.new_empty(self.pairs, self.width) if self.dense is None else self.dense
            total = self.room(self.tiles, self.width)
            made, how = self.after(done)
            below_kernel[(self.tiles, triton.cdiv(self.width, self.chunk))](
                *made, dy, self.factor(unit.in_weight), *self.entry, self.dense, below, total, self.pairs,
                K=self.neighbors, H=hidden, PIECE=_piece(hidden, self.piece), CHUNK=self.chunk, ROWS=_ROWS,
                **how, num_stages=1,
            )  # fmt: skip
            self.entry, self.dense, self.rest = (None, None), below, []
            del dy
            before, scale, shift = units[-2].hidden
            outer = self.outer(before, [scale, shift], below, None)[0]
            self._set_sums(units[-2], self.add_up(outer).T, self.add_up(total))
        return found

    def features_grad(self, unit: Unit, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
        dy, by_center = self.rest
        lists, half = self._lists(), self.width // 2
        near = self._by_point(lists, (None, None, dy), dy.shape[1]) @ unit.in_weight[:, :half]
        own = by_center @ unit.in_weight[:, half:]
        if self.dense is not None or self.entry[0] is not None:
            for found, past in zip((near, own), self._past(lists)):
                found += past
        return self._to_points(near, own, factor).to(dtype)

    def dense_grad(self, unit: Unit, factor: Tensor | None) -> Tensor:
        """What of it comes past the unit, in float32."""
        return self._to_points(*self._past(self._lists()), factor)

    def _lists(self) -> tuple[Tensor, Tensor]:
        """Where the pairs of each neighbour begin in the order of pairs by neighbour, and that order."""
        near, order = torch.sort(self.made[2], stable=True)
        count = len(self.rows[1]) * self.points
        return torch.searchsorted(near, torch.arange(count + 1, dtype=near.dtype, device=near.device)), order

    def _by_point(self, lists: tuple[Tensor, Tensor], du: tuple[Any, ...], count: int) -> Tensor:
        """Sums of the first columns of du (entry and argmax, or dense) over each point's pairs."""
        found, size = self.room(len(lists[0]) - 1, count), _block(count, 128)
        width = self.width if du[2] is None else du[2].shape[1]
        point_sums_kernel[(len(found), triton.cdiv(count, size))](
            *du, *lists, found, K=self.neighbors, COUNT=count, WIDTH=width, ROWS=16, SIZE=size, num_warps=2
        )
        return found

    def _past(self, lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of du over the pairs of each point and, of its other half, over those of each group."""
        half, (entry, argmax) = self.width // 2, self.entry
        near = self._by_point(lists, (entry, argmax, self.dense), half)
        if entry is not None:
            return near, entry.view(-1, self.width)[:, half:].float()
        own, size = self.room(self.groups, half), _block(half, 128)
        group_sums_kernel[(self.groups, triton.cdiv(half, size))](
            self.dense, own, K=self.neighbors, WIDTH=self.width, SIZE=size, num_warps=1
        )
        return near, own

    def _to_points(self, near: Tensor, own: Tensor, factor: Tensor | None) -> Tensor:
        """By point, what is by point and what is by group."""
        own = own.reshape(*self.rows[2].shape, -1).contiguous()
        found = near.view(-1, self.points, near.shape[1])
        found = found + torch.ops.any2point._group_backward(own, self.rows[2], self.points)
        return found if factor is None else found * factor
