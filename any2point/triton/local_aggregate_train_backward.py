"""Local aggregation in training on GPUs: the backward passes, see local_aggregate_train.py.

du, the gradient after a unit's last ReLU, is one entry per group and channel below the maximum: its products
gather rows, or are gathered by lists of the entries of each row. After a unit with another one above it is
stored, `dense` [M, C]. Per unit one [M, H] is written over and over: du W2, less h Q, then dz, then dy1, the
gradient of y1. That of the features adds up the pairs of every point by an inverse list: no atomics, a fixed
order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from any2point.triton.local_aggregate_train import (
    _PARTS,
    Forward,
    Slice,
    columns_of,
    even_columns_of,
    product,
)
from any2point.triton.local_aggregate_train_backward_kernels import (
    before_grad_kernel,
    below_kernel,
    group_sums_kernel,
    hidden_grad_kernel,
    out_sums_kernel,
    points_grad_kernel,
    sparse_rows_kernel,
)

_ops = torch.ops.any2point


class Backward(Forward):
    """The backward passes, from the last unit to the first; `dy` and du are kept between them."""

    def __init__(self, rows: tuple[Any, ...], grad: Tensor, argmax: Tensor) -> None:
        super().__init__(rows)
        self.given = rows
        self.entry: Tensor | None = self.operands.factor(grad)
        self.argmax: Tensor | None = argmax.to(torch.uint8) if self.neighbors <= 256 else argmax
        self.dense: Tensor | None = None
        self.total = grad.sum((0, 1), dtype=torch.float64)
        self.order = self.tile, self.neighbors, self.groups

    def out_sums(self, unit: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of du and of du times the normalised product, and du' h; float64."""
        before, scale, shift = unit.hidden
        hidden = before.shape[1]
        if self.dense is not None:
            parts = [
                product(self.dense[part.rows].T, self.layer(before, scale, shift, part.rows))
                for part in self.slices()
            ]
            outer = torch.stack(parts).sum(0, dtype=torch.float64)
        else:
            size, chunk = even_columns_of(hidden), 32
            chunks, columns = triton.cdiv(self.width, chunk), triton.cdiv(hidden, size)
            count = max(1, min(self.groups, 1056 // (chunks * columns)))
            sums = scale.new_empty(count, self.width, hidden)
            out_sums_kernel[(chunks, columns, count)](
                before, scale, shift, self.entry, self.argmax, sums, *self.order, self.width, hidden,
                CHUNK=chunk, SIZE=size, TF32=self.operands.tf32,
            )  # fmt: skip
            outer = sums.sum(0, dtype=torch.float64)
        apart = outer - self.total[:, None] * unit.hidden_mean
        normed = (unit.out_weight.double() * apart).sum(1) * unit.out_deviation
        return self.total, normed, outer

    def hidden_grad(self, unit: Any, q: Tensor, constant: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of dz and of dz times the normalised y1; float64."""
        before, scale, shift = unit.hidden
        hidden, size = before.shape[1], columns_of(before.shape[1])
        weight, q = self.operands.factor(carried), self.operands.factor(q)
        if self.dense is not None:
            self.dy = torch.mm(self.dense, weight)
        else:
            self.dy = torch.empty_like(before)
            index = self.argmax.view(self.groups, -1).long()  # type: ignore[union-attr]
            start, order = _ops._inverse_list(index, self.neighbors)
            size = even_columns_of(hidden)
            sparse_rows_kernel[(self.groups, triton.cdiv(self.neighbors, 16), triton.cdiv(hidden, size))](
                self.entry, start, order, weight, self.dy, *self.order, self.width, hidden, ROWS=16,
                SIZE=size, num_warps=1,
            )  # fmt: skip
        for part in self.slices():
            self.dy[part.rows].addmm_(self.layer(before, scale, shift, part.rows), q)
        norm = torch.stack([unit.in_mean, unit.in_deviation]).float()
        parts, size = min(_PARTS, triton.cdiv(self.count, 32)), columns_of(hidden)
        sums = scale.new_empty(2, parts, hidden)
        hidden_grad_kernel[(parts, triton.cdiv(hidden, size))](
            before,
            scale,
            shift,
            constant.float(),
            norm,
            self.dy,
            sums,
            hidden,
            self.count,
            ROWS=32,
            SIZE=size,
        )
        plain, scaled = sums.sum(1, dtype=torch.float64)
        return plain, scaled

    def rows_grad(self, units: list[Any], norm: list[Tensor]) -> Tensor:
        """Gradient of the in_weight of the last of `units`, float64; then du is that of the unit below."""
        unit = units[-1]
        done = self.done([tensor for other in units[:-1] for tensor in other.done(self.round)])
        hidden = unit.in_weight.shape[0]
        size = columns_of(hidden)
        self.by_center = unit.in_weight.new_empty(self.groups, hidden)
        before_grad_kernel[(triton.cdiv(self.groups, 8), triton.cdiv(hidden, size))](
            unit.before, self.dy, torch.stack(norm).float(), self.by_center, *self.order, hidden, GROUPS=8,
            SIZE=size, TF32=self.operands.tf32, num_warps=2,
        )  # fmt: skip
        below = torch.mm(self.dy, self.operands.factor(unit.in_weight)) if done else None
        found, totals = [], []
        for part in self.slices():
            x = self.rows(done, part)
            found.append(product(self.dy[part.rows].T, x))
            if below is not None:
                totals.append(self._below(x, below, part))
        if below is not None:
            del self.dy
            self.entry, self.argmax, self.dense = None, None, below
            self.total = torch.cat(totals).sum(0, dtype=torch.float64)
        return torch.stack(found).sum(0, dtype=torch.float64)

    def _below(self, x: Tensor, below: Tensor, part: Slice) -> Tensor:
        """Turn `below` into du of the unit below; its sums in parts."""
        size = min(64, columns_of(self.width))
        grid = min(132, triton.cdiv(len(x), 32)), triton.cdiv(self.width, size)
        total = self.table.new_empty(grid[0], self.width)
        below_kernel[grid](
            x, self.entry, self.argmax, self.dense, below, total, part.first, part.groups, self.neighbors,
            self.width, ROWS=32, SIZE=size, TF32=self.operands.tf32,
        )  # fmt: skip
        return total

    def features_grad(self, unit: Any) -> Tensor:
        """After the first unit's `rows_grad`: the gradient of the features."""
        batch, hidden, half = len(self.features), self.dy.shape[1], self.width // 2
        start, order = _ops._inverse_list(self.near.long()[None], batch * self.points)
        by_neighbor = self.by_center.new_empty(batch * self.points, hidden)
        direct = self.by_center.new_empty(batch * self.points, half)
        points_grad_kernel[(batch * self.points,)](
            self.dy, self.entry, self.argmax, self.dense, start, order, by_neighbor, direct, *self.order,
            H=hidden, WIDTH=self.width, ROWS=16, SIZE=min(columns_of(hidden), columns_of(half)), num_warps=2,
        )  # fmt: skip
        if self.entry is not None:
            own = self.entry.flatten(0, 1)[:, half:].float()
        else:
            own = self.by_center.new_empty(self.groups, half)
            group_sums_kernel[(self.groups, triton.cdiv(half, columns_of(half)))](
                self.dense, own, *self.order, WIDTH=self.width, SIZE=columns_of(half), num_warps=1
            )
        to_center = torch.cat([self.by_center, own], 1).unflatten(0, (batch, self.centers))
        at_center = _ops._group_backward(to_center, self.given[2], self.points).flatten(0, 1)
        first = unit.in_weight.float()
        found = direct + by_neighbor @ first[:, :half]
        found += at_center[:, hidden:] + at_center[:, :hidden] @ first[:, half:]
        return found.view(batch, self.points, half)
