"""knn finds exactly the right neighbours: sizes around every edge of the kernels, clouds of every kind.

Coordinates are multiples of a power of two, so the distances of the reference have no rounding and ties are
real; with random floats the sets and distances are compared with SciPy's tree.
"""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from neighbour_clouds import CLOUDS, LEVELS, cloud, grid, simd
from op_contract import assert_same
from torch import Tensor

from any2point import ops, reference

KS = (1, 3, 32, 33, 100, 101, 128, 129, 256, 1024)


def check(
    query: Tensor, points: Tensor, counts: tuple[int, ...], note: str = "", levels: list[str] = LEVELS
) -> None:
    """Both orders, for every k and at every SIMD level; the reference sorts once, for the largest k."""
    index, distance = reference.knn(query, points, max(counts))
    for k in counts:
        want = index[..., :k], distance[..., :k]
        # By index, with what is not there (-1, of an infinite distance) at the end.
        order = torch.where(want[0] < 0, points.shape[1], want[0]).sort(dim=-1, stable=True).indices
        want_set = tuple(part.gather(-1, order) for part in want)
        for level in levels:
            with simd(level):
                assert_same(ops.knn(query, points, k), want, f"{note} k={k} {level}")
                assert_same(
                    ops.knn(query, points, k, sorted=False), want_set, f"{note} k={k} {level} by index"
                )


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 255, 256, 257, 511, 512, 513, 1025])
def test_sizes(n: int) -> None:
    points = grid(1, n, 3)
    query = torch.cat([points[:, :20], grid(1, 9, 3, seed=1)], dim=1)
    check(query, points, KS)


@pytest.mark.parametrize("n", [1024, 2048, 4111])
def test_enough_queries_for_a_tree(n: int) -> None:
    points = grid(1, n, 3)
    query = points[:, :: n // 400]
    check(query, points, (1, 3, 16, 33, 101, 129, 256), levels=LEVELS[-1:])
    check(query, points, (20,))


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds(name: str) -> None:
    points = cloud(name, 1500)[None]
    check(points, points, (1, 16, 70), name)  # a tree
    check(points[:, :40], points, (1, 16, 70), name)  # a scan
    check(points[:, :40], points, (2000,), name, LEVELS[-1:])


@pytest.mark.parametrize("scale", [1e3, 1e6, 1e15, 1e30, 1e-15, 1e-30])
def test_scale_changes_nothing(scale: float) -> None:
    """Powers of two near the scale. At 1e30 all distances but 0 are infinite, at 1e-30 all are 0."""
    factor = 2.0 ** round(np.log2(scale))
    points = grid(1, 1200, 3) * factor
    check(points, points, (20,), f"scale {scale}", LEVELS[-1:])
    if 1e-30 < scale < 1e30:
        assert_same(ops.knn(points, points, 20).index, ops.knn(points / factor, points / factor, 20).index)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dimensions(dim: int, dtype: torch.dtype) -> None:
    points = grid(2, 700, dim, steps=16).to(dtype)
    check(points[:, ::9], points, (1, 9, 90))


def test_every_point_is_its_own_first_neighbour() -> None:
    points = torch.rand(2, 3000, 3)
    index, distance = ops.knn(points, points, 4)
    assert_same(index[..., 0], torch.arange(3000).expand(2, -1))
    assert (distance[..., 0] == 0).all()
    assert (distance.diff() >= 0).all()


def test_a_prefix_of_more_neighbours() -> None:
    points = torch.randn(1, 5000, 3)
    most = ops.knn(points, points, 200)
    for k in (1, 2, 24, 25, 96, 97):
        some = ops.knn(points, points, k)
        assert_same(some, (most.index[..., :k], most.distance[..., :k]), str(k))
        by_index = ops.knn(points, points, k, sorted=False)
        assert_same(by_index.index, some.index.sort(-1).values, str(k))


def test_threads_change_nothing() -> None:
    query, points = torch.rand(5, 999, 3), torch.rand(5, 2500, 3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.knn(query, points, 17))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("kind", ["cube", "sphere", "clusters", "line", "rings"])
@pytest.mark.parametrize(("n", "k"), [(1024, 81), (20_000, 16)])
def test_against_scipy(kind: str, n: int, k: int) -> None:
    spatial = pytest.importorskip("scipy.spatial")
    generator = np.random.default_rng(0)
    points = generator.random((n, 3))
    if kind == "sphere":
        points = generator.normal(size=(n, 3))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif kind == "clusters":  # of very different density
        points = generator.normal(size=(n, 3)) * 10.0 ** generator.integers(-6, 1, (n, 1)) + 3.0
    elif kind == "line":
        points[:, 1:] = 0.5 + 1e-3 * points[:, 1:]
    elif kind == "rings":
        angle, ring = generator.random(n) * 7, generator.integers(1, 64, n)
        points = np.stack([ring * np.cos(angle), ring * np.sin(angle), -0.02 * ring], 1)
    points = points.astype(np.float32)
    index, distance = (x[0].numpy() for x in ops.knn(*(torch.from_numpy(points)[None],) * 2, k))
    double = points.astype(np.float64)
    want, _ = spatial.cKDTree(double).query(double, k=k)
    exact = np.square(double[:, None] - double[index]).sum(-1)
    # The chosen points are as near as the nearest ones, but for the rounding of a float32 distance.
    np.testing.assert_allclose(np.sort(exact, 1), np.square(want), rtol=4e-7, atol=1e-30)
    np.testing.assert_allclose(distance, exact, rtol=4e-7, atol=1e-30)
    assert all(len(set(row)) == k for row in index[:: max(1, n // 200)].tolist())


def test_a_tree_is_a_scan() -> None:
    """Random floats, 20,000 points: the same bits whichever way the search goes."""
    points = torch.randn(1, 20_000, 3)
    all_at_once = ops.knn(points[:, :2000], points, 20)
    for first in (0, 700, 1999):  # too few queries to pay for a tree
        few = ops.knn(points[:, first : first + 3], points, 20)
        part = slice(first, min(first + 3, 2000))
        size = part.stop - part.start
        assert_same([x[:, :size] for x in few], [x[:, part] for x in all_at_once])


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(0, 150), s=st.integers(0, 6), dim=st.integers(1, 5), k=st.integers(0, 160),
    steps=st.sampled_from([1, 2, 16, 1024]), is_sorted=st.booleans(), double=st.booleans(),
    holes=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_small_cloud(
    n: int, s: int, dim: int, k: int, steps: int, is_sorted: bool, double: bool, holes: bool, seed: int
) -> None:
    query, points = grid(1, s, dim, steps=steps, seed=seed), grid(1, n, dim, steps=steps, seed=seed + 1)
    if double:
        query, points = query.double(), points.double()
    if holes:
        points[0, ::4, 0] = torch.nan
        query[0, 1::2, -1] = torch.inf
    got = ops.knn(query, points, k, sorted=is_sorted)
    assert_same(got, reference.knn(query, points, k, sorted=is_sorted))


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(900, 2500), k=st.integers(1, 80), name=st.sampled_from(CLOUDS), seed=st.integers(0, 999),
    is_sorted=st.booleans(),
)  # fmt: skip
def test_any_tree(n: int, k: int, name: str, seed: int, is_sorted: bool) -> None:
    points = cloud(name, n, seed)[None]
    query = points[:, torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 3]]
    got = ops.knn(query, points, k, sorted=is_sorted)
    assert_same(got, reference.knn(query, points, k, sorted=is_sorted), name)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 31, 32, 33, 255, 256, 257, 512, 513, 1024, 1025, 2048, 2049, 5000])
def test_cuda_gives_the_same_bits(n: int) -> None:
    for points in (grid(2, n, 3), torch.randn(2, n, 3)):
        query = torch.cat([points[:, :70], torch.randn(2, 30, 3)], dim=1)
        for k in (*KS, 16, 24, 25, 52, 53, 64, 65, 112, 113, 192, 193):
            for is_sorted in (True, False):
                want = ops.knn(query, points, k, sorted=is_sorted)
                got = ops.knn(query.cuda(), points.cuda(), k, sorted=is_sorted)
                assert_same(got, want, f"n={n} k={k} sorted={is_sorted}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLOUDS)
def test_cuda_gives_the_same_bits_for_every_kind_of_cloud(name: str) -> None:
    for n in (300, 1024, 2000, 3000):
        points = cloud(name, n)[None]
        for k in (1, 16, 81, 150, 300):
            want = ops.knn(points, points, k)
            assert_same(ops.knn(points.cuda(), points.cuda(), k), want, f"n={n} k={k}")
            assert_same(
                ops.knn(points.cuda(), points.cuda(), k, sorted=False),
                ops.knn(points, points, k, sorted=False),
                f"n={n} k={k} by index",
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cuda_gives_the_same_bits_in_every_dimension(dim: int, dtype: torch.dtype) -> None:
    points = torch.randn(3, 1500, dim, dtype=dtype)
    lengths, query_lengths = torch.tensor([1500, 0, 700]), torch.tensor([40, 9, 0])
    for k in (1, 20, 200, 2000):
        args = dict(lengths=lengths, query_lengths=query_lengths)
        want = ops.knn(points[:, :40], points, k, **args)
        on_device = {name: x.cuda() for name, x in args.items()}
        assert_same(ops.knn(points[:, :40].cuda(), points.cuda(), k, **on_device), want, f"k={k}")


@pytest.mark.gpu
def test_cuda_packed_clouds_of_all_sizes() -> None:
    sizes = torch.tensor([0, 5, 1024, 1025, 0, 2048, 2049, 300, 4000, 1, 0])
    queries = torch.tensor([3, 0, 70, 33, 1, 64, 65, 2, 40, 31, 0])
    offsets, query_offsets = (torch.cat([x.new_zeros(1), x.cumsum(0)]) for x in (sizes, queries))
    points, query = torch.randn(int(sizes.sum()), 3), torch.randn(int(queries.sum()), 3)
    for k in (4, 81, 200):
        want = ops.knn(query, points, k, query_offsets=query_offsets, offsets=offsets)
        got = ops.knn(
            query.cuda(), points.cuda(), k, query_offsets=query_offsets.cuda(), offsets=offsets.cuda()
        )
        assert_same(got, want, f"k={k}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLOUDS)
def test_cuda_tree(name: str) -> None:
    """Clouds large enough for the tree of boxes: queries that are points, and others."""
    points = cloud(name, 60_000)[None]
    query = torch.cat([points[:, ::200], 3 * torch.randn(1, 33, 3), points[:, 5:20]], dim=1)
    for k in (1, 16, 32, 33, 68, 69, 140, 141, 280, 281):
        for is_sorted in (True, False):
            want = ops.knn(query, points, k, sorted=is_sorted)
            got = ops.knn(query.cuda(), points.cuda(), k, sorted=is_sorted)
            assert_same(got, want, f"k={k} sorted={is_sorted}")
    on_device = points.cuda()
    assert_same(ops.knn(on_device, on_device, 9), ops.knn(points, points, 9))


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [1, 2])
def test_cuda_tree_of_fewer_coordinates(dim: int) -> None:
    points = torch.randn(2, 51_000, dim)
    for k in (1, 40):
        got = ops.knn(points[:, :999].cuda(), points.cuda(), k)
        assert_same(got, ops.knn(points[:, :999], points, k))


@pytest.mark.gpu
def test_cuda_trees_of_batches() -> None:
    """Lengths, packed clouds of all sizes, empty ones too; the same rows as queries and as points."""
    sizes, queries = [0, 7, 90_000, 300, 0, 260_000, 257, 120_000, 0], [3, 50, 400, 0, 1, 333, 64, 65, 0]
    clouds, asked = [torch.randn(n, 3) for n in sizes], [torch.randn(n, 3) for n in queries]
    offsets, query_offsets = (torch.tensor([0, *x]).cumsum(0) for x in (sizes, queries))
    for k in (4, 33):
        args = dict(query_offsets=query_offsets, offsets=offsets)
        want = ops.knn(torch.cat(asked), torch.cat(clouds), k, **args)
        on_device = {name: x.cuda() for name, x in args.items()}
        assert_same(ops.knn(torch.cat(asked).cuda(), torch.cat(clouds).cuda(), k, **on_device), want)
    points, lengths = torch.randn(4, 20_000, 3), torch.tensor([20_000, 0, 1, 12_345])
    on_device, device_lengths = points.cuda(), lengths.cuda()
    want = ops.knn(points, points, 5, lengths=lengths, query_lengths=lengths)
    got = ops.knn(on_device, on_device, 5, lengths=device_lengths, query_lengths=device_lengths)
    assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_outputs_beyond_2_to_the_31_elements() -> None:
    k, rows = 1024, (1 << 21) + 3
    points = torch.rand(1, 1024, 3, device="cuda")
    query = torch.rand(1, rows, 3, device="cuda")
    index, distance = ops.knn(query, points, k)
    want = ops.knn(query[:, -2:], points, k)
    assert_same((index[:, -2:], distance[:, -2:]), want)


@pytest.mark.slow
def test_a_million_points() -> None:
    points = torch.rand(1, 1_000_000, 3)
    index, distance = ops.knn(points, points, 8)
    assert_same(index[0, :, 0], torch.arange(1_000_000))
    some = torch.arange(0, 1_000_000, 99_991)
    assert_same(ops.knn(points[:, some], points, 8), (index[:, some], distance[:, some]))
