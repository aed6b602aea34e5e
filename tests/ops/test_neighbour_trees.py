"""Searches through trees on the CPU give the bits of plain scans: float64, many coordinates, balls, batches.

A few queries do not pay for a tree, so the same queries a few at a time are scanned; the scans are compared
with the reference in test_knn_exact.py and test_ball_query.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neighbour_clouds import CLOUDS, LEVELS, cloud, grid, simd
from op_contract import assert_same, tensors
from torch import Tensor

from any2point import ops


def in_parts(
    op: Callable[..., Any], query: Tensor, points: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    parts = [tensors(op(part, points, *args, **kwargs)) for part in query.split(60, dim=1)]
    return [torch.cat(same, 1) for same in zip(*parts)]


def check_knn(query: Tensor, points: Tensor, counts: tuple[int, ...], note: str, levels: list[str]) -> None:
    for k in counts:
        for is_sorted in (True, False):
            want = in_parts(ops.knn, query, points, k, sorted=is_sorted)
            for level in levels:
                with simd(level):
                    got = ops.knn(query, points, k, sorted=is_sorted)
                assert_same(got, want, f"{note} k={k} {level} sorted={is_sorted}")


@pytest.mark.parametrize("name", CLOUDS)
def test_float64(name: str) -> None:
    points = cloud(name, 2500)[None].double()
    check_knn(points, points, (16,), name, LEVELS)
    query = torch.cat([points[:, ::2], grid(1, 300, 3, seed=1).double() * 2], 1)
    check_knn(query, points, (1, 70), name, LEVELS[-1:])


@pytest.mark.parametrize("dim", [1, 2, 5, 16])
def test_float64_of_other_dimensions(dim: int) -> None:
    points = torch.randn(1, 4000, dim, dtype=torch.float64)
    points[0, ::50] = points[0, 1::50]
    check_knn(points, points, (9,), f"D = {dim}", LEVELS[-1:])


def test_float64_detail_far_below_the_size_of_the_cloud() -> None:
    """Clusters that float32 coordinates take for one point, and differences that overflow."""
    centers = torch.randn(8, 3, dtype=torch.float64) * 1e3
    points = centers.repeat_interleave(500, 0) + 1e-9 * torch.randn(4000, 3, dtype=torch.float64)
    points[:500] = centers[0] + 1e-13 * torch.randn(500, 3, dtype=torch.float64)
    points[500:900] = points[500]
    check_knn(points[None], points[None], (16,), "clusters", LEVELS[-1:])
    check_knn(points[None] * 1e-300, points[None] * 1e-300, (5,), "tiny", LEVELS[-1:])
    wide = torch.randn(1, 3000, 3, dtype=torch.float64) * 1e308
    wide = torch.where(wide.isfinite(), wide, 0.0)
    check_knn(wide, wide, (5,), "wide", LEVELS[-1:])


@pytest.mark.parametrize("name", CLOUDS)
def test_six_coordinates(name: str) -> None:
    """Of few degrees of freedom, so that boxes keep points away: positions with directions."""
    position = cloud(name, 5600)
    points = torch.cat([position, position.flip(1) * 0.5], 1)[None]
    check_knn(points, points, (16,), name, LEVELS[-1:])


@pytest.mark.parametrize("dim", [4, 5, 8, 16, 17])
def test_many_coordinates(dim: int) -> None:
    points = torch.randn(1, 9000, 2) @ torch.randn(2, dim)
    query = torch.cat([points[:, ::2], points[:, :1000] + torch.randn(1, 1000, dim)], 1)
    check_knn(query, points, (20,), f"D = {dim}", LEVELS if dim == 5 else LEVELS[-1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CLOUDS)
def test_balls(name: str, dtype: torch.dtype) -> None:
    """Small ones, ones of some hundred points, and ones that hold nearly all."""
    points = cloud(name, 4000)[None].to(dtype)
    query = torch.cat([points[:, 1::2], points[:, :200] * 1.5], 1)
    distance = ops.knn(query, points, 300).distance.double()
    for k in (8, 299):
        near = distance[..., k][distance[..., k].isfinite()]
        for radius in (float(near.median().sqrt().clamp(1e-25, 1e37)) if len(near) else 1.0, 1e36):
            for mode in ("nearest", "first"):
                want = in_parts(ops.ball_query, query, points, radius, 20, mode=mode)
                for level in LEVELS if k == 8 and dtype == torch.float32 else LEVELS[-1:]:
                    with simd(level):
                        got = ops.ball_query(query, points, radius, 20, mode=mode)
                    assert_same(got, want, f"{name} {radius} {mode} {level}")


@pytest.mark.parametrize("mode", ["nearest", "first"])
def test_balls_of_six_coordinates(mode: str) -> None:
    points = (torch.randn(1, 9000, 2) @ torch.randn(2, 6)).contiguous()
    for radius in (0.05, 0.5, 50.0):
        want = in_parts(ops.ball_query, points, points, radius, 30, mode=mode)
        assert_same(ops.ball_query(points, points, radius, 30, mode=mode), want, f"{radius}")


def test_first_in_balls_of_very_different_counts() -> None:
    """Dense and sparse parts next to each other: the search changes its mind along the way."""
    points = torch.rand(1, 20_000, 3)
    points[:, ::2] *= 0.05
    points = points[:, torch.randperm(20_000)]
    got = ops.ball_query(points, points, 0.04, 16, mode="first")
    want = in_parts(ops.ball_query, points[:, :3000], points, 0.04, 16, mode="first")
    assert_same([x[:, :3000] for x in got], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_and_shared_storage_change_nothing(dtype: torch.dtype) -> None:
    """Clouds large enough for their order to be made by several threads; queries that are the points."""
    points = torch.randn(1, 80_000, 3, dtype=dtype)
    points[0, 3::1000] = points[0, 1]
    points[0, 7::1000, 1] = torch.nan
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [ops.knn(points, points, 7), ops.knn(points.clone(), points, 7)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])
    assert_same(
        [x[:, 40_000:40_300] for x in results[0]], in_parts(ops.knn, points[:, 40_000:40_300], points, 7)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_all_sizes(dtype: torch.dtype) -> None:
    """Trees, scans and empty clouds in one call, packed and with lengths."""
    sizes = [0, 5000, 3, 40_000, 0, 900, 2600]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    points = torch.randn(sum(sizes), 3, dtype=dtype)
    whole = ops.knn(points, points, 6, query_offsets=offsets, offsets=offsets)
    balls = ops.ball_query(points, points, 0.2, 6, query_offsets=offsets, offsets=offsets, mode="first")
    for begin, size in zip(offsets.tolist(), sizes):
        alone = points[None, begin : begin + size].clone()
        for got, want in (
            (whole, ops.knn(alone, alone, 6)),
            (balls, ops.ball_query(alone, alone, 0.2, 6, mode="first")),
        ):
            index = torch.where(want.index >= 0, want.index + begin, -1)
            assert_same(got.index[begin : begin + size], index[0])
            assert_same(got.distance[begin : begin + size], want.distance[0])
    padded = torch.nn.utils.rnn.pad_sequence(list(points.split(sizes)), batch_first=True)
    lengths = torch.tensor(sizes)
    got = ops.knn(padded, padded, 6, query_lengths=lengths, lengths=lengths)
    for b, (begin, size) in enumerate(zip(offsets.tolist(), sizes)):
        assert_same(got.distance[b, :size], whole.distance[begin : begin + size])
        assert (got.index[b, size:] == -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [3, 6])
def test_nothing_finite(dtype: torch.dtype, dim: int) -> None:
    points = torch.full((1, 9000, dim), torch.nan, dtype=dtype)
    points[0, :2] = torch.rand(2, dim)
    query = torch.rand(1, 9000, dim, dtype=dtype)
    assert (ops.knn(query, points[:, 2:], 4).index == -1).all()
    assert (ops.knn(query, points, 4).index.sort(-1).values == torch.tensor([-1, -1, 0, 1])).all()
    assert (ops.ball_query(query, points[:, 2:], 1.0, 4, mode="first").count == 0).all()


@pytest.mark.slow
def test_rows_beyond_2_to_the_24() -> None:
    """Most of them no points: rows, not the number of points, decide how they are compared."""
    rows = (1 << 24) + 5000
    points = torch.full((1, rows, 3), torch.nan)
    finite = torch.randperm(rows)[:4000].sort().values
    finite[-500:] = torch.arange(rows - 500, rows)
    points[0, finite] = torch.rand(4000, 3)
    few = points[:, finite].contiguous()
    for is_sorted in (True, False):
        got, want = (ops.knn(few, cloud, 20, sorted=is_sorted) for cloud in (points, few))
        assert_same((got.index, got.distance), (finite[want.index], want.distance))
