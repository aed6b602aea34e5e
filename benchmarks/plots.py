"""Draws the pictures of docs/benchmarks.md from benchmarks/results.

python -m benchmarks.plots
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from any2point.bench.run import OPS
from any2point.bench.step_report import step_picture
from any2point.bench.table import Row, best_peer, by_case, is_ours, peer_name, read_rows
from any2point.viz.figure import figure
from benchmarks import plot_farthest_point_curves
from benchmarks.readme import RESULTS, ROOT, STAGES, ratio_text

PICTURES = ROOT / "docs" / "pictures"
MACHINES = {"h200": "NVIDIA H200", "epyc-zen5": "One thread of an AMD EPYC"}
_OPS = list(OPS)
MARKS: dict[str, dict[str, Any]] = {
    "forward": {"color": "C0", "zorder": 3},
    "forward+backward": {"facecolor": "white", "edgecolor": "C0", "zorder": 2},
}
# The same provider in the same colour everywhere.
COLORS = {
    name: f"C{number}"
    for number, names in enumerate(
        [
            ["any2point"],
            ["torch", "torch loop", "torch cdist+topk", "torch index"],
            ["pointnet2_ops", "fpsample kdline h=3", "pykdtree leaf=32"],
            ["pytorch3d", "fpsample kdline h=5", "pykdtree"],
            ["pointops", "fpsample kdline h=7", "scipy cKDTree"],
            ["torch_fps", "fpsample kdline h=9", "scikit-learn KDTree"],
            ["torch_cluster", "torch gather"],
            ["pyg-lib"],
            ["torch_quickfps"],
            ["torch_quickfps baseline"],
        ]
    )
    for name in names
} | {"any2point, in a graph": "#8fc1ea"}


def rows_of(name: str) -> list[Row]:
    """Rows of a file, none if there is no such file."""
    path = RESULTS / f"{name}.csv"
    return read_rows(path) if path.exists() else []


def speedups(machine: str, path: Path) -> None:
    """How many times faster than the best peer: a line per op and shape, forward and with backward."""
    ratios: dict[tuple[str, str], dict[str, tuple[float, str]]] = {}
    for (op, shape, mode, *_), group in by_case(rows_of(machine)).items():
        kind, *rest = mode.split(", ")
        own = [row for row in group if row.provider == "any2point"]
        best = min(own, key=lambda row: row.p50_us, default=None)
        peer = best_peer(best, group) if best else None
        if best and peer and kind in MARKS and rest in ([], ["CPU time"]):  # not by more threads
            ratios.setdefault((op, shape), {})[kind] = (peer.p50_us / best.p50_us, peer_name(peer))
    lines = sorted(
        ratios.items(), key=lambda item: _OPS.index(item[0][0]) if item[0][0] in _OPS else len(_OPS)
    )
    with figure(path, (9, 0.21 * len(lines) + 1.1)) as drawn:
        axes = drawn.add_subplot()
        before = ""
        for place, ((op, _), found) in enumerate(lines):
            for kind, (ratio, _) in found.items():
                axes.hlines(place, 1, ratio, color="0.8", linewidth=1, zorder=1)
                axes.scatter(ratio, place, s=26, **MARKS[kind])
            text = ", ".join(dict.fromkeys(ratio_text(ratio) for ratio, _ in found.values()))
            names = ", ".join(dict.fromkeys(name for _, name in found.values()))
            furthest = max(ratio for ratio, _ in found.values())
            axes.text(furthest * 1.15, place, f"{text}  {names}", va="center", fontsize=7)
            if op != before:
                axes.axhline(place - 0.5, color="0.9", linewidth=0.8, zorder=0)
            before = op
        _line_names(axes, [key for key, _ in lines])
        axes.axvline(1, color="k", linewidth=0.8)
        most = max((ratio for _, found in lines for ratio, _ in found.values()), default=1)
        axes.set(
            xscale="log",
            title=f"{MACHINES[machine]}: times faster than the best other",
            xlim=(0.5, most * 12),
        )
        axes.xaxis.set_major_formatter(_plain)
        for kind, mark in MARKS.items():
            axes.scatter([], [], s=26, label=kind, **mark)
        axes.legend(fontsize=8, loc="lower right")
        drawn.tight_layout()


def size_text(op: str, shape: str) -> str:
    """A shape for people, of the ops whose shapes are bare numbers."""
    numbers = shape.split(",")
    if op in ("farthest_point_sample", "farthest_point_hierarchy") and len(numbers) == 3:
        return f"{numbers[0]} x {numbers[1]} -> {numbers[2].replace('+', ', ')}"
    if op == "knn" and len(numbers) == 4 and " " not in shape:
        return f"{numbers[0]} x {numbers[1]} of {numbers[2]}, k={numbers[3]}"
    return shape.replace("three stages of the tokenizer, k=81", "tokenizer")


def _line_names(axes: Any, keys: Sequence[tuple[str, str]]) -> None:
    """The op where it changes, in bold, and the size in every line; the first line on top."""
    axes.set_yticks(range(len(keys)), [size_text(*key) for key in keys], fontsize=7)
    for place, (op, _) in enumerate(keys):
        if place == 0 or keys[place - 1][0] != op:
            axes.annotate(
                op, (0, place), (-225, 0), ("axes fraction", "data"), "offset points",
                va="center", fontsize=8, fontweight="bold",
            )  # fmt: skip
    axes.set_ylim(len(keys) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)


def _plain(value: float, _: int) -> str:
    """1, 10, 100 instead of powers."""
    return f"{value:,g}" if value < 1e6 else f"{value / 1e6:g}M"


def scaling(machine: str, path: Path) -> None:
    """Times over the number of points of one cloud, and over the number of clouds."""
    from matplotlib.ticker import LogLocator

    rows = rows_of(f"{machine}_scaling")
    panels: list[tuple[str, str, bool]] = [
        ("farthest_point_sample", "a quarter of N points picked", False),
        ("knn", "16 nearest of each of N points", False),
        ("eval step", "evaluation of B clouds of 1024 points", True),
        ("farthest_point_sample", "512 of 1024 points picked, B clouds", True),
        ("knn", "32 nearest of 1024 for 512, B clouds", True),
        ("group", "512 x 32 of 1024 rows of 96, B clouds", True),
    ]
    curves = [(panel, _curves([row for row in rows if row.op == panel[0]], panel[2])) for panel in panels]
    curves = [each for each in curves if each[1]]
    across = (len(curves) + 1) // 2
    with figure(path, (3.7 * across, 7.4)) as drawn:
        cells = drawn.subplots(2, across, squeeze=False).flatten()
        for axes in cells[len(curves) :]:
            axes.set_axis_off()
        for axes, ((op, what, batches), found) in zip(cells, curves):
            for name, points in found.items():
                ours = name.startswith("any2point")
                style = {"linewidth": 2.2, "zorder": 3} if ours else {"linewidth": 1, "linestyle": "--"}
                color = COLORS.get(name, "0.6")
                axes.plot(*zip(*points), marker="o", markersize=3, label=name, color=color, **style)
            axes.set(xscale="log", yscale="log", xlabel="clouds B" if batches else "points N", ylabel="ms")
            axes.set_title(f"{op}\n{what}", fontsize=9)
            axes.grid(alpha=0.3)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(_plain)
            low, high = axes.get_ylim()
            if high < 100 * low:  # few powers of ten
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            if batches:
                axes.set_xticks([number for number, _ in found["any2point"]])
                axes.minorticks_off()
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=2, frameon=False)
        drawn.suptitle(MACHINES[machine], fontsize=10)
        drawn.tight_layout()


def _numbers(shape: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", shape)]


def _curves(rows: Sequence[Row], batches: bool) -> dict[str, list[tuple[int, float]]]:
    """(clouds or points, ms) of each provider: ours, then the fastest of those measured at most sizes."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name, (clouds, points, *rest) = row.provider, _numbers(row.shape)
        # Clouds of 1024 points of which 512 are picked or asked about.
        is_batch = row.op in ("group", "eval step") or {512, 1024} == {points, *rest[:1]}
        if row.mode.endswith("graph"):
            if name != "any2point":
                continue
            name = "any2point, in a graph"
        if is_batch == batches and name != "any2point unsorted":
            curves.setdefault(name, []).append((clouds if batches else points, row.p50_us / 1e3))

    def rank(name: str) -> tuple[bool, int, float]:
        return not name.startswith("any2point"), -len(curves[name]), sum(time for _, time in curves[name])

    longest = [name for name in sorted(curves, key=rank) if len(curves[name]) > 1]
    return {name: sorted(curves[name]) for name in longest[:10]}


def memory(path: Path) -> None:
    """Peak memory that a call adds: ours, and the leanest and the largest of the others."""
    bars: list[tuple[tuple[str, str], float, float, float]] = []
    for (op, shape, mode, *_), group in by_case(rows_of("h200")).items():
        plain = [row for row in group if row.mem_mb is not None and not row.mode.endswith("graph")]
        own = [row.mem_mb or 0 for row in plain if row.provider == "any2point"]
        others = [row.mem_mb or 0 for row in plain if not is_ours(row)]
        if own and others and max(others) >= 1 and mode in MARKS:
            what = shape + (", with backward" if mode != "forward" else "")
            bars.append(((op, what), own[0], min(others), max(others)))
    bars.sort(key=lambda bar: _OPS.index(bar[0][0]) if bar[0][0] in _OPS else len(_OPS))
    with figure(path, (9, 0.21 * len(bars) + 1.3)) as drawn:
        axes = drawn.add_subplot()
        place = range(len(bars))
        least = 0.05
        axes.hlines(place, [max(bar[2], least) for bar in bars], [bar[3] for bar in bars], color="0.7")
        axes.scatter([max(bar[2], least) for bar in bars], place, s=14, color="0.6", label="leanest other")
        axes.scatter([bar[3] for bar in bars], place, s=14, color="0.3", label="largest other")
        axes.scatter(
            [max(bar[1], least) for bar in bars], place, s=26, color="C0", label="any2point", zorder=3
        )
        _line_names(axes, [bar[0] for bar in bars])
        axes.set(
            xscale="log", xlabel="MB at the peak of a call", title="NVIDIA H200: memory that a call adds"
        )
        axes.xaxis.set_major_formatter(_plain)
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(alpha=0.3, axis="x")
        drawn.tight_layout()


def stages(path: Path) -> None:
    """Local aggregation, every stage and all: times in both modes with their floors, memory of training."""
    rows = [row for row in rows_of("h200") if row.op == "local_aggregate"]
    shapes = [f"{shape} float16" for shape in STAGES.values()]
    providers = ["torch", "torch.compile", "any2point"]
    panels = [
        ("evaluation, ms", "forward", False),
        ("training, forward and backward, ms", "forward+backward", False),
        ("training, MB at the peak", "forward+backward", True),
    ]
    with figure(path, (11, 3.2)) as drawn:
        for axes, (title, mode, is_memory) in zip(drawn.subplots(1, 3, sharey=True), panels):
            for number, provider in enumerate(providers):
                for place, shape in enumerate(shapes):
                    same = [row for row in rows if (row.shape, row.provider) == (shape, provider)]
                    same = [row for row in same if row.mode.removesuffix(" graph") == mode]
                    if not same:
                        continue
                    best = min(same, key=lambda row: row.p50_us)
                    value = (best.mem_mb or 0) if is_memory else best.p50_us / 1e3
                    at = place + 0.27 * (number - 1)
                    axes.barh(at, value, 0.25, color=COLORS.get(provider, "0.6"), label=provider)
                    axes.text(
                        value * 1.08,
                        at,
                        f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}",
                        va="center",
                        fontsize=7,
                    )
                    if provider == "any2point" and not is_memory:
                        axes.plot([best.floor_us / 1e3] * 2, [at - 0.13, at + 0.13], "k", label="floor")
            axes.set(xscale="log", title=title)
            axes.title.set_fontsize(9)
            axes.margins(x=0.15)
            axes.xaxis.set_major_formatter(_plain)
            axes.set_yticks(range(len(shapes)), STAGES)
        axes.invert_yaxis()
        handles = {
            label: handle for each in drawn.axes for handle, label in zip(*each.get_legend_handles_labels())
        }
        drawn.legend(handles.values(), handles, loc="lower center", ncol=4, fontsize=8, frameon=False)
        drawn.tight_layout(rect=(0, 0.07, 1, 1))


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    memory(PICTURES / "memory.svg")
    stages(PICTURES / "local_aggregate_h200.svg")
    for machine in MACHINES:
        speedups(machine, PICTURES / f"speedups_{machine}.svg")
        scaling(machine, PICTURES / f"scaling_{machine}.svg")
        # One model in one precision: the first that was measured.
        parts = [row for row in rows_of(f"{machine}_step") if ": " in row.mode]
        if first := next(iter(parts), None):
            source = first.shape.split()[0]
            same = [row for row in parts if row.shape.split()[0] == source and row.dtype == first.dtype]
            step_picture(same, PICTURES / f"step_{machine}.svg")
    plot_farthest_point_curves.main()


if __name__ == "__main__":
    main()
