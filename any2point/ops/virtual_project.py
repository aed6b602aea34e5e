"""Virtual projection: position encodings of a 1D or 2D source modality for 3D token centres."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from any2point.ops._checks import (
    check_clouds,
    check_floating,
    check_int,
    check_like,
    check_tensor,
    exporting,
    readable,
    shape_text,
)
from any2point.ops.interpolate import interpolate
from any2point.reference.virtual_project import VirtualProjection, cell_grid
from any2point.reference.virtual_project import virtual_project as _composition

__all__ = ["VirtualProjection", "cell_grid", "virtual_project"]

_MOST_VIEWS = 256  # csrc/virtual_project/kernel.h, kMostCorners


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
) -> VirtualProjection:
    """Project centres onto V virtual lines or images and read the source's position table there.

    Lines (`table [L, C]`, `views [V, 3]`): with `t` the min-max position of the cloud along the line,
    `position = t (size - 1)`. Images (`table [H, W, C]`, `views [V, 3, 3]`): `p = (centre - middle) view` is
    seen in perspective along its third axis by a camera that has the whole cloud in view;
    `position = ((p_x / depth + 1) / 2 (width - 1), (p_y / depth + 1) / 2 (height - 1))`. The encoding is the
    table, (bi)linearly interpolated at the position, averaged over the views.

    Args:
        centers: `[B, S, 3]` float32 or float64 (float16 and bfloat16 are raised to float32).
        table: position encodings `[L, C]` of a sequence, or `[H, W, C]` of an image, without class token.
        views: directions `[V, 3]` (any length but zero) or rotations `[V, 3, 3]`, applied from the right.
        cell: edge of a cell in units of position.
        size: extent of the positions, `[length]` or `[height, width]`; by default that of the table.
        camera: distance of the camera from the origin (of the coordinates, no re-centring); by default it is
            placed for each cloud so that the whole cloud is in view.
        wrap: official rule. Lines: `position = (length t - 1/2) mod length`, read over the range of the whole
            batch with a zero vector at integers and beyond the end. Images: the pixel modulo the image.
        scramble: official rule: the averaged encoding is stored channels first and read as tokens first.

    Returns:
        `VirtualProjection(position [B, V, S, 1 or 2], cell [B, V, S] int64, encoding [B, S, C])`; cells are
        numbered row by row, below the product of `cell_grid(size, cell)`.

    Raises:
        ValueError: shapes do not fit each other, a number is not positive, there are 2^31 cells or more, or
            an option is of the other kind of table; on the CPU also a direction of length zero. On CUDA such
            a line has all centres in its middle.
        TypeError: an argument has another dtype than listed.

    Differentiable in: table, and centers (through position and through the interpolation weights; cells are
        constants). In the centres the result is continuous with kinks, where the gradient is that of one
        side: at whole positions of the table, at the edge of an image (clamped positions have none), and
        where another point becomes the extreme one. The points that span a line, or the sphere that a camera
        has in view, receive the gradient of that span. With `wrap` there are jumps as well.
    Deterministic: yes.
    Complexity: O(B V S C) time, O(B S C) memory, in one kernel. The composition of torch ops takes over, with
        the same result, in float64, for a gradient of centers or views, for wrapped lines (which read the
        range of the batch), for more than 256 views, and in exported graphs.

    Source: Any2Point (Tang et al., ECCV 2024), 3D-to-any virtual projection; the perspective images follow
        PointCLIP (Zhang et al., CVPR 2022).

    Example:
        >>> out = virtual_project(torch.rand(2, 128, 3), torch.rand(77, 64), torch.eye(3), cell=2)
        >>> out.position.shape, int(out.cell.max()), out.encoding.shape
        (torch.Size([2, 3, 128, 1]), 38, torch.Size([2, 128, 64]))
    """
    centers = check_clouds(centers, name="centers").points
    if centers.shape[-1] != 3 or centers.shape[1] == 0:
        raise ValueError(f"centers: expected shape [B, S, 3] with S > 0, got {shape_text(centers)}")
    table = check_tensor("table", table, dims=(2, 3), layout="[L, C] or [H, W, C]")
    check_floating("table", table)
    check_like("table", table, "centers", centers, dtype=False)
    if 0 in table.shape[:-1]:
        raise ValueError(f"table: expected at least one position, got {shape_text(table)}")
    expected = "[V, 3]" if table.dim() == 2 else "[V, 3, 3]"
    views = check_tensor("views", views, dims=table.dim(), layout=f"{expected} for this table")
    check_like("views", views, "centers", centers, dtype=False)
    if views.shape[0] == 0 or any(n != 3 for n in views.shape[1:]):
        raise ValueError(f"views: expected shape {expected} for this table, got {shape_text(views)}")
    if table.dim() == 2 and readable(views) and bool((views == 0).all(-1).any()):
        raise ValueError(f"views: expected directions that are not zero, got {views.tolist()}")
    check_floating("views", views)
    _check_numbers(cell, size, camera, table)
    if table.dim() == 2 and scramble:
        raise ValueError("scramble: expected False for a sequence, got True")
    if wrap and centers.shape[0] == 0:
        raise ValueError("wrap: expected False for a batch without clouds, got True")
    views = views.to(centers.dtype)
    if _is_fused(centers, table, views, wrap):
        projected = _fused(centers, table, views, cell, size, camera, wrap)
        if not scramble:
            return projected
        encoding = projected.encoding.transpose(1, 2).reshape(projected.encoding.shape)
        return projected._replace(encoding=encoding)
    return _composition(
        centers.contiguous(),
        table.contiguous(),
        views.contiguous(),
        cell=cell,
        size=size,
        camera=camera,
        wrap=wrap,
        scramble=scramble,
        interpolate=interpolate,
    )


def _is_fused(centers: Tensor, table: Tensor, views: Tensor, wrap: bool) -> bool:
    if exporting() or centers.device.type not in ("cpu", "cuda"):
        return False
    if torch.float64 in (centers.dtype, table.dtype) or (wrap and table.dim() == 2):
        return False
    moving = torch.is_grad_enabled() and (centers.requires_grad or views.requires_grad)
    return views.shape[0] <= _MOST_VIEWS and not moving


def _fused(
    centers: Tensor,
    table: Tensor,
    views: Tensor,
    cell: float,
    size: Sequence[int] | None,
    camera: float | None,
    wrap: bool,
) -> VirtualProjection:
    extent = table.shape[:-1] if size is None else size
    position, encoding, bins = torch.ops.any2point._virtual_project.default(
        centers.contiguous(),
        table.contiguous(),
        views.contiguous(),
        float(cell),
        extent[0] if table.dim() == 3 else 0,
        extent[-1],
        0.0 if camera is None else camera + 1e-12,
        wrap,
    )
    return VirtualProjection(position, bins, encoding)


def _check_numbers(cell: object, size: object, camera: object, table: Tensor) -> None:
    """Positive numbers, and as many as the table has axes."""
    for name, value in (("cell", cell), ("camera", 1 if camera is None else camera)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number, got {value}")
    if camera is not None and table.dim() == 2:
        raise ValueError(f"camera: expected None for a sequence, got {camera}")
    axes = table.dim() - 1
    extents = list(table.shape[:-1]) if size is None else size
    if not isinstance(extents, Sequence) or len(extents) != axes:
        raise ValueError(f"size: expected {axes} number(s) for this table, got {size}")
    for extent in extents:
        check_int("size", extent, at_least=1)
    cells = math.prod(cell_grid(extents, cell))  # type: ignore[arg-type]
    if cells >= 1 << 31:
        raise ValueError(f"cell: expected less than 2^31 cells, got {cells} of {cell}")


@torch.library.register_fake("any2point::_virtual_project")
def _fake(
    centers: Tensor,
    table: Tensor,
    views: Tensor,
    cell: float,
    height: int,
    width: int,
    camera: float,
    wrap: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    clouds, count = centers.shape[:2]
    place = clouds, views.shape[0], count
    position = centers.new_empty(*place, table.dim() - 1)
    encoding = table.new_empty(clouds, count, table.shape[-1])
    return position, encoding, centers.new_empty(place, dtype=torch.int64)


@torch.library.register_fake("any2point::_virtual_corners")
def _corners_fake(
    centers: Tensor,
    views: Tensor,
    table_rows: int,
    table_columns: int,
    height: int,
    width: int,
    camera: float,
    wrap: bool,
) -> tuple[Tensor, Tensor]:
    shape = centers.shape[0] * centers.shape[1], views.shape[0] * (4 if views.dim() == 3 else 2)
    return centers.new_empty(shape), centers.new_empty(shape, dtype=torch.int64)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    centers, table, views, _, *ctx.extent, ctx.camera, ctx.wrap = inputs
    ctx.grid = table.shape[:-1]
    ctx.save_for_backward(centers, views)
    ctx.mark_non_differentiable(output[0], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, _position: Tensor | None, grad: Tensor | None, _cell: Tensor | None) -> Any:
    rest = (None,) * 6
    if grad is None or not ctx.needs_input_grad[1]:
        return None, None, *rest
    centers, views = ctx.saved_tensors
    grid = ctx.grid if len(ctx.grid) == 2 else (0, *ctx.grid)
    weight, corner = torch.ops.any2point._virtual_corners.default(
        centers, views, *grid, *ctx.extent, ctx.camera, ctx.wrap
    )
    # Any number of times differentiable in `grad`, as interpolation is.
    found = torch.ops.any2point._interpolate_features_grad.default(
        grad.flatten(0, 1)[None], corner[None], weight[None], math.prod(ctx.grid)
    )
    return None, found.view(*ctx.grid, grad.shape[-1]), *rest


torch.library.register_autograd("any2point::_virtual_project", _backward, setup_context=_setup)
