"""Every CUDA kernel once or more, on odd sizes, checked against the CPU: small enough for compute-sanitizer.

compute-sanitizer --tool memcheck  --error-exitcode 1 python scripts/sanitize.py
    (racecheck, initcheck and synccheck likewise; an argument leaves only the cases whose name starts with it)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from any2point import ops
from any2point.nn import spread_lines, spread_rotations


def compare(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """One call on the CPU and one on CUDA: equal integers, floats equal to rounding; then its gradient."""
    if not name.startswith(tuple(sys.argv[1:]) or ""):
        return

    def move(value: Any, device: str) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(device).requires_grad_(value.requires_grad)

    results = []
    for device in ("cpu", "cuda"):
        moved = [move(a, device) for a in arguments]
        given = {key: move(value, device) for key, value in options.items()}
        out = [x for x in tree_flatten(function(*moved, **given))[0] if isinstance(x, Tensor)]
        leaves = [a for a in moved if isinstance(a, Tensor) and a.requires_grad]
        if leaves:
            graded = [x for x in out if x.requires_grad]
            total = sum(torch.where(x.isfinite(), x, 0.0).float().square().sum() for x in graded)
            out += torch.autograd.grad(total, leaves)  # type: ignore[arg-type]
        results.append([x.detach().cpu() for x in out])
    for cpu, cuda in zip(*results, strict=True):
        exact = not cpu.is_floating_point()
        low = cpu.dtype in (torch.float16, torch.bfloat16)
        size = 0.0 if exact else float(cpu.nan_to_num(0, 0, 0).abs().max())
        rtol, atol = (2e-2, 5e-3 * max(size, 4.0)) if low else (1e-4, 1e-4 * max(size, 0.1))
        if exact:
            rtol = atol = 0.0
        torch.testing.assert_close(
            cuda, cpu, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
        )
    print("ok", name, flush=True)


def guided(features: Tensor, views: int, heads: int, options: dict[str, Any]) -> Tensor:
    """Guided aggregation with random weights, the same on every device."""
    batch, count, width = features.shape
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(features.device)

    def norm(*shape: int) -> ops.BatchNorm:
        return ops.BatchNorm(normal(*shape), normal(*shape), normal(*shape), 1 + normal(*shape).square())

    sizes = [(width,), (width,), (3 * 2 * heads, width), (3 * 2 * heads,), (width, 2 * heads), (width,)]
    attention = ops.CellAttention(*(normal(views, *size) * width**-0.5 for size in sizes))
    cell = torch.randint(9, (batch, views, count), generator=generator).to(features.device)
    voxel = torch.randint(batch * count, (batch, count), generator=generator)
    cluster = voxel.unique(return_inverse=True)[1].to(features.device)
    norms = norm(views, width), norm(width)
    fixed = {"num_cells": 9, "num_heads": heads, "coefficient": 0.5}
    with torch.autocast("cuda", features.dtype, enabled=features.dtype != torch.float32):
        return ops.guided_aggregate(features, cell, cluster, attention, *norms, **fixed, **options)


def projected(centers: Tensor, table: Tensor, views: Tensor, **options: Any) -> tuple[Tensor, ...]:
    found = ops.virtual_project(centers, table, views, cell=1.5, **options)
    return found.encoding, found.cell


def local(
    features: Tensor, neighbors: int, hidden: int, units: int, normalize: str, *, training: bool = False
) -> Tensor:
    """Local aggregation with random weights, the same on every device."""
    batch, count, width = features.shape
    generator = torch.Generator().manual_seed(0)
    double = 2 * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(features.device)

    def norm(size: int) -> ops.BatchNorm:
        return ops.BatchNorm(normal(size), normal(size), normal(size), 1 + normal(size).square())

    made = [
        ops.ResidualUnit(
            (normal(hidden, double) / double**0.5).requires_grad_(training),
            normal(hidden),
            norm(hidden),
            normal(double, hidden) / hidden**0.5,
            normal(double),
            norm(double),
        )
        for _ in range(units)
    ]
    points = torch.rand(batch, count, 3, generator=generator)
    center = torch.arange(9).expand(batch, 9).contiguous()
    neighbor = ops.knn(points[:, :9], points, neighbors).index
    neighbor[0, 3, -2:] = -1
    device = features.device
    rows = points.to(device), features, center.to(device), neighbor.to(device)
    with torch.set_grad_enabled(training):
        return ops.local_aggregate(*rows, made, normalize=normalize, training=training)


def trained(name: str, features: Tensor, *sizes: int) -> None:
    """Local aggregation in training: as a whole near the CPU's, as a few maxima and ReLUs go another way."""
    if not name.startswith(tuple(sys.argv[1:]) or ""):
        return
    results = []
    for device in ("cpu", "cuda"):
        moved = features.to(device).requires_grad_()
        out = local(moved, *sizes, "scan", training=True)
        (grad,) = torch.autograd.grad(out.float().square().sum(), moved)
        results.append([x.detach().cpu().float() for x in (out, grad)])
    for cpu, cuda, most in zip(*results, (0.1, 0.5), strict=True):  # a maximum moves its gradient elsewhere
        error = float((cuda - cpu).norm() / cpu.norm())
        if not error < most:
            raise AssertionError(f"{name}: relative error {error}")
    print("ok", name, flush=True)


def main() -> int:
    torch.manual_seed(0)
    lengths, offsets = torch.tensor([37, 0, 5]), torch.tensor([0, 0, 61, 61, 130])
    for clouds, n, m, dim in (
        (3, 37, 20, 3),
        (2, 1, 1, 3),
        (2, 1025, 65, 3),
        (1, 130, 140, 3),
        (2, 300, 40, 5),
    ):
        points = torch.rand(clouds, n, dim)
        for dtype in (torch.float32, torch.float64):
            cast = points.to(dtype)
            tag = f"[{clouds},{n},{dim}] {dtype}"
            compare(f"fps {tag}", ops.farthest_point_sample, cast, m, return_distance=True)
            for k in (1, 9, 40, 140):
                compare(f"knn k={k} {tag}", ops.knn, cast[:, : n // 2 + 1], cast, k)
            compare(f"knn unsorted {tag}", ops.knn, cast, cast, 7, sorted=False)
            for mode in ("nearest", "first"):
                compare(f"ball {mode} {tag}", ops.ball_query, cast, cast, 0.3, 11, mode=mode)
            compare(f"voxel {tag}", ops.voxel_cluster, cast[..., :3], 0.2)
    points = torch.rand(3, 37, 3)
    compare("fps pointnet2", ops.farthest_point_sample, points, 20, tie="pointnet2")
    compare("fps large", ops.farthest_point_sample, torch.rand(1, 33001, 3), 40)
    for n in (1000, 5000, 9000):  # in one block, in a cluster, in several blocks
        cloud = torch.rand(2, n, 3)
        compare(f"fps batched {n}", ops.farthest_point_sample, cloud, 400)
        given = torch.arange(300).expand(2, 300).contiguous()
        compare(f"fps batched {n}, continued", ops.farthest_point_sample, cloud, 400, start=given)
    given = torch.tensor([[3, 1, 7]]).expand(3, 3)
    compare("fps continued", ops.farthest_point_sample, points, 9, start=given)
    for n, most in ((2049, 9), (5000, 40), (9000, 100)):  # each cloud sorted by a block
        cloud = torch.rand(2, n, 3)
        compare(f"knn tree of {n}", ops.knn, cloud[:, :41], cloud, most)
    cloud[:, ::7] = torch.nan
    compare(
        "knn tree of itself", ops.knn, cloud[:, :2100], cloud[:, :2100], 9, sorted=False, exclude_self=True
    )
    compare("ball first of many", ops.ball_query, cloud[:, :40], cloud, 0.2, 20, mode="first")
    compare("knn large", ops.knn, torch.rand(1, 77, 3), torch.rand(1, 20011, 3), 16)
    tree = torch.rand(1, 50017, 3)
    for k in (9, 40, 100, 200):
        compare(f"knn tree k={k}", ops.knn, tree[:, :41], tree, k)
    compare("knn tree, ties", ops.knn, (tree[:, :41] * 9).round(), (tree * 9).round(), 16, sorted=False)
    compare("ball tree", ops.ball_query, tree[:, :41], tree, 0.05, 20, mode="first")
    compare("fps lengths", ops.farthest_point_sample, points, 9, lengths=lengths)
    compare("knn lengths", ops.knn, points, points, 9, lengths=lengths, query_lengths=lengths)
    packed = torch.rand(130, 3)
    compare("fps packed", ops.farthest_point_sample, packed, 9, offsets=offsets)
    compare("knn packed", ops.knn, packed, packed, 9, offsets=offsets, query_offsets=offsets)
    compare("voxel packed", ops.voxel_cluster, packed, 0.3, offsets=offsets)
    for rows in (1000, 2001):  # inverse lists of several blocks a cloud
        features = torch.randn(2, rows, 3, requires_grad=True)
        compare(f"group of {rows}", ops.group, features, torch.randint(-1, rows, (2, 9000)))
    index = torch.randint(-1, 37, (3, 11, 6))
    for channels in (1, 5, 96):
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            features = torch.randn(3, 37, channels, dtype=dtype, requires_grad=True)
            tag = f"C={channels} {dtype}"
            compare(f"group {tag}", ops.group, features, index)
            weight = torch.rand(3, 11, 6, dtype=dtype, requires_grad=True)
            compare(f"interpolate {tag}", ops.interpolate, features, index, weight)
            segment = torch.randint(-1, 19, (3, 37))
            for reduce in ("mean", "max", "sum"):
                compare(f"segment_pool {reduce} {tag}", ops.segment_pool, features, segment, 21, reduce)
    for width, views, count in ((36, 6, 29), (7, 2, 13), (20, 2, 700)):
        for options in ({"training": True}, {"pooling": "max+mean"}, {"ensemble": "max", "training": True}):
            features = torch.randn(2, count, width, requires_grad=True)
            compare(f"guided C={width} V={views} S={count} {options}", guided, features, views, 6, options)
    for dtype in (torch.float16, torch.bfloat16):
        for batch, count in ((2, 29), (2, 130), (40, 29)):
            features = torch.randn(batch, count, 200).to(dtype).requires_grad_()
            for training in (True, False):
                name = f"guided C=200 B={batch} S={count} {dtype} training={training}"
                compare(name, guided, features, 6, 6, {"training": training})
    for turn in (spread_lines(3), spread_rotations(6)):
        sizes = (11, 5) if turn.dim() == 2 else (5, 7, 4)
        for dtype in (torch.float32, torch.float16):
            table = torch.randn(sizes, dtype=dtype, requires_grad=True)
            name = f"virtual {turn.dim() - 1}-D {dtype}"
            compare(name, projected, torch.randn(2, 37, 3), table, turn, wrap=turn.dim() == 2)
    table = torch.randn(29, 130, requires_grad=True)
    compare("virtual wide", projected, torch.randn(3, 200, 3), table, spread_lines(13))
    for width, neighbors, hidden, units, dtype in (
        (48, 13, 70, 2, torch.float32),
        (48, 13, 70, 2, torch.bfloat16),
        (5, 3, 4, 3, torch.float32),
        *((96, 81, 96, 2, dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)),
        (192, 20, 192, 1, torch.float16),
        (384, 81, 32, 1, torch.float16),
    ):
        features = torch.randn(2, 90, width).to(dtype)
        for normalize in ("scan", "mn40"):
            name = f"local C={width} K={neighbors} H={hidden} {dtype} {normalize}"
            compare(name, local, features, neighbors, hidden, units, normalize)
    for width, neighbors, hidden, units in ((96, 81, 96, 2), (192, 20, 192, 1), (384, 81, 32, 1)):
        for dtype in (torch.float16, torch.bfloat16):
            features = torch.randn(2, 90, width).to(dtype)
            trained(f"local training C={width} {dtype}", features, neighbors, hidden, units)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
