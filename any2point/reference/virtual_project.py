"""Virtual projection of token centres in plain PyTorch: the written specification."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from any2point.reference.interpolate import interpolate as reference_interpolate

# A cloud whose extent along a line is below this share of its largest extent counts as flat there.
FLAT = 1e-5


class VirtualProjection(NamedTuple):
    """Where each centre lands in the source modality.

    `position [B, V, S, A]`: coordinate on the line (A = 1) or column and row in the image (A = 2);
    `cell [B, V, S]` int64: index of the cell that the position falls in;
    `encoding [B, S, C]`: position encoding, averaged over the views.
    """

    position: Tensor
    cell: Tensor
    encoding: Tensor


def cell_grid(size: Sequence[int], cell: float) -> tuple[int, ...]:
    """Number of cells along each axis of a source of `size` positions."""
    return tuple(math.ceil(extent / cell) for extent in size)


def project_to_lines(centers: Tensor, views: Tensor, length: int, *, wrap: bool) -> Tensor:
    """Coordinates `[B, V, S]` of the centres on V lines of `length` positions, by minimum and maximum."""
    norm = torch.linalg.vector_norm(views, dim=-1, keepdim=True)
    direction = views / torch.where(norm > 0, norm, 1.0)
    along = (centers[:, None] * direction[None, :, None]).sum(-1)
    low = along.amin(-1, keepdim=True)
    extent = along.amax(-1, keepdim=True) - low
    if wrap:
        return torch.remainder(length * ((along - low) / extent) - 0.5, length)
    size = (centers.amax(1) - centers.amin(1)).amax(-1)[:, None, None]
    flat = extent <= torch.clamp(FLAT * size, min=torch.finfo(extent.dtype).tiny)
    share = torch.where(flat, 0.5, (along - low) / torch.where(flat, 1.0, extent))
    return share * (length - 1)


def project_to_images(
    centers: Tensor, views: Tensor, height: int, width: int, *, camera: float | None, wrap: bool
) -> tuple[Tensor, Tensor]:
    """Column and row `[B, V, S]` of the centres in V perspective images.

    Without `camera` each cloud is seen from sqrt(2) times the radius of its bounding sphere about its centre,
    the distance at which a camera with a 90 degree field of view has the whole sphere in view.
    """
    if camera is None:
        low, high = centers.amin(1, keepdim=True), centers.amax(1, keepdim=True)
        centers = centers - (low / 2 + high / 2)
        largest = centers.abs().amax((1, 2), keepdim=True)
        centers = centers / torch.where(largest > torch.finfo(largest.dtype).tiny, largest, 1.0)
        radius = torch.linalg.vector_norm(centers, dim=-1).amax(1)[:, None, None]
        distance = math.sqrt(2.0) * radius.clamp(min=1.0)
    else:
        distance = torch.full_like(centers[:1, :1, :1], camera + 1e-12)
    seen = (centers[:, None, :, :, None] * views[None, :, None]).sum(-2)
    depth = seen[..., 2] + distance
    x, y = seen[..., 0] / depth, seen[..., 1] / depth
    if wrap:
        column = torch.remainder((x + 1) * width / 2 - 0.5, width)
        row = torch.remainder((y * height / width + 1) * height / 2 - 0.5, height)
        return column, row
    column = ((x + 1) / 2 * (width - 1)).clamp(0, width - 1)
    row = ((y + 1) / 2 * (height - 1)).clamp(0, height - 1)
    return column, row


def _line_weights(position: Tensor, length: int, size: int, *, wrap: bool) -> tuple[Tensor, Tensor]:
    """Rows of the table and their weights, each `[B, V, S, 2]`, for linear interpolation."""
    if wrap:
        coordinate = position * ((length - 1) / (position.max() - position.min()))
        low = coordinate.floor().clamp(0, length - 1)
        high = coordinate.ceil().clamp(0, length - 1)
        weight = torch.stack([high - coordinate, coordinate - low], -1)
        return torch.stack([low, high], -1).long().clamp(0, length - 1), weight
    coordinate = position * ((length - 1) / max(size - 1, 1))
    low = coordinate.floor().clamp(0, length - 1)
    share = coordinate - low
    index = torch.stack([low, low + 1], -1).long().clamp(0, length - 1)
    return index, torch.stack([1 - share, share], -1)


def _image_weights(
    column: Tensor, row: Tensor, height: int, width: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Rows of the flattened table and their weights, each `[B, V, S, 4]`; zero outside the grid."""
    u = column * ((width - 1) / max(size[1] - 1, 1))
    v = row * ((height - 1) / max(size[0] - 1, 1))
    left, top = u.floor(), v.floor()
    index, weight = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            i, j = left + dx, top + dy
            inside = (i >= 0) & (i < width) & (j >= 0) & (j < height)
            share = (1 - (u - i).abs()) * (1 - (v - j).abs())
            weight.append(torch.where(inside, share, 0.0))
            index.append(j.clamp(0, height - 1).long() * width + i.clamp(0, width - 1).long())
    return torch.stack(index, -1).clamp(0, height * width - 1), torch.stack(weight, -1)


def virtual_project(
    centers: Tensor,
    table: Tensor,
    views: Tensor,
    *,
    cell: float,
    size: Sequence[int] | None = None,
    camera: float | None = None,
    wrap: bool = False,
    scramble: bool = False,
    interpolate: Callable[[Tensor, Tensor, Tensor], Tensor] = reference_interpolate,
) -> VirtualProjection:
    """See `any2point.ops.virtual_project`; `interpolate` is the weighted gather to use."""
    grid = tuple(table.shape[:-1])
    extent = grid if size is None else tuple(size)
    cells = cell_grid(extent, cell)
    if len(grid) == 1:
        position = project_to_lines(centers, views, extent[0], wrap=wrap)
        index, weight = _line_weights(position, grid[0], extent[0], wrap=wrap)
        bins = (position / cell).long().clamp(0, cells[0] - 1)
        position = position[..., None]
    else:
        column, row = project_to_images(centers, views, extent[0], extent[1], camera=camera, wrap=wrap)
        index, weight = _image_weights(column, row, grid[0], grid[1], (extent[0], extent[1]))
        across = (column / cell).long().clamp(0, cells[1] - 1)
        bins = (row / cell).long().clamp(0, cells[0] - 1) * cells[1] + across
        position = torch.stack([column, row], -1)

    batch, count = centers.shape[:2]
    corners = views.shape[0] * index.shape[-1]
    index = index.transpose(1, 2).reshape(batch * count, corners)
    weight = weight.transpose(1, 2).reshape(batch * count, corners) / views.shape[0]
    encoding = interpolate(table.flatten(0, -2), index, weight).view(batch, count, table.shape[-1])
    if scramble:
        encoding = encoding.transpose(1, 2).reshape(encoding.shape)
    return VirtualProjection(position, bins, encoding)
