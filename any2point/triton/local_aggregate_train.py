"""Local aggregation in training on GPUs: the forward passes; local_aggregate_train_backward.py has the rest.

A pass goes over the rows x [M, C], M = B S K, between two batch statistics; any2point/ops/
_local_aggregate_train.py has the identities and the algebra between passes. Rows are made again in every
pass, a slice of some 32 MB at a time, which the second-level cache holds until the product that reads it is
done; of a unit y1 [M, H] is kept, in the dtype of the factors. Sums are one per program, added up in float64
in their order.

Products in the kernels themselves were tried first: `tl.dot` with rows made in registers spilled, and with 96
hidden channels in 16 bits gave wrong sums that changed from run to run. An H200 takes 21.8 ms for forward and
backward of the three stages of the tokenizer (B = 32, K = 81, float16; 12.2 + 6.0 + 3.5, measured with the
second layer's product added to stored rows), up to 1.5 GB; the floor of arithmetic and memory is 2.2 ms. What
limits: every product and kernel writes and reads the rows of a slice, and a step has 1,800 launches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from any2point.triton._rows import INTERPRETED, prepare, tf32_allowed
from any2point.triton.local_aggregate_train_kernels import (
    finish_kernel,
    hidden_kernel,
    maximum_kernel,
    pairs_kernel,
    rows_kernel,
    statistics_kernel,
)

_SLICE = 1 << 25  # bytes of rows
_PARTS = 528  # programs whose sums are added up, at most: four per multiprocessor of an H200


class Operands(NamedTuple):
    """How the factors of products are rounded."""

    dtype: torch.dtype
    tf32: bool
    sine: str

    @classmethod
    def of(cls, dtype: torch.dtype) -> Operands:
        """Factors in the dtype of the features; float32 as TF32 where torch allows it."""
        tf32 = dtype == torch.float32 and tf32_allowed()
        exact = dtype == torch.float32 and not tf32
        return cls(dtype, tf32, "exact" if exact else "plain" if INTERPRETED else "fast")

    def round(self, tensor: Tensor) -> Tensor:
        """Nearest factor of a product, in float32."""
        return self.factor(tensor).float()

    def factor(self, tensor: Tensor) -> Tensor:
        """The same as it is stored: contiguous."""
        if not self.tf32:
            return tensor.to(self.dtype, memory_format=torch.contiguous_format).contiguous()
        return ((tensor.float().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class Slice(NamedTuple):
    """Some groups from the first on, and their rows."""

    first: int
    groups: int
    rows: slice


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of factors that may be in 16 bits."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def columns_of(count: int) -> int:
    """Columns at a time, a power of two."""
    return min(128, max(16, triton.next_power_of_2(count)))


def even_columns_of(count: int) -> int:
    """The same where columns that are not there would cost time."""
    return next((size for size in (64, 32) if count % size == 0), columns_of(count))


class Forward:
    """The passes of any2point/ops/_local_aggregate_train.py."""

    def __init__(self, rows: tuple[Any, ...]) -> None:
        points, features, center, neighbor, divisor, wavelength, beta, guard = rows
        batch, self.points, half = features.shape
        _, self.centers, self.neighbors = neighbor.shape
        self.operands = Operands.of(features.dtype)
        self.features, self.width = features, 2 * half
        self.groups, self.count = batch * self.centers, neighbor.numel()
        size = self.neighbors * self.width * features.element_size()
        self.tile = max(1, min(self.groups, _SLICE // size))
        divisors, self.table = prepare(
            points, center, neighbor, divisor, wavelength, self.width, guard=guard,
            exact=self.operands.sine == "exact",
        )  # fmt: skip
        self.near = torch.empty(self.count, dtype=torch.int32, device=points.device)
        self.middle = torch.empty_like(self.near)
        self.offset = torch.empty(3, self.count, dtype=torch.float32, device=points.device)
        pairs_kernel[(triton.cdiv(self.count, 256),)](
            points, center, neighbor, divisors, self.near, self.middle, self.offset, beta, self.points,
            self.centers, self.neighbors, self.groups, self.count, self.tile, ROWS=256,
        )  # fmt: skip
        self.rooms: dict[int, Tensor] = {}
        self.where = self.features, self.table, self.near, self.middle, self.offset
        self.layers: dict[int, Tensor] = {}  # h of units, by the address of their y1

    def round(self, weight: Tensor) -> Tensor:
        return self.operands.round(weight)

    def room(self, which: int, part: Slice) -> Tensor:
        """Memory for the rows of a slice, the same for all of them."""
        if which not in self.rooms:
            self.rooms[which] = self.features.new_empty(self.tile * self.neighbors, self.width)
        return self.rooms[which][: part.groups * self.neighbors]

    def slices(self) -> list[Slice]:
        found = []
        for first in range(0, self.groups, self.tile):
            count = min(self.tile, self.groups - first)
            rows = slice(first * self.neighbors, (first + count) * self.neighbors)
            found.append(Slice(first, count, rows))
        return found

    def layer(self, before: Tensor, scale: Tensor, shift: Tensor, rows: slice) -> Tensor:
        """Rows of the hidden layer of y1 `before`."""
        if before.data_ptr() in self.layers:
            return self.layers[before.data_ptr()][rows]
        before = before[rows]
        return self.hidden(before, scale, shift, torch.empty_like(before), None)

    def hidden(
        self, before: Tensor, scale: Tensor, shift: Tensor, out: Tensor, total: Tensor | None
    ) -> Tensor:
        count, hidden = before.shape
        size = columns_of(hidden)
        parts = triton.cdiv(count, 32) if total is None else len(total)
        hidden_kernel[(parts, triton.cdiv(hidden, size))](
            before, scale, shift, out, total, hidden, count, ROWS=32, SIZE=size, TF32=self.operands.tf32
        )
        return out

    def done(self, units: list[Tensor]) -> list[list[Tensor]]:
        """Units that are done, their weights as factors [H, C]."""
        found = []
        for u in range(0, len(units), 5):
            before, scale, shift, weight, bias = units[u : u + 5]
            found.append([before, scale, shift, self.operands.factor(weight.T), bias])
        return found

    def rows(self, done: list[list[Tensor]], part: Slice) -> Tensor:
        """The rows of a slice after the units that are done."""
        count = part.groups * self.neighbors
        x, chunk = self.room(0, part), min(64, columns_of(self.width))
        added, bias = (self.added(done[0], part, x), done[0][4]) if done else (None, None)
        rows_kernel[(triton.cdiv(count, 64), triton.cdiv(self.width, chunk))](
            *self.where, added, bias, x, part.rows.start, count, self.count, WIDTH=self.width, CHUNK=chunk,
            ROWS=64, SINE=self.operands.sine, TF32=self.operands.tf32,
        )  # fmt: skip
        for unit in done[1:]:
            size = columns_of(self.width)
            finish_kernel[(triton.cdiv(count, 32), triton.cdiv(self.width, size))](
                x, self.added(unit, part, self.room(1, part)), unit[4], count, self.width, ROWS=32,
                SIZE=size, TF32=self.operands.tf32,
            )  # fmt: skip
        return x

    def added(self, unit: list[Tensor], part: Slice, out: Tensor) -> Tensor:
        """What a unit that is done adds to its rows, without the bias."""
        before, scale, shift, weight, _ = unit
        return torch.mm(self.layer(before, scale, shift, part.rows), weight, out=out)

    def project(self, units: list[Tensor], weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        """y1 of the unit after those that are done; mean, squared spread and rows of each part."""
        done, hidden = self.done(units), len(weight)
        before = self.features.new_empty(self.count, hidden)
        weight, offset = self.operands.factor(weight.T), bias.to(before.dtype)
        for part in self.slices():
            torch.addmm(offset, self.rows(done, part), weight, out=before[part.rows])
        size = columns_of(hidden)
        parts = min(_PARTS, triton.cdiv(self.count, 32))
        sums = [bias.new_empty(parts, *shape) for shape in ((hidden,), (hidden,), ())]
        statistics_kernel[(parts, triton.cdiv(hidden, size))](
            before, *sums, hidden, self.count, ROWS=32, SIZE=size
        )
        return before, *sums

    def gram(self, before: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """Products and sums of the hidden layer, in parts."""
        total = scale.new_empty(min(_PARTS, triton.cdiv(self.count, 32)), before.shape[1])
        layer = self.hidden(before, scale, shift, torch.empty_like(before), total)
        self.layers[before.data_ptr()] = layer
        return torch.stack([product(layer[part.rows].T, layer[part.rows]) for part in self.slices()]), total

    def maximum(self, units: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The result [B, S, C] and the neighbours it comes from."""
        done = self.done(units)
        out = self.table.new_empty(len(self.features), self.centers, self.width)
        argmax = torch.empty_like(out, dtype=torch.int32)
        chunk = min(64, columns_of(self.width))
        for part in self.slices():
            x = self.rows(done[:-1], part) if len(done) > 1 else None
            added = self.added(done[-1], part, self.room(0 if x is None else 1, part))
            maximum_kernel[(triton.cdiv(part.groups, 8), triton.cdiv(self.width, chunk))](
                *self.where, x, added, done[-1][4], out, argmax, part.first, part.groups, self.neighbors,
                self.count, WIDTH=self.width, CHUNK=chunk, GROUPS=8, SINE=self.operands.sine, num_warps=2,
            )  # fmt: skip
        return out, argmax
