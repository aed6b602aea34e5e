"""Virtual projection as a module: the views, the frozen position table, and the options that are fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from any2point.ops import VirtualProjection as Projected
from any2point.ops import virtual_project
from any2point.ops.virtual_project import cell_grid

# The six rotations of the official code, p' = p R, written as (axis, sign) of each new coordinate.
_AXES = (
    ((1, -1), (0, 1), (2, 1)),
    ((1, -1), (2, -1), (0, 1)),
    ((1, -1), (0, -1), (2, -1)),
    ((1, -1), (2, 1), (0, -1)),
    ((2, -1), (0, 1), (1, -1)),
    ((2, 1), (0, 1), (1, 1)),
)


def spread_lines(views: int) -> Tensor:
    """Directions `[V, 3]` of V distinct lines, evenly spread over the half sphere.

    Three are the axes, six the diagonals of an icosahedron, which is the most even choice there is; any other
    number follows a Fibonacci lattice.
    """
    if views == 3:
        return torch.eye(3)
    if views == 6:
        golden = (1 + math.sqrt(5)) / 2
        pairs = torch.tensor([[0, 1, golden], [0, 1, -golden]]) / math.sqrt(1 + golden * golden)
        return torch.cat([pairs.roll(shift, 1) for shift in range(3)])
    turn = math.pi * (3 - math.sqrt(5))
    lines = []
    for i in range(views):
        height = (i + 0.5) / views
        radius = math.sqrt(1 - height * height)
        lines.append((radius * math.cos(turn * i), height, radius * math.sin(turn * i)))
    return torch.tensor(lines)


def official_rotations() -> Tensor:
    """The six rotations `[6, 3, 3]` of the official code, applied from the right, with exact entries."""
    rotations = torch.zeros(6, 3, 3)
    for view, axes in enumerate(_AXES):
        for column, (axis, sign) in enumerate(axes):
            rotations[view, axis, column] = sign
    return rotations


def spread_rotations(views: int) -> Tensor:
    """Rotations `[V, 3, 3]` with lines of sight (the third axis) spread over the sphere; six: along axes."""
    if views == 6:
        return official_rotations()
    turn = math.pi * (3 - math.sqrt(5))
    rotations = []
    for i in range(views):
        height = 1 - 2 * (i + 0.5) / views
        radius = math.sqrt(1 - height * height)
        sight = torch.tensor([radius * math.cos(turn * i), height, radius * math.sin(turn * i)])
        right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), sight)
        right = right / torch.linalg.vector_norm(right)
        rotations.append(torch.stack([right, torch.linalg.cross(sight, right), sight], dim=1))
    return torch.stack(rotations)


class VirtualProjection(nn.Module):
    """Position encodings and cells of token centres in the source modality.

    Args:
        table: position table `[L, C]` or `[H, W, C]`.
        views: directions `[V, 3]` or rotations `[V, 3, 3]`.
        cell: edge of a cell, in positions.
        size: extent of the positions; by default that of the table.
        camera: fixed distance of the camera, or None to fit every cloud.
        wrap: official coordinates, see `any2point.ops.virtual_project`.
        scramble: official layout of image encodings, see there.
    """

    table: Tensor
    views: Tensor

    def __init__(
        self,
        table: Tensor,
        views: Tensor,
        *,
        cell: float,
        size: Sequence[int] | None = None,
        camera: float | None = None,
        wrap: bool = False,
        scramble: bool = False,
    ) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("views", views)
        self.cell, self.camera, self.wrap, self.scramble = cell, camera, wrap, scramble
        self.size = tuple(table.shape[:-1]) if size is None else tuple(size)
        self.num_cells = math.prod(cell_grid(self.size, cell))

    def forward(self, centers: Tensor) -> Projected:
        """`centers [B, S, 3]` -> position, cell and encoding."""
        return virtual_project(
            centers,
            self.table,
            self.views,
            cell=self.cell,
            size=self.size,
            camera=self.camera,
            wrap=self.wrap,
            scramble=self.scramble,
        )
