"""Draws the pictures of docs/benchmarks.md from benchmarks/results.

python -m benchmarks.plots
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from any2point.bench.step_report import step_picture
from any2point.bench.table import Row, best_peer, by_case, is_ours, read_rows
from any2point.viz.figure import figure
from benchmarks import plot_farthest_point_curves
from benchmarks.readme import RESULTS, ROOT

PICTURES = ROOT / "docs" / "pictures"
MACHINES = {"h200": "NVIDIA H200", "epyc-zen5": "one thread of an AMD EPYC"}


def rows_of(name: str) -> list[Row]:
    """Rows of a file, none if there is no such file."""
    path = RESULTS / f"{name}.csv"
    return read_rows(path) if path.exists() else []


def speedups(path: Path) -> None:
    """How many times faster than the best peer, for every op and shape that has one."""
    panels: dict[str, list[tuple[str, float, str]]] = {}
    for name, title in MACHINES.items():
        bars = []
        for (op, shape, mode, *_), group in by_case(rows_of(name)).items():
            own = [row for row in group if row.provider == "any2point"]
            best = min(own, key=lambda row: row.p50_us, default=None)
            peer = best_peer(best, group) if best else None
            if best and peer:
                label = f"{op} {shape[:34]}" + ("" if mode.startswith("forward, ") else f" {mode}")
                bars.append((label.removesuffix(" forward"), peer.p50_us / best.p50_us, peer.provider))
        panels[title] = bars
    height = 0.2 * sum(len(bars) for bars in panels.values()) + 1.6
    with figure(path, (9, height)) as drawn:
        grid = drawn.add_gridspec(len(panels), 1, height_ratios=[len(bars) + 2 for bars in panels.values()])
        for cell, (title, bars) in zip(grid, panels.items()):
            axes = drawn.add_subplot(cell)
            axes.barh([bar[0] for bar in bars], [bar[1] for bar in bars], color="C0", height=0.7)
            for place, (_, ratio, name) in enumerate(bars):
                axes.text(ratio * 1.04, place, f"{ratio:.3g}x  {name}", va="center", fontsize=6.5)
            axes.axvline(1, color="k", linewidth=0.8)
            axes.set(xscale="log", title=f"{title}: times faster than the best peer")
            axes.set_xlim(0.5, max((bar[1] for bar in bars), default=1) * 8)
            axes.tick_params(axis="y", labelsize=6.5)
            axes.invert_yaxis()
        drawn.tight_layout()


def scaling(path: Path) -> None:
    """Time over the number of points of one cloud, and over the number of clouds."""
    ops = {"farthest_point_sample": "a quarter of N picked", "knn": "16 nearest of every point"}
    with figure(path, (9, 6.4)) as drawn:
        panels = drawn.subplots(2, 2)
        for line, (op, what) in enumerate(ops.items()):
            for machine, title in MACHINES.items():
                rows = [row for row in rows_of(f"{machine}_scaling") if row.op == op]
                _lines(panels[line][0], rows, title, lambda shape: not _is_batch(shape))
                _lines(panels[line][1], rows, title, _is_batch)
            panels[line][0].set(xlabel="points N", ylabel="us", title=f"{op}, one cloud: {what}")
            panels[line][1].set(xlabel="clouds B", ylabel="us", title=f"{op}, B clouds of 1024 points")
            for axes in panels[line]:
                axes.set(xscale="log", yscale="log")
                axes.grid(alpha=0.3)
                if axes.lines:
                    axes.legend(fontsize=6.5)
        drawn.tight_layout()


def _is_batch(shape: tuple[int, ...]) -> bool:
    """Clouds of 1024 points of which 512 are picked, or asked about."""
    return {512, 1024} == set(shape[1:3])


def _lines(axes: Any, rows: Sequence[Row], title: str, chosen: Any) -> None:
    """A curve per provider, ours thick; along the first number of a shape that varies."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        shape = tuple(int(part) for part in row.shape.split(","))
        if not chosen(shape) or row.mode.endswith("graph"):
            continue
        along = shape[0] if _is_batch(shape) else shape[1]
        curves.setdefault(row.provider, []).append((along, row.p50_us))

    def rank(name: str) -> tuple[bool, int, float]:
        """Ours, then those that were measured at most sizes, the fastest first."""
        return name != "any2point", -len(curves[name]), sum(time for _, time in curves[name])

    best = sorted(curves, key=rank)
    for name in [name for name in best if name != "any2point unsorted"][:3]:
        points = sorted(curves[name])
        style = {"linewidth": 2.2} if name == "any2point" else {"linewidth": 1, "linestyle": "--"}
        axes.plot(*zip(*points), marker="o", markersize=3, label=f"{name}, {title}", **style)


def memory(path: Path) -> None:
    """Peak memory that a call adds: ours, and the leanest and the largest of the others."""
    bars = []
    for (op, shape, mode, *_), group in by_case(rows_of("h200")).items():
        plain = [row for row in group if row.mem_mb is not None and not row.mode.endswith("graph")]
        own = [row.mem_mb or 0 for row in plain if row.provider == "any2point"]
        others = [row.mem_mb or 0 for row in plain if not is_ours(row)]
        if own and others and max(others) >= 1:
            bars.append((f"{op} {shape} {mode}".removesuffix(" forward"), own[0], min(others), max(others)))
    with figure(path, (9, 0.24 * len(bars) + 1.2)) as drawn:
        axes = drawn.add_subplot()
        place = range(len(bars))
        least = 0.05
        axes.hlines(place, [max(bar[2], least) for bar in bars], [bar[3] for bar in bars], color="0.6")
        axes.scatter([max(bar[2], least) for bar in bars], place, s=14, color="0.6", label="leanest other")
        axes.scatter([bar[3] for bar in bars], place, s=14, color="0.3", label="largest other")
        axes.scatter([max(bar[1], least) for bar in bars], place, s=26, color="C0", label="any2point")
        axes.set_yticks(place, [bar[0] for bar in bars], fontsize=6.5)
        axes.set(xscale="log", xlabel="MB at the peak of a call", title="Memory, NVIDIA H200")
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        axes.invert_yaxis()
        drawn.tight_layout()


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    speedups(PICTURES / "speedups.svg")
    scaling(PICTURES / "scaling.svg")
    memory(PICTURES / "memory.svg")
    for machine in MACHINES:
        if rows := [row for row in rows_of(f"{machine}_step") if ": " in row.mode]:
            step_picture(rows, PICTURES / f"step_{machine}.svg")
    plot_farthest_point_curves.main()


if __name__ == "__main__":
    main()
