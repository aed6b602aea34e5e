"""Virtual projection as a module: the views, the frozen position table, and the options that are fixed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from any2point.ops import VirtualProjection as Projected
from any2point.ops import virtual_project
from any2point.ops.virtual_project import cell_grid


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
        trained: make the table a parameter instead of a buffer.
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
        trained: bool = False,
    ) -> None:
        super().__init__()
        if trained:
            self.table = nn.Parameter(table)
        else:
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
