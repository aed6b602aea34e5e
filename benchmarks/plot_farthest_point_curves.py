"""Draws docs/fps.svg from benchmarks/results/h200_fps.csv and h200.csv.

python benchmarks/plot_farthest_point_curves.py
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def curve(axes: Axes, measured: list[dict[str, str]], column: str) -> None:
    measured.sort(key=lambda row: int(row[column]))
    sizes, times = [int(row[column]) for row in measured], [float(row["p50_us"]) for row in measured]
    axes.plot(sizes, times, "o-", label="any2point")


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "any2point", "svg.fonttype": "none"})
    ours = [row for row in rows("h200_fps.csv") if row["cloud"] == "ball" and row["batch"] == "1"]
    figure, (by_size, by_samples) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    quarter = [row for row in ours if int(row["samples"]) == int(row["points"]) // 4]
    curve(by_size, quarter, "points")
    peers = {"pointops", "pointnet2_ops", "pytorch3d", "torch_fps"}
    for row in rows("h200.csv"):
        if row["op"] != "farthest_point_sample" or row["mode"] != "forward" or row["provider"] not in peers:
            continue
        batch, n, m = (int(part) for part in row["shape"].split(","))
        if batch == 1:
            by_size.plot(n, float(row["p50_us"]), "x", label=f"{row['provider']}, {m:,} picks")
    by_size.set(xscale="log", yscale="log", xlabel="points N (a quarter of them picked)", ylabel="µs a cloud")
    curve(by_samples, [row for row in ours if row["points"] == "100000"], "samples")
    by_samples.set(xscale="log", xlabel="picks M of 100,000 points")
    for axes in (by_size, by_samples):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "fps.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
