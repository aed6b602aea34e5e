"""The virtual projection: where the tokens of a cloud land in the source modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from any2point.viz.figure import figure

_TOP = "viridis"


@torch.no_grad()
def projection_picture(
    model: Any, points: Tensor, path: str | Path, title: str = "Virtual projection"
) -> None:
    """Draw a cloud, its token centres, and their positions in every view.

    Lines (language, audio): each view is a line through the cloud; a token's place along it is the position
    in the sequence whose encoding it receives. Images: each view is a picture plane with its cells. A token
    keeps its colour in all views.

    Args:
        model: an `Any2Point`.
        points: [N, 3] float32, y up; or [N, 3 + F] with the features that the model takes.
        path: PNG file to write.
        title: above the picture.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    features = points[None, :, 3:].to(device) if model.config.input_features else None
    centers = model.encode(points[None, :, :3].to(device), features).centers
    projected = model.projection(centers)
    model.train(training)
    position = projected.position[0].cpu().numpy()  # [V, T, 1 or 2]
    views = model.projection.views.cpu().numpy()
    size, cell = tuple(model.projection.size), float(model.projection.cell)
    center = centers[0].cpu().numpy()
    shade = center[:, 1]  # colour by height
    lines = position.shape[-1] == 1
    count = len(position)
    with figure(path, (11, 4.6)) as drawn:
        drawn.suptitle(title)
        grid = drawn.add_gridspec(1, 2, width_ratios=(1, 1.5), wspace=0.08)
        _draw_cloud(
            drawn.add_subplot(grid[0], projection="3d"), points.cpu().numpy(), center, shade, views, lines
        )
        if lines:
            _draw_lines(drawn.add_subplot(grid[1]), position[..., 0], shade, size[0], cell)
            return
        columns = int(np.ceil(count / 2))
        inner = grid[1].subgridspec(2, columns, wspace=0.1, hspace=0.25)
        for view in range(count):
            axes = drawn.add_subplot(inner[view // columns, view % columns])
            _draw_image(axes, position[view], shade, size, cell, f"view {view + 1}")


def _draw_cloud(
    axes: Any, points: np.ndarray, center: np.ndarray, shade: np.ndarray, views: Any, lines: bool
) -> None:
    # matplotlib's third axis is up, the data's second: x, z, y, with z towards the viewer.
    place = lambda p: (p[..., 0], -p[..., 2], p[..., 1])  # noqa: E731
    axes.scatter(*place(points), s=2.5, color="0.75", linewidths=0, depthshade=False)
    axes.scatter(*place(center), s=16, c=shade, cmap=_TOP, linewidths=0, depthshade=False)
    if lines:
        middle = (center.min(axis=0) + center.max(axis=0)) / 2
        reach = np.abs(center - middle).max() * 1.25
        for number, direction in enumerate(views / np.linalg.norm(views, axis=1, keepdims=True)):
            ends = middle + np.outer([-reach, reach], direction)
            axes.plot(*place(ends), color=f"C{number % 10}", linewidth=1)
            axes.text(*place(ends[1] + 0.06 * reach * direction), str(number + 1), color=f"C{number % 10}")
    axes.set_aspect("equal")
    axes.view_init(elev=18, azim=-60)
    axes.set_axis_off()
    axes.set_title(f"{len(points)} points, {len(center)} tokens")


def _draw_lines(axes: Any, position: np.ndarray, shade: np.ndarray, length: int, cell: float) -> None:
    for view, along in enumerate(position):
        axes.hlines(view + 1, 0, length - 1, color=f"C{view % 10}", linewidth=1)
        # Tokens that share a place are stacked upwards, below the next line.
        bins = np.floor(along * (110 / length))
        rank = np.zeros(len(along))
        for place in np.unique(bins):
            (here,) = np.nonzero(bins == place)
            rank[here[np.argsort(along[here])]] = np.arange(len(here))
        step = min(0.07, 0.8 / max(rank.max(), 1))
        axes.scatter(along, view + 1 - step * rank, s=10, c=shade, cmap=_TOP, linewidths=0, zorder=3)
    axes.set(xlim=(-length * 0.02, length * 1.02), ylim=(len(position) + 0.5, 0.3))
    axes.set(xlabel=f"position in the source's sequence of {length} (cells of {cell:.3g})", ylabel="line")
    axes.set_yticks(range(1, len(position) + 1))
    axes.spines["left"].set_visible(False)
    axes.set_title("positions whose encodings the tokens receive")


def _draw_image(axes: Any, place: np.ndarray, shade: np.ndarray, size: Any, cell: float, title: str) -> None:
    height, width = size
    axes.set_xticks(np.arange(0, width, cell), minor=True)
    axes.set_yticks(np.arange(0, height, cell), minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.5)
    axes.scatter(place[:, 0], place[:, 1], s=9, c=shade, cmap=_TOP, linewidths=0, zorder=3)
    axes.set(xlim=(0, width - 1), ylim=(height - 1, 0), title=title, xticks=[], yticks=[])
    axes.set_aspect("equal")
