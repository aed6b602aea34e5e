"""Draws the pictures of the concept pages into docs/pictures.

python scripts/draw_docs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from any2point import Any2Point, Any2PointConfig, Source
from any2point.data import sample_set
from any2point.viz import projection_picture
from any2point.viz.figure import figure

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
TRAINED, FROZEN, DATA = "#cfe5ff", "#e4e4e4", "#fff3cd"


def box(axes: Any, x: float, y: float, text: str, color: str, size: tuple[float, float] = (2.0, 0.7)) -> None:
    """A box with its centre at x, y."""
    from matplotlib.patches import FancyBboxPatch

    width, height = size
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(
            corner, width, height, "round,pad=0.02,rounding_size=0.08", fc=color, ec="0.35", lw=0.9
        )
    )
    axes.text(x, y, text, ha="center", va="center", fontsize=8)


def arrow(
    axes: Any, start: tuple[float, float], end: tuple[float, float], text: str = "", **style: Any
) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "0.25", "lw": 1, **style})
    if text:
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(middle[0], middle[1] + 0.08, text, ha="center", va="bottom", fontsize=7, color="0.3")


def legend(axes: Any, x: float, y: float) -> None:
    for row, (text, color) in enumerate((("trained", TRAINED), ("frozen", FROZEN), ("data", DATA))):
        box(axes, x, y - 0.4 * row, text, color, (1.0, 0.3))


def model_picture(path: Path) -> None:
    with figure(path, (9, 3.4)) as drawn:
        axes = drawn.add_subplot()
        axes.set(xlim=(-0.3, 12.6), ylim=(-0.7, 2.8))
        axes.set_axis_off()
        axes.set_aspect("equal")
        box(axes, 0.8, 2, "points\n[B, N, 3]", DATA, (1.6, 0.8))
        box(axes, 3.2, 2, "tokenizer\nfarthest points,\nneighbours, 3 stages", TRAINED, (2.3, 1.1))
        box(axes, 6.0, 2, "tokens\n[B, 128, C]", DATA, (1.7, 0.8))
        box(axes, 8.6, 2, "12 frozen blocks\nguided adapter in each", FROZEN, (2.6, 1.1))
        box(axes, 11.4, 2, "head\n[B, classes]", TRAINED, (1.7, 0.8))
        box(axes, 4.6, 0, "virtual projection:\nlines or pictures", FROZEN, (2.4, 0.8))
        box(axes, 7.4, 0, "position table\nof the source", FROZEN, (1.9, 0.8))
        for start, end in (
            ((1.6, 2), (2.0, 2)),
            ((4.4, 2), (5.1, 2)),
            ((6.9, 2), (7.25, 2)),
            ((9.95, 2), (10.5, 2)),
        ):
            arrow(axes, start, end)
        arrow(axes, (3.6, 1.42), (4.2, 0.44), "centres")
        arrow(axes, (6.4, 0), (5.85, 0))
        arrow(axes, (5.1, 0.44), (5.8, 1.56), "encodings")
        arrow(axes, (5.85, 0.3), (7.9, 1.42), "cells")
        legend(axes, 11.4, 0.6)


def guided_picture(path: Path) -> None:
    with figure(path, (9, 4.2)) as drawn:
        axes = drawn.add_subplot()
        axes.set(xlim=(-0.3, 13), ylim=(-2.7, 2.8))
        axes.set_axis_off()
        axes.set_aspect("equal")
        box(axes, 0.8, 2, "tokens x", DATA, (1.5, 0.7))
        box(axes, 3.1, 2, "frozen\nattention", FROZEN, (1.7, 0.9))
        box(axes, 5.5, 2, "frozen\nMLP", FROZEN, (1.5, 0.9))
        box(axes, 7.9, 2, "adapter\nC -> 16 -> C", TRAINED, (1.8, 0.9))
        box(axes, 11.2, 2, "guided\naggregation", TRAINED, (2.0, 0.9))
        for start, end in (
            ((1.55, 2), (2.25, 2)),
            ((3.95, 2), (4.75, 2)),
            ((6.25, 2), (7.0, 2)),
            ((8.8, 2), (10.2, 2)),
        ):
            arrow(axes, start, end)
        arrow(axes, (12.2, 2), (12.9, 2))
        for row, view in enumerate(("view 1", "view 2", "...", "view V")):
            y = 0.7 - 0.72 * row
            axes.text(0.1, y, view, ha="left", va="center", fontsize=8)
            if view == "...":
                continue
            box(axes, 2.3, y, "attention in cells", TRAINED, (2.1, 0.55))
            box(axes, 4.95, y, "mean of the cell", DATA, (2.0, 0.55))
            box(axes, 7.4, y, "BN, GELU: g", TRAINED, (1.7, 0.55))
            arrow(axes, (3.35, y), (3.95, y))
            arrow(axes, (5.95, y), (6.55, y))
            arrow(axes, (8.25, y), (9.35, 0.1 - 0.12 * row))
        box(axes, 4.95, -2.3, "max + mean of the voxel in space", DATA, (3.9, 0.45))
        box(axes, 8.2, -2.3, "BN, GELU: s", TRAINED, (1.7, 0.45))
        arrow(axes, (6.9, -2.3), (7.35, -2.3))
        arrow(axes, (8.8, -2.07), (10.0, -0.65))
        box(axes, 10.8, -0.1, "blend of the g by\nw = (cos(g, s) + 1)/2", DATA, (2.9, 1.0))
        arrow(axes, (11.2, 0.42), (11.2, 1.52))
        legend(axes, 11.9, -1.5)


def projections() -> None:
    torch.manual_seed(0)
    data = sample_set("test")
    chair = data.points[int((data.labels == data.class_names.index("chair")).nonzero()[0])][:600]
    for kind, family in (("line", "clip-text"), ("image", "dinov2")):
        source = Source.random(family, width=64, depth=1)
        model = Any2Point(Any2PointConfig(num_points=600, num_tokens=128, neighbors=16), source)
        title = {"line": "onto lines", "image": "onto pictures"}[kind]
        projection_picture(model, chair, PICTURES / f"projection_{kind}.svg", f"Virtual projection {title}")


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    model_picture(PICTURES / "model.svg")
    guided_picture(PICTURES / "guided_adapter.svg")
    projections()


if __name__ == "__main__":
    main()
