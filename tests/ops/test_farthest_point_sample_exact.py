"""Farthest point sampling is exact: the same bits from every algorithm, instruction set and tie order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from farthest_point_sample_clouds import clouds, exact
from hypothesis import given, settings
from hypothesis import strategies as st
from op_contract import assert_same
from torch import Tensor

from any2point import reference
from any2point.ops import farthest_point_sample

LEVELS = ("scalar", "avx2", "avx512")


def sequential(points: Tensor, num_samples: int, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The same picks without batching and pruning, which serve D = 2 and 3 only: further coordinates that are
    0 change no bit of a squared distance."""
    wide = torch.cat([points, points.new_zeros(*points.shape[:-1], 4 - points.shape[-1])], -1)
    return farthest_point_sample(wide, num_samples, return_distance=True, **kwargs)


@pytest.fixture(params=LEVELS)
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.ops.any2point._simd("")
    try:
        torch.ops.any2point._simd(request.param)
    except RuntimeError:
        pytest.skip(f"this CPU lacks {request.param}")
    yield request.param
    torch.ops.any2point._simd(before)


@pytest.mark.parametrize("n", [400, 777, 1024, 2500])
def test_batched_equals_sequential(simd: str, n: int) -> None:
    """Hundreds of clouds: index and distance of the pruned batches, bit for bit those of the plain loop."""
    for seed in range(1 if simd == "scalar" else 4):
        generator = torch.Generator().manual_seed(seed)
        for name, cloud in clouds(generator, n):
            for dim in (3, 2):
                points = cloud[None, :, :dim].contiguous()
                got = farthest_point_sample(points, n * 3 // 4, return_distance=True)
                want = sequential(points, n * 3 // 4)
                assert_same(got, want, f"{name}, D = {dim}, seed {seed}")


def test_batched_equals_sequential_on_large_clouds() -> None:
    for name, cloud in clouds(torch.Generator().manual_seed(1), 30_000):
        got = farthest_point_sample(cloud[None], 1000, return_distance=True)
        assert_same(got, sequential(cloud[None], 1000), name)


@pytest.mark.parametrize("side", [10, 16, 24])
def test_full_lattices_are_picked_in_the_sequential_order(simd: str, side: int) -> None:
    """Thousands of points tie for every pick, which takes the path of its own that ties have."""
    axis = torch.arange(side, dtype=torch.float32)
    lattice = torch.cartesian_prod(axis, axis, axis)
    lattice = lattice[torch.randperm(len(lattice), generator=torch.Generator().manual_seed(side))]
    for dim in (3, 2):
        points = lattice[None, :, :dim].contiguous()
        num_samples = len(lattice) // (40 if simd == "scalar" and side == 24 else 3)
        got = farthest_point_sample(points, num_samples, return_distance=True)
        assert_same(got, sequential(points, num_samples), f"D = {dim}")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 31, 32, 33, 64, 255, 256, 257, 511, 513, 1023, 1025])
def test_simd_levels_and_reference_agree(n: int) -> None:
    points = exact(2, n, 3, steps=32, seed=n)
    num_samples = min(n, 300)
    want = reference.farthest_point_sample(points, num_samples, return_distance=True)
    before = torch.ops.any2point._simd("")
    for level in LEVELS:
        try:
            torch.ops.any2point._simd(level)
        except RuntimeError:
            continue
        try:
            assert_same(farthest_point_sample(points, num_samples, return_distance=True), want, level)
        finally:
            torch.ops.any2point._simd(before)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 6, 16])
def test_random_floats_are_the_same_on_every_simd_level(simd: str, dim: int) -> None:
    points = torch.randn(2, 1000, dim, generator=torch.Generator().manual_seed(dim))
    got = farthest_point_sample(points, 400, return_distance=True)
    torch.ops.any2point._simd("scalar")
    assert_same(got, farthest_point_sample(points, 400, return_distance=True))


@pytest.mark.parametrize("num_samples", [1, 3, 32, 33, 100, 101, 128, 129, 256, 1024, 1025])
def test_any_number_of_samples_is_a_prefix(num_samples: int) -> None:
    points = torch.rand(1, 1024, 3, generator=torch.Generator().manual_seed(3))
    most = farthest_point_sample(points, 1024)
    got = farthest_point_sample(points, num_samples)
    assert torch.equal(got[:, :1024], most[:, :num_samples])
    assert (got[:, 1024:] == -1).all()


@given(
    data=st.lists(st.tuples(*[st.integers(-4, 4)] * 3), min_size=1, max_size=40),
    start=st.integers(0, 50),
    num_samples=st.integers(1, 45),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_every_pick_is_the_lowest_of_the_farthest(
    data: list[tuple[int, int, int]], start: int, num_samples: int
) -> None:
    points = torch.tensor(data, dtype=torch.float64)
    index, distance = farthest_point_sample(points[None], num_samples, start=start, return_distance=True)
    picks, levels = index[0].tolist(), distance[0].tolist()
    n = min(len(data), num_samples)
    assert picks[0] == (start if start < len(data) else 0)
    assert levels[0] == math.inf
    assert len(set(picks[:n])) == n
    assert picks[n:] == [-1] * (num_samples - n)
    assert levels[n:] == [0.0] * (num_samples - n)
    table = (points[:, None] - points[None]).square().sum(-1)
    for j in range(1, n):
        level = table[picks[:j]].amin(0)
        level[picks[:j]] = -1
        assert levels[j] == level.max()
        assert picks[j] == int((level == level.max()).nonzero()[0])


@pytest.mark.slow
def test_full_size_cloud_matches_the_plain_loop() -> None:
    points = torch.rand(1, 100_000, 3, generator=torch.Generator().manual_seed(0))
    assert_same(farthest_point_sample(points, 25_000, return_distance=True), sequential(points, 25_000))


def threads_of(n: int) -> int:
    """How pointnet2_ops chooses its block, in the same double arithmetic."""
    return max(min(1 << int(math.log(n) / math.log(2.0)), 512), 1)


def pointnet2(points: np.ndarray, num_samples: int) -> list[int]:
    """pointnet2_ops thread by thread: strided scans that keep the first maximum, then the tree of threads."""
    n, threads = len(points), threads_of(len(points))

    def squared(d: np.ndarray) -> np.ndarray:
        fused = (d[:, 0].astype(np.float64) ** 2 + (d[:, 1] * d[:, 1]).astype(np.float64)).astype(np.float32)
        return (d[:, 2].astype(np.float64) ** 2 + fused.astype(np.float64)).astype(np.float32)

    skipped = squared(points).astype(np.float64) <= 1e-3
    temp = np.full(n, 1e10, np.float32)
    picks = [0]
    while len(picks) < num_samples:
        temp = np.where(skipped, temp, np.minimum(squared(points - points[picks[-1]]), temp))
        best, best_index = [-1.0] * threads, [0] * threads
        for thread in range(threads):
            for k in range(thread, n, threads):
                if not skipped[k] and temp[k] > best[thread]:
                    best[thread], best_index[thread] = float(temp[k]), k
        half = 256
        while half:
            if threads >= 2 * half:
                for a in range(half):
                    if best[a + half] > best[a]:
                        best[a], best_index[a] = best[a + half], best_index[a + half]
            half //= 2
        picks.append(best_index[0])
    return picks


def test_pointnet2_block_sizes_are_powers_of_two_below_n() -> None:
    for n in range(1, 3000):
        assert threads_of(n) == 1 << min(9, n.bit_length() - 1)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 31, 64, 100, 513, 700])
def test_pointnet2_order_is_that_of_its_thread_tree(n: int, device: str) -> None:
    for steps, scale in ((4, 1.0), (3, 0.04), (256, 0.05), (256, 1.0), (1, 1.0), (2, 1e6)):
        points = exact(1, n, 3, steps=steps, seed=n) * scale
        num_samples = min(n + 2, 40)
        got = farthest_point_sample(points.to(device), num_samples, tie="pointnet2")
        assert got[0].tolist() == pointnet2(points[0].numpy(), num_samples), (steps, scale)


def test_pointnet2_repeats_index_0_when_nothing_is_left() -> None:
    points = torch.full((1, 6, 3), 0.001)
    index, distance = farthest_point_sample(points, 4, tie="pointnet2", return_distance=True)
    assert index.tolist() == [[0, 0, 0, 0]]
    assert distance.tolist() == [[math.inf, 0.0, 0.0, 0.0]]


def test_pointnet2_never_picks_what_is_not_finite() -> None:
    points = exact(1, 20, 3)
    points[0, :5] = torch.nan
    index = farthest_point_sample(points, 40, tie="pointnet2")
    assert (index >= 5).all()
    points[:] = torch.nan
    assert (farthest_point_sample(points, 3, tie="pointnet2") == -1).all()
