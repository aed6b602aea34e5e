"""Batched, seeded transforms of point clouds.

Each is a small frozen dataclass, called as `transform(points, generator)` with points [B, N, 3]; it returns
new points and leaves its input alone. All randomness comes from the generator (on the CPU, whatever the
device of the points, so that a seed means the same everywhere) and differs from cloud to cloud. `Rows` in the
generator's place says that the points are a part of a batch, and gives them the numbers that they would have
been given in the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

Transform = Callable[[Tensor, "Generator | Rows | None"], Tensor]


@dataclass(frozen=True)
class Rows:
    """The generator of a batch of which only some rows are here, as when several processes share it.

    Every process draws the numbers of all rows and uses its own, so a cloud's numbers depend on its row in
    the batch alone, and draws that are shared by the whole batch are the same everywhere.

    Attributes:
        generator: of the whole batch, in the same state in every process.
        total: clouds in the whole batch.
        rows: which of them these are.
    """

    generator: Generator
    total: int
    rows: slice


def draw(
    function: Callable[..., Tensor], shape: tuple[int, ...], generator: Generator | Rows | None
) -> Tensor:
    """Random numbers for clouds, one row each.

    Args:
        function: `torch.rand` or `torch.randn`.
        shape: of the result, clouds first.
        generator: see `Rows`.
    """
    if isinstance(generator, Rows):
        return function((generator.total, *shape[1:]), generator=generator.generator)[generator.rows]
    return function(shape, generator=generator)


@dataclass(frozen=True)
class Compose:
    """One transform after another."""

    transforms: tuple[Transform, ...]

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        for transform in self.transforms:
            points = transform(points, generator)
        return points


@dataclass(frozen=True)
class Center:
    """Move each cloud's mean to the origin."""

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        return points - points.mean(dim=-2, keepdim=True)


@dataclass(frozen=True)
class UnitSphere:
    """Centre each cloud and scale it so that its farthest point lies at distance 1.

    A cloud that is a single spot is only centred.
    """

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        points = points - points.mean(dim=-2, keepdim=True)
        radius = points.norm(dim=-1).amax(dim=-1)[..., None, None]
        return points / torch.where(radius > 0, radius, 1)


@dataclass(frozen=True)
class RandomScale:
    """Multiply each cloud by a factor drawn evenly from [low, high], one per axis or one for all three."""

    low: float = 2 / 3
    high: float = 3 / 2
    per_axis: bool = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        shape = (len(points), 1, 3 if self.per_axis else 1)
        return points * _uniform(points, shape, self.low, self.high, generator)


@dataclass(frozen=True)
class RandomShift:
    """Move each cloud along every axis by up to `distance` either way."""

    distance: float = 0.2

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        return points + _uniform(points, (len(points), 1, 3), -self.distance, self.distance, generator)


@dataclass(frozen=True)
class RandomYaw:
    """Turn each cloud about an upright axis (0 x, 1 y, 2 z) by up to `angle` radians either way."""

    angle: float = math.pi
    axis: int = 1

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        turn = _uniform(points, (len(points), 1), -self.angle, self.angle, generator)
        cos, sin = turn.cos(), turn.sin()
        a, b = (self.axis + 1) % 3, (self.axis + 2) % 3
        turned = points.clone()
        turned[..., a] = cos * points[..., a] - sin * points[..., b]
        turned[..., b] = sin * points[..., a] + cos * points[..., b]
        return turned


@dataclass(frozen=True)
class Jitter:
    """Move each point by Gaussian noise of standard deviation `sigma`, cut off at `clip`."""

    sigma: float = 0.01
    clip: float = 0.05

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        noise = draw(torch.randn, points.shape, generator).mul_(self.sigma).clamp_(-self.clip, self.clip)
        return points + noise.to(points)


@dataclass(frozen=True)
class RandomSubset:
    """Keep `num_points` random points of each cloud, in random order; all of them if there are no more."""

    num_points: int

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        if points.shape[1] < self.num_points:
            raise ValueError(
                f"`points`: expected at least {self.num_points} per cloud, got {points.shape[1]}"
            )
        chance = draw(torch.rand, points.shape[:2], generator)
        index = chance.argsort(dim=1)[:, : self.num_points].to(points.device)
        return points.gather(1, index[..., None].expand(-1, -1, 3))


@dataclass(frozen=True)
class FarthestPointSubset:
    """Keep `num_points` points of each cloud by farthest point sampling, from the first point on."""

    num_points: int

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        from any2point.ops import farthest_point_sample

        if points.shape[1] < self.num_points:
            raise ValueError(
                f"`points`: expected at least {self.num_points} per cloud, got {points.shape[1]}"
            )
        index = farthest_point_sample(points, self.num_points)
        return points.gather(1, index[..., None].expand(-1, -1, 3))


def _uniform(
    points: Tensor, shape: tuple[int, ...], low: float, high: float, generator: Generator | Rows | None
) -> Tensor:
    return draw(torch.rand, shape, generator).mul_(high - low).add_(low).to(points)
