"""Batched, seeded transforms of point clouds.

Each is a small frozen dataclass, called as `transform(points, generator)` with points [B, N, 3 + F]; it
returns new points and leaves its input alone. The first three columns are x, y and z; the others, if there
are any, stay with their points (`PointDataset.inputs` puts them there). `normals` is the column where normals
begin, or None: they are turned and stretched with the surface they stand on.

All randomness comes from the generator (on the CPU, whatever the device of the points, so that a seed means
the same everywhere) and differs from cloud to cloud. `Rows` in the generator's place says that the points are
a part of a batch, and gives them the numbers that they would have been given in the whole. Sums are taken in
float64 and rounded once, so that every device gives the same points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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

    def split(self) -> tuple[Compose, Compose]:
        """What gives the same points every time, up to the first random transform, and the rest.

        The first part can be applied to a whole set once instead of to every batch.
        """
        first = (i for i, transform in enumerate(self.transforms) if getattr(transform, "random", True))
        at = next(first, len(self.transforms))
        return Compose(self.transforms[:at]), Compose(self.transforms[at:])


@dataclass(frozen=True)
class Center:
    """Move each cloud's mean to the origin."""

    random = False

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        xyz, others = _columns(points)
        return _together(xyz - xyz.double().mean(dim=-2, keepdim=True).to(points), others)


@dataclass(frozen=True)
class UnitSphere:
    """Centre each cloud and scale it so that its farthest point lies at distance 1.

    A cloud that is a single spot is only centred.
    """

    random = False

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        xyz, others = _columns(Center()(points))
        radius = xyz.double().square().sum(dim=-1).amax(dim=-1).sqrt()[..., None, None].to(points)
        return _together(xyz / torch.where(radius > 0, radius, 1), others)


@dataclass(frozen=True)
class RandomScale:
    """Multiply each cloud by a factor drawn evenly from [low, high], one per axis or one for all three."""

    low: float = 2 / 3
    high: float = 3 / 2
    per_axis: bool = True
    normals: int | None = None

    random = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        shape = (len(points), 1, 3 if self.per_axis else 1)
        return _stretch(points, _uniform(points, shape, self.low, self.high, generator), self.normals)


@dataclass(frozen=True)
class RandomMirror:
    """Mirror each cloud along each of `axes` (0 x, 1 y, 2 z) with a chance of `chance`."""

    chance: float = 0.5
    axes: tuple[int, ...] = (0, 2)
    normals: int | None = None

    random = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        drawn = draw(torch.rand, (len(points), 1, len(self.axes)), generator)
        sign = torch.ones(len(points), 1, 3)
        sign[..., list(self.axes)] = torch.where(drawn < self.chance, -1.0, 1.0)
        return _stretch(points, sign.to(points), self.normals)


@dataclass(frozen=True)
class RandomShift:
    """Move each cloud along every axis by up to `distance` either way."""

    distance: float = 0.2

    random = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        xyz, others = _columns(points)
        shift = _uniform(points, (len(points), 1, 3), -self.distance, self.distance, generator)
        return _together(xyz + shift, others)


@dataclass(frozen=True)
class RandomYaw:
    """Turn each cloud about an upright axis (0 x, 1 y, 2 z) by up to `angle` radians either way."""

    angle: float = math.pi
    axis: int = 1
    normals: int | None = None

    random = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        chance = draw(torch.rand, (len(points), 1), generator)
        turn = chance.mul_(2 * self.angle).sub_(self.angle)
        # On the CPU, because sines differ in their last bit between devices.
        cos, sin = turn.cos().to(points), turn.sin().to(points)
        turned = points.clone()
        for start in (0,) if self.normals is None else (0, self.normals):
            a, b = start + (self.axis + 1) % 3, start + (self.axis + 2) % 3
            turned[..., a] = cos * points[..., a] - sin * points[..., b]
            turned[..., b] = sin * points[..., a] + cos * points[..., b]
        return turned


@dataclass(frozen=True)
class Jitter:
    """Move each point by Gaussian noise of standard deviation `sigma`, cut off at `clip`."""

    sigma: float = 0.01
    clip: float = 0.05

    random = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        xyz, others = _columns(points)
        noise = draw(torch.randn, xyz.shape, generator).mul_(self.sigma).clamp_(-self.clip, self.clip)
        return _together(xyz + noise.to(points), others)


@dataclass(frozen=True)
class RandomSubset:
    """Keep `num_points` random points of each cloud, in random order; all of them if there are no more.

    With `shared` every cloud keeps the same rows, one draw for the whole batch, as the official code does.
    """

    num_points: int
    shared: bool = False

    random = True

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        _expect_points(points, self.num_points)
        if self.shared:
            whole = generator.generator if isinstance(generator, Rows) else generator
            order = torch.randperm(points.shape[1], generator=whole)
            return points[:, order[: self.num_points].to(points.device)]
        chance = draw(torch.rand, points.shape[:2], generator)
        return _gather(points, chance.argsort(dim=1)[:, : self.num_points].to(points.device))


@dataclass(frozen=True)
class FarthestPointSubset:
    """Keep `num_points` points of each cloud by farthest point sampling, farthest first.

    Attributes:
        num_points: how many.
        start: "first" begins with the first point, "random" with any: the same as shuffling the cloud before.
        tie: which of equally far points, and whether points near the origin count; see
            `any2point.ops.farthest_point_sample`.
        at_most: take all points of a cloud that has fewer, instead of refusing it.
    """

    num_points: int
    start: str = "first"
    tie: Literal["lowest", "pointnet2"] = "lowest"
    at_most: bool = False

    @property
    def random(self) -> bool:
        """Whether the points differ from call to call."""
        return self.start == "random"

    def __call__(self, points: Tensor, generator: Generator | Rows | None = None) -> Tensor:
        from any2point.ops import farthest_point_sample

        if not self.at_most:
            _expect_points(points, self.num_points)
        count = min(self.num_points, points.shape[1])
        xyz = points[..., :3].contiguous()
        if not self.random:
            return _gather(points, farthest_point_sample(xyz, count, tie=self.tie))
        # In float64 the product stays below the number of points.
        chance = draw(torch.rand, (len(points),), generator).double()
        start = (chance * points.shape[1]).long().to(points.device)
        return _gather(points, farthest_point_sample(xyz, count, start=start, tie=self.tie))


def _expect_points(points: Tensor, least: int) -> None:
    if points.shape[1] < least:
        raise ValueError(f"`points`: expected at least {least} per cloud, got {points.shape[1]}")


def _columns(points: Tensor) -> tuple[Tensor, Tensor]:
    return points[..., :3], points[..., 3:]


def _together(xyz: Tensor, others: Tensor) -> Tensor:
    return torch.cat([xyz, others], dim=-1) if others.shape[-1] else xyz


def _gather(points: Tensor, index: Tensor) -> Tensor:
    return points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))


def _stretch(points: Tensor, factor: Tensor, normals: int | None) -> Tensor:
    """Multiply x, y, z by factors [B, 1, 3 or 1]; a plane that is stretched keeps a normal of length 1."""
    xyz, others = _columns(points)
    stretched = _together(xyz * factor, others)
    if normals is None:
        return stretched
    normal = points[..., normals : normals + 3] / factor
    length = normal.double().square().sum(dim=-1, keepdim=True).sqrt().to(points)
    stretched[..., normals : normals + 3] = normal / torch.where(length > 0, length, 1)
    return stretched


def _uniform(
    points: Tensor, shape: tuple[int, ...], low: float, high: float, generator: Generator | Rows | None
) -> Tensor:
    return draw(torch.rand, shape, generator).mul_(high - low).add_(low).to(points)
