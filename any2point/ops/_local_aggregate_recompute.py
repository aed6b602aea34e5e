"""Local aggregation in training that keeps no rows: passes make them again, of some clouds at a time.

Rows that fit into ROOM stay. Otherwise nothing of size [M, .] is kept between forward and backward. Inside
either there is one tensor [M, H], and of three units or more one [M, C], beside rows of a chunk of clouds:

    forward   y1 of the last unit so far
    backward  of one unit: y1; then dz, of each chunk where y1 of the chunk before was; then dy1 in its place
              of several: y1 of the last one; then, of the first, the part of dz that the gradient du after it
              contributes, [h > 0] du p W2. The rest, [h > 0] (constant - h Q), needs sums over all chunks,
              and is added when they are known.

Sums go by chunks in a fixed order.

H200, forward and backward of the tokenizer's three stages as a graph, 32 clouds, K = 81: in float16 10.3 ms
and 397 MB, where with rows that are kept it is 6.4 ms and 1.17 GB; in TF32 10.6 ms and 422 MB. The floor, the
products of all passes made once, is 1.9 ms. The first stage takes 6.2 ms for 3.3 with rows that are kept: y1
made again 1.25 ms more, the gradient of the hidden channels in twice as many passes 0.5, passes over a chunk
instead of all rows the rest. Chunks of 32 and of 64 MB instead of 48 make all stages 1.1 ms slower and 0.6 ms
faster for 17 MB less and 22 MB more. Before gradients took the place of y1 it was 14.5 ms and 403 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from any2point.ops._local_aggregate_passes import PER_UNIT, SAVED, CudaPasses, Passes, Unit

# Bytes of the rows of a chunk, and of rows that are kept nevertheless.
ROOM = 48 << 20


Part = Callable[..., Passes]


def is_large(rows: int, hidden: Sequence[int], width: int, size: int) -> bool:
    """Whether training takes more rows than there is room for: y1, dz and, of several units, du."""
    return rows * (sum(hidden) + max(hidden) + (width if len(hidden) > 1 else 0)) * size > ROOM


def rows_of(rows: tuple[Any, ...], clouds: slice) -> tuple[Any, ...]:
    """The rows of some clouds."""
    return *(row if row is None else row[clouds] for row in rows[:5]), *rows[5:]


def chunks_of(rows: tuple[Any, ...], columns: int) -> list[slice]:
    """Clouds that go together, where their rows have so many columns in all."""
    each = rows[3][0].numel() * columns * rows[1].element_size()
    step = max(1, ROOM // each)
    return [slice(first, min(first + step, len(rows[3]))) for first in range(0, len(rows[3]), step)]


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
    whole: Passes, part: Part, units: Sequence[Unit], kept: Tensor, alone: bool = False
) -> Iterator[tuple[slice, Passes, list[Tensor]]]:
    """Chunks with what passes above these units take of them; `kept` is y1 of the last one.

    A single chunk where nothing is made again. `alone`: nor are there rows of another unit.
    """
    others = len(units) - (alone or whole.in_place)
    if others == 0:
        yield slice(0, len(whole.rows[3])), whole, replace(units[-1], before=kept).done
        return
    for clouds in chunks_of(whole.rows, others * max(len(unit.in_weight) for unit in units)):
        passes = part(clouds)
        again = filled(passes, units, _of_rows(whole, kept, clouds))
        yield clouds, passes, [tensor for unit in again for tensor in unit.done]


def _place(kept: Tensor, hidden: int) -> Tensor:
    """Where rows of another unit go: over those that are kept, if they are as wide."""
    return kept if kept.shape[1] == hidden else kept.new_empty(len(kept), hidden)


def results(whole: Passes, part: Part, parameters: list[Tensor], eps: float) -> list[Tensor]:
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
    maxima = [chunk.maximum(done) for _, chunk, done in _above(whole, part, units, kept, alone=True)]
    out, argmax = maxima[0] if len(maxima) == 1 else (torch.cat(values) for values in zip(*maxima))
    return [out, argmax, *saved]


def _turned(unit: Unit) -> Unit:
    """The unit with W1 as passes take it, not once more for each chunk."""
    return replace(unit, in_weight=unit.in_weight.T.contiguous().T)


def _carried(unit: Unit) -> Tensor:
    """The second layer with its normalisation, as dense rows of du are multiplied with it."""
    return ((unit.out_scale * unit.out_deviation)[:, None] * unit.out_weight).T.float().contiguous()


def _past(whole: Passes) -> Tensor:
    """Room for sums over points, over the entries of clouds that are done if these are as many."""
    features, (entries, _) = whole.rows[1], whole.entry
    assert entries is not None
    if entries.numel() < features.numel():
        return entries.new_empty(features.shape)
    return entries.flatten()[: features.numel()].view(features.shape)


class Backward:
    """The backward passes, unit by unit from the last one.

    Args:
        whole: the passes over all clouds.
        part: those over some clouds, perhaps without the entries.
        units: of which y1 is empty.
        factor: of the gradient of the features, see `_entries`.
        dtype: of the gradient of the features.
    """

    def __init__(
        self,
        whole: Passes,
        part: Part,
        units: Sequence[Unit],
        factor: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.whole, self.part, self.units, self.factor, self.dtype = whole, part, units, factor, dtype
        self.first = whole.factor(units[0].in_weight)
        self.top = len(units) - 1
        self.hidden, self.width = max(len(unit.in_weight) for unit in units), len(units[0].out_weight)
        self.large = chunks_of(whole.rows, 2 * self.hidden)
        self.small = chunks_of(whole.rows, 2 * self.hidden + self.width)
        self.dense: list[Tensor] = []  # of each small chunk, after a unit between the first and the last
        self.above: list[tuple[Tensor, ...]] = []  # sums of the part of dz
        self.past: list[Tensor] = []  # gradient of the features past the first of several units
        self.features: list[Tensor] = []

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Gradients of each unit's weights, as the passes give them, and of the features."""
        if self.top == 0:
            return self._of_one()
        if isinstance(self.whole, CudaPasses):
            return self._of_two(self.whole)
        return self._of_several()

    def _of_one(self) -> tuple[list[Tensor], Tensor]:
        """Of a single unit: dz of a chunk takes the place of y1 of the chunk before, which is made again."""
        whole, unit = self.whole, self.units[0]
        chunks = chunks_of(whole.rows, self.hidden)
        room = self._room(whole.number + self._count(chunks[0]))
        kept = room[-whole.number :]
        if whole.in_place:
            self._before(whole, kept)
        else:
            for rows in chunks:
                self._before(self.part(rows, False), _of_rows(whole, kept, rows))
        whole.out_sums(replace(unit, before=kept))
        whole.entry = (None, None)
        (out_grad, normed, total), linear = whole.pull(unit)
        sums = [
            self.part(rows).hidden_grad(
                replace(unit, before=_of_rows(whole, kept, rows)), linear, _of_rows(whole, room, rows)
            )
            for rows in chunks
        ]
        plain, scaled = (torch.stack(values).sum(0) for values in zip(*sums))
        means, turned, found = whole.hidden_means(plain, scaled), _turned(unit), []
        for rows in reversed(chunks):
            passes = self.part(rows, not whole.in_place)
            again = room[-passes.number :]
            if rows is not chunks[-1]:
                self._before(passes, again)
            passes.dz = _of_rows(whole, room, rows)
            found.append(passes.rows_grad([replace(turned, before=again)], means))
            if not whole.in_place:
                self.features.insert(0, passes.features_grad(unit, self.factor, self.dtype))
        for rows in chunks_of(whole.rows, self.hidden // 2) if whole.in_place else ():  # less room for more
            passes = self.part(rows)
            passes.rest = [_of_rows(whole, room, rows)]
            self.features.append(passes.features_grad(unit, self.factor, self.dtype))
        in_weight = torch.stack(found).sum(0)
        return [in_weight, scaled, plain, out_grad, normed, total], torch.cat(self.features)

    def _of_two(self, whole: CudaPasses) -> tuple[list[Tensor], Tensor]:
        """Of two units, where gradients of rows take each other's place."""
        first, second = self.units
        kept = self._before(whole)
        whole.before(replace(first, before=kept).done, second.in_weight, second.in_bias, kept)
        again = replace(second, before=kept)
        whole.out_sums(again)
        upper, linear = whole.pull(second)
        plain, scaled = whole.hidden_sums(again, linear)
        whole.before_grad(again, linear, whole.hidden_means(plain, scaled))
        upper, past = [scaled, plain, *upper], _past(whole)
        by_center = past.new_empty(*whole.rows[2].shape, past.shape[2])
        whole.entry = (None, None)
        whole.find_lists()
        as_is = torch.zeros_like(second.in_single)  # dy1 in the place of dz
        as_is[0] = 1
        zeros = linear[0].new_zeros(linear[0].shape)
        carried = _carried(first)
        below = replace(first, folded=first.folded.float())
        above = replace(_turned(second), in_single=as_is)
        weights, sums = [], []
        for rows in chunks_of(whole.rows, 2 * self.hidden):
            passes, own = self.part(rows), _of_rows(whole, kept, rows)
            assert isinstance(passes, CudaPasses)
            again, passes.dz = replace(below, before=self._before(passes)), own
            weights.append(passes.rows_grad([again, replace(above, before=own)], [*as_is[1:3]]))
            sums.append([passes.add_up(each) for each in passes.sums])
            passes.hidden_grad(again, [zeros, zeros[0], carried])
            whole.by_point(passes, rows, past)
            by_center[rows] = passes.by_center.view_as(by_center[rows])
            del passes, again
        whole.sums = whole.joined(sums)
        upper = [torch.stack(weights).sum(0), *upper]

        lower, linear = whole.pull(first)
        chunks = chunks_of(whole.rows, self.hidden)
        room, parts, weights = self._room(self._count(chunks[0])), [], []
        for rows in chunks:
            passes = self.part(rows, False)
            again = replace(first, before=self._before(passes, room[: passes.number]))
            parts.append(passes.hidden_grad(again, linear, _of_rows(whole, kept, rows)))
        plain, scaled = (torch.stack(values).sum(0) for values in zip(*parts))
        means, turned = whole.hidden_means(plain, scaled), _turned(first)
        for rows in reversed(chunks):
            passes = self.part(rows, False)
            again = replace(turned, before=room[: passes.number])
            if rows is not chunks[-1]:
                self._before(passes, again.before)
            passes.dz = _of_rows(whole, kept, rows)
            weights.append(passes.rows_grad([again], means))
        del room, again, passes
        whole.rest, whole.dense, whole.by_center = [kept], past, by_center.flatten(0, 1)
        features = whole.features_grad(first, self.factor, self.dtype)
        return [torch.stack(weights).sum(0), scaled, plain, *lower, *upper], features

    def _before(self, passes: Passes, to: Tensor | None = None) -> Tensor:
        """y1 of the first unit, made again."""
        return passes.before([], self.first, self.units[0].in_bias, to)

    def _count(self, clouds: slice) -> int:
        """Rows of a chunk."""
        return self.whole.number // len(self.whole.rows[3]) * (clouds.stop - clouds.start)

    def _room(self, rows: int) -> Tensor:
        return self.whole.rows[1].new_empty(rows, self.hidden)

    def _of_several(self) -> tuple[list[Tensor], Tensor]:
        whole, units = self.whole, self.units
        self.kept = self._before(whole)
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
        passes = self.part(rows, u == self.top)
        if u == 0:  # what comes through the second layer is in the part of dz
            zeros = self.units[0].in_weight.new_zeros(*passes.rows[2].shape, len(self.units[0].out_weight))
            passes.entry = (zeros, zeros.int())
        elif u < self.top:
            passes.dense = self.dense[chunk]
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
        if u == 0:
            passes.dz = kept
        else:
            passes.hidden_grad(units[-1], linear)
        in_weight = passes.rows_grad(units, means)
        if u == 0:
            passes.entry = (None, None)
            found = passes.features_grad(self.units[0], self.factor, torch.float32)
            self.features.append((found + torch.cat(self.past[rows])).to(self.dtype))
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
        carried = _carried(unit)
        zeros = carried.new_zeros(len(carried), len(carried))
        self.above.append(passes.hidden_grad(unit, [zeros, zeros[0], carried]))
        assert passes.dz is not None
        to.copy_(passes.dz)
        self.past += passes.dense_grad(unit, self.factor).split(1)
