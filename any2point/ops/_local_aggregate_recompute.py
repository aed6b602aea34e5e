"""Local aggregation in training that keeps no rows: passes make them again, of some clouds at a time.

Between forward and backward nothing of size [M, .] is kept. Inside either there is one tensor [M, H], and of
three units or more one [M, C], beside the rows of a chunk of clouds:

    forward   y1 of the last unit so far
    backward  y1 of the last unit; then, of the first of several units, the part of dz that the gradient du
              after it contributes, [h > 0] du p W2. The rest, [h > 0] (constant - h Q), needs sums over all
              chunks, and is added when they are known.

Sums go by chunks in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from any2point.ops._local_aggregate_passes import PER_UNIT, SAVED, Passes, Unit

# Bytes of the rows of a chunk. The tokenizer's three stages, 32 clouds with K = 81 on an H200, take 403 MB
# and 14.5 ms, with half as much again 437 MB and 12.9 ms; kept rows would take 1,622 MB and 6.5 ms.
ROOM = 64 << 20


def rows_of(rows: tuple[Any, ...], clouds: slice) -> tuple[Any, ...]:
    """The rows of some clouds."""
    return *(row if row is None else row[clouds] for row in rows[:5]), *rows[5:]


def chunks_of(rows: tuple[Any, ...], hidden: int, width: int = 0) -> list[slice]:
    """Clouds that go together, where their rows are two tensors [., H] and one [., C]."""
    each = rows[3][0].numel() * (2 * hidden + width) * rows[1].element_size()
    step = max(1, ROOM // each)
    return [slice(first, first + step) for first in range(0, len(rows[3]), step)]


def is_large(rows: tuple[Any, ...], units: Sequence[Unit]) -> bool:
    """Whether the gradient goes by several chunks."""
    width, hidden = units[0].out_weight.shape
    return len(chunks_of(rows, hidden, width if len(units) > 1 else 0)) > 1


def _of_rows(whole: Passes, tensor: Tensor, clouds: slice) -> Tensor:
    """The chunk's part of a tensor [M, .]."""
    each = whole.number // len(whole.rows[3])
    return tensor[clouds.start * each : clouds.stop * each]


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


def _above(
    whole: Passes, part: Callable[[slice], Passes], units: Sequence[Unit], kept: Tensor
) -> Iterator[tuple[slice, Passes, list[Tensor]]]:
    """Chunks with what passes above these units take of them; `kept` is y1 of the last one."""
    for clouds in chunks_of(whole.rows, kept.shape[1]):
        passes = part(clouds)
        done = [
            tensor for unit in filled(passes, units, _of_rows(whole, kept, clouds)) for tensor in unit.done
        ]
        yield clouds, passes, done


def _place(kept: Tensor, hidden: int) -> Tensor:
    """Where rows of another unit go: over those that are kept, if they are as wide."""
    return kept if kept.shape[1] == hidden else kept.new_empty(len(kept), hidden)


def results(
    whole: Passes, part: Callable[[slice], Passes], parameters: list[Tensor], eps: float
) -> list[Tensor]:
    """What the forward pass gives, with units whose y1 is empty. `part`: the passes over some clouds."""
    units: list[Unit] = []
    saved: list[Tensor] = []
    kept = parameters[0]
    for first in range(0, len(parameters), PER_UNIT):
        own = parameters[first : first + PER_UNIT]
        if not units:
            kept, means, spreads, counts = whole.project([], own[0], own[1])
        else:
            to = _place(kept, len(own[0]))
            chunks = _above(whole, part, units, kept)
            at = (own[0], own[1])
            sums = [chunk.project_to(_of_rows(whole, to, rows), done, *at) for rows, chunk, done in chunks]
            kept, (means, spreads, counts) = to, (torch.cat(parts) for parts in zip(*sums))
        found = whole.in_statistics(means, spreads, counts, own[2], own[3], eps)
        gram, total = whole.gram(kept, *found[2][:2])
        saved += [kept.new_empty(0, len(own[0])), *found, *whole.out_statistics(gram, total, own[4:], eps)]
        units.append(Unit(*own, *saved[-SAVED:]))
    maxima = [chunk.maximum(done) for _, chunk, done in _above(whole, part, units, kept)]
    out, argmax = (torch.cat(values) for values in zip(*maxima))
    return [out, argmax, *saved]


class Backward:
    """The backward passes, unit by unit from the last one.

    Args:
        whole: the passes over all clouds.
        part: those over some clouds.
        units: of which y1 is empty.
        factor: of the gradient of the features, see `_entries`.
        dtype: of the gradient of the features.
    """

    def __init__(
        self,
        whole: Passes,
        part: Callable[[slice], Passes],
        units: Sequence[Unit],
        factor: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.whole, self.part, self.units, self.factor, self.dtype = whole, part, units, factor, dtype
        self.top = len(units) - 1
        hidden, width = max(len(unit.in_weight) for unit in units), len(units[0].out_weight)
        self.large = chunks_of(whole.rows, hidden)
        self.small = chunks_of(whole.rows, hidden, width)
        self.kept = whole.before([], units[0].in_weight, units[0].in_bias)
        self.dense: list[Tensor] = []  # of each small chunk, after a unit between the first and the last
        self.above: list[tuple[Tensor, ...]] = []  # sums of the part of dz
        self.past: list[Tensor] = []  # gradient of the features past the first of several units
        self.features: list[Tensor] = []

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Gradients of each unit's weights, as the passes give them, and of the features."""
        whole, units = self.whole, self.units
        for u, unit in enumerate(units[1:], 1):
            to = _place(self.kept, len(unit.in_weight))
            for rows, chunk, done in _above(whole, self.part, units[:u], self.kept):
                chunk.project_to(_of_rows(whole, to, rows), done, unit.in_weight, unit.in_bias)
            self.kept = to
        whole.out_sums(replace(units[-1], before=self.kept))
        whole.entry = (None, None)
        found: list[Tensor] = []
        for u in reversed(range(len(units))):
            whole.dense = self.dense[0] if self.dense else None
            (out_grad, normed, total), linear = whole.pull(units[u])
            chunks = self.large if u in (0, self.top) else self.small
            sums = [*self.above, *(self._hidden_grad(u, i, rows, linear) for i, rows in enumerate(chunks))]
            plain, scaled = (torch.stack(values).sum(0) for values in zip(*sums))
            means, to = whole.hidden_means(plain, scaled), self.kept
            if u == 1:
                to = _place(to, len(units[0].in_weight))
            chunks = self.small if u else self.large
            results = [self._rows_grad(u, i, rows, linear, means, to) for i, rows in enumerate(chunks)]
            self.kept, self.dense = to, self.dense if u > 1 else []
            in_weight = torch.stack([weight for weight, _ in results]).sum(0)
            whole.sums = whole.joined([below for _, below in results])
            found = [in_weight, scaled, plain, out_grad, normed, total, *found]
        del self.kept, to
        return found, torch.cat(self.features)

    def _entered(self, u: int, chunk: int, rows: slice) -> Passes:
        passes = self.part(rows)
        if u == 0 < self.top:  # what comes through the second layer is in the part of dz
            zeros = self.units[0].in_weight.new_zeros(*passes.rows[2].shape, len(self.units[0].out_weight))
            passes.entry = (zeros, zeros.int())
        elif u < self.top:
            passes.entry, passes.dense = (None, None), self.dense[chunk]
        return passes

    def _hidden_grad(self, u: int, chunk: int, rows: slice, linear: list[Tensor]) -> tuple[Tensor, ...]:
        """Sums of a unit's dz."""
        passes, kept = self._entered(u, chunk, rows), _of_rows(self.whole, self.kept, rows)
        if u == self.top:
            return passes.hidden_grad(replace(self.units[u], before=kept), linear)
        sums = passes.hidden_grad(filled(passes, self.units[: u + 1])[-1], linear)
        if u == 0:
            assert passes.dz is not None
            kept.add_(passes.dz)
        return sums

    def _rows_grad(
        self, u: int, chunk: int, rows: slice, linear: list[Tensor], means: list[Tensor], to: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradient of a unit's W1; and the sums of the unit below, if there is one."""
        passes, kept = self._entered(u, chunk, rows), _of_rows(self.whole, self.kept, rows)
        units = filled(passes, self.units[: u + 1], kept if u == self.top else None)
        if u == 0 < self.top:
            passes.dz = kept
        else:
            passes.hidden_grad(units[-1], linear)
        in_weight = passes.rows_grad(units, means)
        if u == 0:
            self.features.append(self._features_grad(passes, rows))
            return in_weight, []
        below = [passes.add_up(each) for each in passes.sums]
        assert passes.dense is not None
        if u == 1:
            self._divide(passes, units[0], _of_rows(self.whole, to, rows))
        else:
            self.dense[chunk : chunk + 1] = [passes.dense]
        return in_weight, below

    def _divide(self, passes: Passes, unit: Unit, to: Tensor) -> None:
        """The gradient after the first of several units to its part of dz and past the unit."""
        carried = ((unit.out_scale * unit.out_deviation)[:, None] * unit.out_weight).T.float().contiguous()
        zeros = carried.new_zeros(len(carried), len(carried))
        self.above.append(passes.hidden_grad(unit, [zeros, zeros[0], carried]))
        assert passes.dz is not None
        to.copy_(passes.dz)
        self.past += passes.dense_grad(unit, self.factor).split(1)

    def _features_grad(self, passes: Passes, rows: slice) -> Tensor:
        if self.top == 0:
            return passes.features_grad(self.units[0], self.factor, self.dtype)
        passes.entry = (None, None)
        found = passes.features_grad(self.units[0], self.factor, torch.float32)
        return (found + torch.cat(self.past[rows])).to(self.dtype)
