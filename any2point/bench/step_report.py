"""`any2point bench step`: rows, the table in the terminal and the picture of a step's profile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from any2point import Any2Point, Any2PointConfig, ops, reference
from any2point.bench import peers
from any2point.bench.costs import cloud
from any2point.bench.step import Profile, Step, profile_step
from any2point.bench.step_floor import floors
from any2point.bench.table import Reporter, Row, time_text
from any2point.bench.timing import Settings, interleave, machine_of
from any2point.train.recipe import open_source

WHOLE = "whole step"
BATCHES = {"cpu": [1, 2, 4, 8, 16], "cuda": [1, 2, 4, 8, 16, 32, 64, 128]}  # of `--scaling`


@dataclass(frozen=True)
class Choice:
    """What is measured.

    Attributes:
        source: as in `any2point train --source`.
        batch: clouds of a training step and of an evaluation for throughput; latency is that of one cloud.
        points: per cloud.
        precision: "fp32", "tf32", "bf16" or "fp16".
        against_torch: also measure the model with every op composed of torch ops.
    """

    source: str = "random:clip-text"
    batch: int = 32
    points: int = 1024
    precision: str = "fp32"
    against_torch: bool = False


def measure_step(choice: Choice, device: str, settings: Settings, say: Reporter) -> list[Row]:
    """Rows of the training step, the evaluation of a batch, and that of one cloud."""
    model = _model(choice, device)
    rows: list[Row] = []
    for training, batch in ((True, choice.batch), (False, choice.batch), (False, 1)):
        step = _step(model, choice, batch, training)
        found = profile_step(step, settings)
        new = _rows(step, found, choice, device)
        if choice.against_torch and device == "cpu" and batch > 1:
            new.append(_composed(step, new[0], settings))
        say(step_table(new))
        if found.note:
            say(f"no graph: {found.note}")
        rows += new
    return rows


def measure_batches(choice: Choice, device: str, settings: Settings, say: Reporter) -> list[Row]:
    """Rows of whole evaluation steps of 1, 2, 4, ... clouds, up to 16 on a CPU and 128 on a GPU."""
    model = _model(choice, device)
    rows: list[Row] = []
    for batch in BATCHES[device]:
        step = _step(model, choice, batch, False)
        new = _rows(step, profile_step(step, settings, parts=False), choice, device)
        for row in new:
            rate = f"{batch * 1e6 / row.p50_us:,.0f} clouds/s, floor {time_text(row.floor_us)}"
            say(f"{row.op}, {row.shape}, {row.mode:<17} {time_text(row.p50_us):>10} {rate}")
        rows += new
    return rows


def _model(choice: Choice, device: str) -> Any2Point:
    torch.manual_seed(0)
    source = open_source(choice.source, {}, 0, None)
    config = Any2PointConfig(num_points=choice.points, neighbors=81)
    return Any2Point(config, source).to(device)


def _step(model: Any2Point, choice: Choice, batch: int, training: bool) -> Step:
    points = torch.from_numpy(cloud("surface", batch, choice.points))
    return Step(model, points.to(next(model.parameters()).device), choice.precision, training)


def _rows(step: Step, found: Profile, choice: Choice, device: str) -> list[Row]:
    op = "train step" if step.training else "eval step"
    machine = machine_of(device)
    batch, points = step.points.shape[:2]
    shape = f"{choice.source.removeprefix('random:')} {batch},{points}"
    least = floors(step, machine)
    total = sum(sum(both) for both in least.values())

    def row(mode: str, times: Sequence[float], floor: float, launches: int | None) -> Row:
        made = Row(op, "any2point", shape, mode, choice.precision, floor_us=floor, launches=launches)
        made.mem_mb = found.memory if mode.startswith(WHOLE) else None
        return made.times(times).place(machine)

    launches = found.launches or None
    rows = [row(WHOLE, found.eager, total, launches)]
    if found.graph is not None:
        rows.append(row(f"{WHOLE} graph", found.graph, total, None))
    for name, part in found.parts.items():
        forward, backward = least[name]
        if part.forward or forward:
            rows.append(row(f"{name}: forward", [part.forward], forward, part.launches or None))
        if part.backward:
            rows.append(row(f"{name}: backward", [part.backward], backward, None))
    return rows


def _composed(step: Step, ours: Row, settings: Settings) -> Row:
    """The same step with every op composed of torch ops, in turn with ours."""

    def composed() -> None:
        with composed_ops():
            step()

    # Both change the weights a little, and neither depends on them in what it takes.
    times = interleave({"any2point": step, "torch": composed}, rounds=3, clock=settings.clock)
    ours.times([1e6 * each for each in times["any2point"]])
    row = Row(ours.op, "torch", ours.shape, ours.mode, ours.dtype, floor_us=ours.floor_us)
    return row.times([1e6 * each for each in times["torch"]]).place(machine_of(step.points.device.type))


@contextlib.contextmanager
def composed_ops() -> Iterator[None]:
    """Models made of torch ops alone, while inside: the specification (with indexing and scatters for its
    primitives), and a loop over farthest points."""

    def hierarchy(points: Any, sizes: Any, start: Any, **_: Any) -> Any:
        levels = peers.torch_farthest_points(points, sizes[0], start)
        return [levels[:, :size] for size in sizes]

    def knn(query: Any, points: Any, k: int, **_: Any) -> Any:
        return ops.KNN(*peers.torch_knn(query, points, k))

    def guided(*args: Any, plan: Any, **options: Any) -> Any:
        return peers.torch_guided_aggregate(*args, **options)

    def voxels(points: Any, size: float) -> Any:
        return ops.VoxelCluster(*reference.voxel_cluster(points, size))

    replaced: dict[str, dict[str, Any]] = {
        "any2point.nn.tokenizer": {
            "farthest_point_hierarchy": hierarchy,
            "knn": knn,
            "local_aggregate": peers.torch_local_aggregate,
            "group": peers.torch_group,
        },
        "any2point.nn.projection": {"virtual_project": peers.torch_virtual_project},
        "any2point.nn.adapter": {"guided_aggregate": guided},
        "any2point.models.any2point": {"voxel_cluster": voxels, "group": peers.torch_group},
    }
    with contextlib.ExitStack() as stack:
        for module, functions in replaced.items():
            for name, function in functions.items():
                stack.enter_context(mock.patch(f"{module}.{name}", function))
        yield


def step_table(rows: Sequence[Row]) -> str:
    """The profile of one step as a table."""
    whole = [row for row in rows if row.mode.startswith(WHOLE)]
    first = whole[0]
    parts: dict[str, dict[str, Row]] = {}
    for row in rows:
        if not row.mode.startswith(WHOLE):
            name, _, direction = row.mode.rpartition(": ")
            parts.setdefault(name, {})[direction] = row
    lines = [f"{first.op}, {first.shape}, {first.dtype}, {first.device}"]
    lines.append(f"{'part':<22} {'forward':>10} {'backward':>10} {'share':>6} {'floor':>10} {'launches':>9}")
    total = sum(row.p50_us for each in parts.values() for row in each.values()) or 1.0
    for name, each in parts.items():
        times = {direction: row.p50_us for direction, row in each.items()}
        share = sum(times.values()) / total
        if share < 1e-4:
            continue
        cells = [time_text(times[d]) if times.get(d) else "" for d in ("forward", "backward")]
        floor = sum(row.floor_us for row in each.values())
        launches = sum(row.launches or 0 for row in each.values())
        lines.append(
            f"{name:<22} {cells[0]:>10} {cells[1]:>10} {100 * share:>5.1f}% "
            f"{time_text(floor) if floor else '':>10} {launches or '':>9}"
        )
    lines.append(f"{'sum of the parts':<22} {time_text(total):>10}")
    clouds = int(first.shape.rsplit(" ", 1)[-1].split(",")[0])
    for row in whole:
        rate = f"{clouds * 1e6 / row.p50_us:,.0f} clouds/s"
        extra = f", {row.launches} launches" if row.launches else ""
        extra += f", {row.mem_mb:,.0f} MB" if row.mem_mb else ""
        name = row.mode if row.provider == "any2point" else f"{row.mode} [{row.provider}]"
        lines.append(f"{name:<22} {time_text(row.p50_us):>10} {rate}, floor {time_text(row.floor_us)}{extra}")
    return "\n".join(lines) + "\n"


def step_picture(rows: Sequence[Row], path: str | Path) -> None:
    """Draw what the parts of a step take, beside their floors; a PNG or SVG file.

    Args:
        rows: of `measure_step`, of one step or several, which are drawn side by side.
        path: file to write.
    """
    from any2point.viz.figure import figure

    steps: dict[tuple[str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        if row.provider == "any2point" and not row.mode.startswith(WHOLE):
            parts = steps.setdefault((row.op, row.shape, row.dtype), {})
            parts.setdefault(row.mode.rpartition(": ")[0], []).append(row)
    with figure(path, (4.4 * max(1, len(steps)), 4.2)) as drawn:
        panels = drawn.subplots(1, len(steps), squeeze=False)[0]
        for axes, ((op, shape, dtype), parts) in zip(panels, steps.items()):
            axes.set(xlabel="ms", title=f"{op}, {shape}, {dtype}")
            _draw_parts(axes, parts)
        drawn.tight_layout()


def _draw_parts(axes: Any, parts: dict[str, list[Row]]) -> None:
    names = [name for name, each in parts.items() if sum(row.p50_us for row in each) > 0]
    start = [0.0] * len(names)
    for direction, color in (("forward", "C0"), ("backward", "C1")):
        rows = [[row for row in parts[name] if row.mode.endswith(direction)] for name in names]
        length = [sum(row.p50_us for row in each) / 1e3 for each in rows]
        if any(length):
            axes.barh(names, length, left=start, color=color, label=direction)
        start = [a + b for a, b in zip(start, length)]
    floor = [sum(row.floor_us for row in parts[name]) / 1e3 for name in names]
    axes.plot(floor, range(len(names)), "k|", markersize=9, label="floor")
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="lower right")
