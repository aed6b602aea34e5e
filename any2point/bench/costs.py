"""Inputs made from seeds, and what an op has to do at least.

A floor is what no implementation of the formulas can beat: the bytes that must move, over the machine's
measured copy bandwidth, or the matrix products, over its measured rate, whichever takes longer. `direct` is
all arithmetic of the formula as it is written over the machine's rates: methods that prune or rewrite may
beat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from any2point.bench.timing import Machine


def cloud(kind: str, batch: int, rows: int, seed: int = 0) -> np.ndarray:
    """Clouds as float32 [batch, rows, 3]: `cube`, `ball` (uniform volumes) or `surface` (a bumpy shell)."""
    rng = np.random.default_rng(seed)
    if kind == "cube":
        return rng.random((batch, rows, 3), dtype=np.float32)
    direction = rng.standard_normal((batch, rows, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    if kind == "ball":
        radius = rng.random((batch, rows, 1)) ** (1 / 3)
    elif kind == "surface":
        waves = np.sin(5 * direction[..., 0]) * np.sin(7 * direction[..., 1])
        radius = 0.7 + 0.2 * waves[..., None] + 0.005 * rng.standard_normal((batch, rows, 1))
    else:
        raise ValueError(f"`kind`: expected 'cube', 'ball' or 'surface', got {kind!r}")
    return (direction * radius).astype(np.float32)


@dataclass(frozen=True)
class Cost:
    """What an op has to do.

    Attributes:
        bytes: that must move: inputs read and outputs written, once.
        operations: of float32 lanes in the direct method.
        products: multiply-adds of its matrix products.
    """

    bytes: int
    operations: int = 0
    products: int = 0

    def us(self, machine: Machine, moves: int = 1, passes: int = 1) -> tuple[float, float]:
        """Microseconds of the bytes, `moves` times, and of the arithmetic, `passes` times."""
        direct = self.operations / machine.lanes + self.products / machine.matrix
        return moves * self.bytes / machine.bandwidth * 1e6, passes * direct * 1e6

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes, self.operations + other.operations, self.products + other.products
        )


def cost_farthest_point_sample(batch: int, rows: int, samples: int) -> Cost:
    # A pair: 3 differences, 3 multiply-adds, min, running maximum.
    return Cost(batch * (12 * rows + 8 * samples), batch * rows * max(samples - 1, 0) * 8)


def cost_knn(batch: int, queries: int, rows: int, k: int) -> Cost:
    # A pair: 3 differences, 3 multiply-adds, 1 comparison.
    return Cost(batch * (12 * (queries + rows) + 12 * queries * k), batch * queries * rows * 7)


def cost_group(batch: int, rows: int, queries: int, k: int, width: int) -> Cost:
    return Cost(batch * (4 * rows * width + 8 * queries * k + 4 * queries * k * width))


def cost_interpolate(batch: int, rows: int, queries: int, k: int, width: int) -> Cost:
    return Cost(
        batch * (4 * rows * width + 12 * queries * k + 4 * queries * width), batch * queries * k * width
    )


def cost_voxel_cluster(batch: int, rows: int) -> Cost:
    return Cost(batch * rows * (12 + 8 + 8 + 8))


def cost_segment_pool(rows: int, width: int, segments: int) -> Cost:
    return Cost(4 * (rows + segments) * width + 8 * rows, rows * width)


def cost_virtual_project(batch: int, centers: int, positions: int, width: int, views: int) -> Cost:
    return Cost(
        4 * (3 * batch * centers + positions * width + batch * centers * width) + 8 * batch * views * centers,
        batch * views * centers * width * 2,
    )


def cost_local_aggregate(
    batch: int, rows: int, centers: int, k: int, width: int, hidden: int, units: int
) -> Cost:
    """Of `units` residual units on `2 * width` channels with a bottleneck of `hidden`."""
    pairs = batch * centers * k
    moved = 4 * batch * (rows * (width + 3) + 2 * centers * width) + 8 * pairs
    return Cost(moved, 0, 4 * pairs * width * hidden * units)


def cost_guided_aggregate(batch: int, tokens: int, width: int, views: int, inner: int) -> Cost:
    """Tokens read and written, cells and voxels, the weights of the attention in cells."""
    rows = batch * tokens
    moved = 8 * rows * width + 8 * rows * (views + 1) + 16 * views * inner * width
    return Cost(moved, 0, 4 * rows * width * views * inner)
