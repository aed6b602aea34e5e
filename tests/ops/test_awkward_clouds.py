"""Clouds on which point ops of other libraries are known to fail.

Few points in many clouds, sizes around a multiple of a block, far or large or coincident clouds, points at
the origin, empty clouds, every number of neighbours, more than 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from neighbour_clouds import CLOUDS, cloud, grid
from op_contract import assert_same
from torch import Tensor

from any2point import ops, reference

KS = (1, 3, 32, 33, 100, 101, 128, 129, 256, 1024)


def on(device: str, *values: Any) -> list[Any]:
    return [x.to(device) if isinstance(x, Tensor) else x for x in values]


def wide(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.long() for name, x in batch.items()}


def check_neighbours(device: str, query: Tensor, points: Tensor, radius: float, k: int, **batch: Any) -> None:
    there = dict(zip(batch, on(device, *batch.values())))
    pair = on(device, query, points)
    for is_sorted in (True, False):
        want = reference.knn(query, points, k, sorted=is_sorted, **wide(batch))
        assert_same(ops.knn(*pair, k, sorted=is_sorted, **there), want, f"knn k={k} sorted={is_sorted}")
    for mode in ("nearest", "first"):
        ball = reference.ball_query(query, points, radius, k, mode=mode, **wide(batch))
        assert_same(ops.ball_query(*pair, radius, k, mode=mode, **there), ball, f"ball k={k} {mode}")


def check_picks(device: str, points: Tensor, num_samples: int, **batch: Any) -> None:
    want = reference.farthest_point_sample(points, num_samples, return_distance=True, **wide(batch))
    there = dict(zip(batch, on(device, *batch.values())))
    got = ops.farthest_point_sample(points.to(device), num_samples, return_distance=True, **there)
    assert_same(got, want, f"{num_samples} samples")


@pytest.mark.parametrize("clouds", [1, 2, 3, 5, 64])
def test_few_points_in_many_clouds(clouds: int, device: str) -> None:
    for n in range(1, 10):
        points = grid(clouds, n, 3, seed=n)
        check_picks(device, points, n + 1)
        check_neighbours(device, points, points, 0.6, n + 1)
        offsets = torch.arange(clouds + 1) * n
        rows = points.flatten(0, 1)
        check_picks(device, rows, n, offsets=offsets)
        check_neighbours(device, rows, rows, 0.6, n, query_offsets=offsets, offsets=offsets)


@pytest.mark.parametrize("n", [255, 257, 511, 513, 767, 769, 1023, 1025])
def test_thousands_of_seeds_around_multiples_of_a_block(n: int, device: str) -> None:
    """125 clouds of each size and of two kinds: picks and neighbours by their definition, all at once."""
    generator = torch.Generator().manual_seed(n)
    for points in (torch.randn(125, n, 3, generator=generator), grid(125, n, 3, steps=16, seed=n)):
        level = torch.full((125, n), torch.inf)
        picks = torch.zeros(125, 24, dtype=torch.int64)
        every = torch.arange(125)
        for j in range(24):
            if j > 0:
                picks[:, j] = (level == level.amax(1, keepdim=True)).int().argmax(1)
            level = level.minimum(reference.squared_distance(points, points[every, picks[:, j]][:, None]))
            level[every, picks[:, j]] = -1
        assert_same(ops.farthest_point_sample(points.to(device), 24), picks)
        query = points[:, n // 2 : n // 2 + 3]
        distance = reference.squared_distance(query[:, :, None], points[:, None])
        index = distance.sort(dim=-1, stable=True).indices[..., :33]
        got = ops.knn(query.to(device), points.to(device), 33)
        assert_same(got, (index, distance.gather(-1, index)))


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**20])
@pytest.mark.parametrize("shift", [0.0, 5e4, 1e10])
def test_large_and_far_clouds(scale: float, shift: float, device: str) -> None:
    """At 1e10 a float32 cannot tell the points of a small cloud apart: all of them are neighbours at 0."""
    points = grid(2, 300, 3) * scale + shift
    check_picks(device, points, 60)
    check_neighbours(device, points[:, :50], points, 0.2 * scale, 20)
    voxels = reference.voxel_cluster(points, 0.25 * scale)
    assert_same(ops.voxel_cluster(points.to(device), 0.25 * scale), voxels)


def test_points_at_the_origin_are_points(device: str) -> None:
    """Only with tie="pointnet2" those within sqrt(1e-3) of it are skipped."""
    points = grid(1, 64, 3) * 0.01
    points[0, 5] = 0
    index = ops.farthest_point_sample(points.to(device), 64)
    assert index.sort().values.tolist() == [list(range(64))]
    check_picks(device, points, 64)
    check_neighbours(device, points, points, 0.004, 9)
    skipped = points.clone()
    skipped[0, :8] += 1
    index = ops.farthest_point_sample(skipped.to(device), 20, tie="pointnet2")
    assert set(index[0].tolist()) == set(range(8))


@pytest.mark.parametrize("n", [1, 33, 300, 3000])
def test_equal_points_are_distinct_rows(n: int, device: str) -> None:
    points = torch.full((1, n, 3), 0.3, device=device)
    rows = torch.arange(n, device=device).expand(1, n)
    assert torch.equal(ops.farthest_point_sample(points, n), rows)
    few = points[:, :2]
    assert torch.equal(ops.knn(few, points, n).index, rows.expand(1, min(n, 2), n))
    for mode in ("nearest", "first"):
        assert torch.equal(ops.ball_query(few, points, 1.0, n, mode=mode).index, rows.expand(1, min(n, 2), n))


@pytest.mark.parametrize("sizes", [[0, 40, 9], [40, 0, 9], [40, 9, 0], [0, 0, 5, 0], [0, 0], [0]])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_empty_clouds_anywhere(sizes: list[int], index_dtype: torch.dtype, device: str) -> None:
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(index_dtype)
    points, queries = grid(sum(sizes), 3), torch.arange(len(sizes) + 1).to(index_dtype) * 2
    query = grid(2 * len(sizes), 3, seed=1)
    check_picks(device, points, 5, offsets=offsets)
    check_neighbours(device, query, points, 0.5, 4, query_offsets=queries, offsets=offsets)
    want = reference.voxel_cluster(points, 0.3, offsets=offsets.long())
    voxels = ops.voxel_cluster(points.to(device), 0.3, offsets=offsets.to(device))
    assert_same(voxels, want)
    if len(points):
        features = torch.randn(len(points), 4)
        pooled = ops.segment_pool(
            features.to(device), voxels.cluster, len(points), order=voxels.order, start=voxels.start
        )
        torch.testing.assert_close(
            pooled.cpu(), reference.segment_pool(features, want[0], len(points)), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("k", KS)
def test_every_number_of_neighbours(k: int, device: str) -> None:
    points, features = grid(1, 700, 3), torch.randn(1, 700, 5)
    query = grid(1, 40, 3, seed=1)
    check_neighbours(device, query, points, 0.7, k)
    neighbours = ops.knn(query.to(device), points.to(device), k)
    index, there = neighbours.index.cpu(), features.to(device).requires_grad_()
    grouped = ops.group(there, neighbours.index)
    assert_same(grouped.detach(), reference.group(features, index))
    weight = ops.inverse_distance_weight(neighbours.distance)
    carried = ops.interpolate(there, neighbours.index, weight)
    torch.testing.assert_close(
        carried.detach().cpu(), reference.interpolate(features, index, weight.cpu()), rtol=1e-5, atol=1e-6
    )
    (grad,) = torch.autograd.grad(grouped.sum(), there)
    count = torch.bincount(index[index >= 0], minlength=700).float()
    assert_same(grad[0], count[:, None].expand(700, 5))


def test_numbers_may_be_those_of_numpy(device: str) -> None:
    points = grid(1, 90, 3).to(device)
    k, radius = np.int64(5), np.float32(0.25)
    assert_same(ops.knn(points, points, k), ops.knn(points, points, 5))
    assert_same(ops.ball_query(points, points, radius, k), ops.ball_query(points, points, 0.25, 5))
    assert_same(ops.farthest_point_sample(points, k), ops.farthest_point_sample(points, 5))
    assert_same(ops.voxel_cluster(points, radius), ops.voxel_cluster(points, 0.25))
    assert_same(ops.voxel_cluster(points, list(np.full(3, radius))), ops.voxel_cluster(points, 0.25))


def random_batches(batches: int, clouds: int, largest: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded clouds of every kind and of random sizes: lattices, duplicates, clusters, lines, holes, ..."""
    generator = torch.Generator().manual_seed(0)
    for batch in range(batches):
        points = torch.empty(clouds, largest, 3)
        for b in range(clouds):
            name = CLOUDS[(batch * clouds + b) % len(CLOUDS)]
            points[b] = cloud(name, largest, seed=batch * clouds + b)
            if b % 3 == 0:  # random bits, so that roundings matter
                points[b] *= torch.rand(3, generator=generator) + 0.5
            if b % 5 == 0:
                points[b] += 1e5 * torch.randn(3, generator=generator)
        lengths = torch.randint(0, largest + 1, (clouds,), generator=generator)
        lengths[::4] = largest
        yield points, lengths


def check_random_clouds(device: str, points: Tensor, lengths: Tensor, k: int) -> None:
    args = dict(zip(("points", "lengths"), on(device, points, lengths)))
    query = points[:, ::7]
    query_lengths = lengths // 7
    for op, more in (
        (ops.farthest_point_sample, dict(num_samples=points.shape[1] // 3, return_distance=True)),
        (ops.knn, dict(query=query, query_lengths=query_lengths, k=k)),
        (ops.knn, dict(query=query, query_lengths=query_lengths, k=k, sorted=False)),
        (ops.ball_query, dict(query=query, query_lengths=query_lengths, k=k, radius=0.2)),
        (ops.ball_query, dict(query=query, query_lengths=query_lengths, k=k, radius=0.2, mode="first")),
    ):
        want = op(points=points, lengths=lengths, **more)
        assert_same(op(**args, **dict(zip(more, on(device, *more.values())))), want, op.__name__)


@pytest.mark.gpu
def test_cuda_equals_cpu_on_random_clouds() -> None:
    for points, lengths in random_batches(4, 51, 700):
        check_random_clouds("cuda", points, lengths, 17)


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_equals_cpu_on_ten_thousand_random_clouds() -> None:
    for batch, (points, lengths) in enumerate(random_batches(100, 102, 1500)):
        check_random_clouds("cuda", points, lengths, 1 + 7 * batch % 130)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("what", ["points", "neighbours"])
def test_more_than_2_to_the_31_elements(what: str) -> None:
    """The last cloud is read and written where it is."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.skip("needs 60 GB")
    shape, queries, k = ((700_001, 1024, 3), 1, 5) if what == "points" else ((33_001, 64, 3), 1024, 64)
    points = torch.zeros(shape, device="cuda")
    points[-1] = torch.rand(shape[1:])
    query = points[:, :1].expand(-1, queries, -1).contiguous()
    query[-1] = torch.rand(queries, 3)
    want = ops.knn(query[-1:].cpu(), points[-1:].cpu(), k)
    got = ops.knn(query, points, k)
    assert_same([x[-1:] for x in got], want, "knn")
    assert_same(got.index[0, 0], torch.arange(k))
    del got
    ball = ops.ball_query(query, points, 0.5, k)
    assert_same([x[-1:] for x in ball], ops.ball_query(query[-1:].cpu(), points[-1:].cpu(), 0.5, k), "ball")
