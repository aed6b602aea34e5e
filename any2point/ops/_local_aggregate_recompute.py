"""Local aggregation in training that keeps no rows: chunks of clouds, whose rows are made again in each pass.

Between forward and backward nothing of size [M, .] is kept. Inside either there is, beside the rows of one
chunk, one tensor [M, H] at most (of three units or more, one [M, C]):

    forward   y1 of the last unit so far
    backward  y1 of the last unit, or its dz; then, of the first of several units, the part of dz that the
              gradient du after it contributes, [h > 0] du p W2. The rest, [h > 0] (constant - h Q), needs
              sums over all chunks, and is added when they are known.

Sums go by chunks in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from any2point.ops._local_aggregate_passes import PER_UNIT, SAVED, Passes, Unit

# Bytes of the rows of a chunk. The first stage of the tokenizer, 32 clouds with K = 81 on an H200: 411 MB and
# 12.0 ms, with half as much again 428 MB and 9.7 ms, and 3.5 ms where rows are kept: small chunks fill a GPU
# badly.
ROOM = 64 << 20


def chunks_of(rows: tuple[Any, ...], parameters: Sequence[Tensor]) -> list[slice]:
    """Which clouds go together."""
    clouds, width, each = len(rows[3]), 2 * rows[1].shape[-1], rows[3][0].numel() * rows[1].element_size()
    hidden = max(weight.shape[0] for weight in parameters[::PER_UNIT])
    each *= 2 * hidden + (width if len(parameters) > PER_UNIT else 0)
    step = max(1, ROOM // each)
    return [slice(first, first + step) for first in range(0, clouds, step)]


def rows_of(rows: tuple[Any, ...], clouds: slice) -> tuple[Any, ...]:
    """The rows of some clouds."""
    return *(row if row is None else row[clouds] for row in rows[:5]), *rows[5:]


def filled(passes: Passes, units: Sequence[Unit], last: Tensor | None = None) -> list[Unit]:
    """The units with y1 of the rows, made again; `last` is that of the last one if it is there."""
    done: list[Tensor] = []
    found: list[Unit] = []
    for unit in units:
        before = last if unit is units[-1] else None
        if before is None:
            before = passes.before(done, unit.in_weight, unit.in_bias)
        found.append(replace(unit, before=before))
        done += found[-1].done
    return found


def results(whole: Passes, chunks: Sequence[Passes], parameters: list[Tensor], eps: float) -> list[Tensor]:
    """What the forward pass of `whole` gives, with units whose y1 is empty."""
    units: list[Unit] = []
    saved: list[Tensor] = []
    kept: list[Tensor] = []
    for first in range(0, len(parameters), PER_UNIT):
        own = parameters[first : first + PER_UNIT]
        parts = []
        for i, chunk in enumerate(chunks):
            before, *part = chunk.project(_done(chunk, units, kept[i:]), own[0], own[1])
            kept[i : i + 1] = [before]
            parts.append(part)
        means, spreads, counts = (torch.cat(values) for values in zip(*parts))
        found = whole.in_statistics(means, spreads, counts, own[2], own[3], eps)
        if len(chunks) == 1:
            gram, total = whole.gram(kept[0], *found[2][:2])
        else:
            grams = (chunk.gram(before, *found[2][:2]) for chunk, before in zip(chunks, kept))
            gram, total = whole.joined([[whole.add_up(part) for part in parts] for parts in grams])
        saved += [kept[0].new_empty(0, len(own[0])), *found, *whole.out_statistics(gram, total, own[4:], eps)]
        units.append(Unit(*own, *saved[-SAVED:]))
    maxima = [chunk.maximum(_done(chunk, units, [kept.pop(0)])) for chunk in chunks]
    out, argmax = (torch.cat(values) for values in zip(*maxima))
    return [out, argmax, *saved]


def _done(passes: Passes, units: Sequence[Unit], last: list[Tensor]) -> list[Tensor]:
    """What passes take of units that are done; `last` begins with the last one's y1."""
    return [tensor for unit in filled(passes, units, *last[:1]) for tensor in unit.done]


class Chunk:
    """The backward passes over the rows of some clouds."""

    def __init__(self, passes: Passes, units: Sequence[Unit]) -> None:
        self.passes, self.units = passes, units
        self.last: Tensor | None = None  # y1 of the last unit
        self.dense: Tensor | None = None  # gradient after a unit between the first and the last
        self.part: Tensor | None = None  # of the dz of the first of several units
        self.part_sums: tuple[Tensor, ...] = ()
        self.past: Tensor | None = None  # gradient of the features past the first of several units
        self.features = torch.empty(0)

    def out_sums(self) -> list[Tensor]:
        """Sums of the last unit."""
        unit = filled(self.passes, self.units)[-1]
        self.last = unit.before
        self.passes.out_sums(unit)
        return self._take_sums()

    def hidden_grad(self, u: int, linear: list[Tensor]) -> tuple[Tensor, ...]:
        """Sums of a unit's dz."""
        if self.last is not None:
            unit = replace(self.units[u], before=self.last)
        else:
            unit = filled(self.passes, self.units[: u + 1])[-1]
        sums = self._hidden_grad(unit, linear)
        if self.part is not None:
            assert self.passes.dz is not None
            self.passes.dz, self.part = self.part.add_(self.passes.dz), None
            return tuple(sum_ + part for sum_, part in zip(sums, self.part_sums))
        if len(self.units) == 1:
            self.last = None
        else:
            self.passes.dz = None
        return sums

    def rows_grad(
        self, u: int, linear: list[Tensor], means: list[Tensor], factor: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradient of a unit's W1; and the sums of the unit below, if there is one."""
        passes, units = self.passes, filled(self.passes, self.units[: u + 1], self.last)
        self.last = None
        if passes.dz is None:
            self._hidden_grad(units[-1], linear)
        self.dense = None
        in_weight = passes.rows_grad(units, means)
        if u == 0:
            self.features = self._features_grad(factor, dtype)
            return in_weight, []
        self.dense, passes.dense = passes.dense, None
        if u == 1:
            self._split(units[0], factor)
        return in_weight, self._take_sums()

    def _take_sums(self) -> list[Tensor]:
        sums, self.passes.sums = self.passes.sums, []
        return [self.passes.add_up(part) for part in sums]

    def _hidden_grad(self, unit: Unit, linear: list[Tensor]) -> tuple[Tensor, ...]:
        self.passes.dense = self.dense
        if self.part is not None:  # what comes through the second layer is in the part
            shape = (*self.passes.rows[2].shape, len(unit.out_weight))
            zeros = linear[0].new_zeros(shape)
            self.passes.entry = (zeros, zeros.int())
        return self.passes.hidden_grad(unit, linear)

    def _split(self, unit: Unit, factor: Tensor | None) -> None:
        """Of the first unit's gradient, after it, to what is kept of it."""
        carried = ((unit.out_scale * unit.out_deviation)[:, None] * unit.out_weight).T.float().contiguous()
        hidden = len(carried)
        linear = [carried.new_zeros(hidden, hidden), carried.new_zeros(hidden), carried]
        self.part_sums = self._hidden_grad(unit, linear)
        self.part, self.passes.dz = self.passes.dz, None
        self.past = self.passes.dense_grad(unit, factor)
        self.dense = self.passes.dense = None

    def _features_grad(self, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
        unit, passes = self.units[0], self.passes
        if self.past is None:
            found = passes.features_grad(unit, factor, dtype)
        else:
            passes.entry = (None, None)
            found = (passes.features_grad(unit, factor, torch.float32) + self.past).to(dtype)
        passes.rest = []
        return found


def gradients(
    whole: Passes, chunks: Sequence[Chunk], factor: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Gradients of each unit's weights, as the passes give them, and of the features."""
    units = chunks[0].units
    whole.sums = whole.joined([chunk.out_sums() for chunk in chunks])
    found: list[Tensor] = []
    for u in reversed(range(len(units))):
        whole.dense = chunks[0].dense
        (out_grad, normed, total), linear = whole.pull(units[u])
        sums = [chunk.hidden_grad(u, linear) for chunk in chunks]
        plain, scaled = (torch.stack(values).sum(0) for values in zip(*sums))
        means = whole.hidden_means(plain, scaled)
        rows = [chunk.rows_grad(u, linear, means, factor, dtype) for chunk in chunks]
        in_weight = torch.stack([weight for weight, _ in rows]).sum(0)
        whole.sums = whole.joined([below for _, below in rows])
        found = [in_weight, scaled, plain, out_grad, normed, total, *found]
    return found, torch.cat([chunk.features for chunk in chunks])
