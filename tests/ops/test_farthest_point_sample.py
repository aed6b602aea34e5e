"""Farthest point sampling: the op battery, and every way that other implementations have gone wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_contract import OpContract, Sample, assert_same
from torch import Tensor

from any2point import ops, reference
from any2point.ops import farthest_point_hierarchy, farthest_point_sample

LEVELS = ("scalar", "avx2", "avx512")


def exact(*shape: int, steps: int = 256, seed: int = 0) -> Tensor:
    """Multiples of 1/steps in [-1, 1]: all squared distances are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-steps, steps + 1, shape, generator=generator).float() / steps


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


class TestFarthestPointSample(OpContract):
    op = staticmethod(farthest_point_sample)
    reference = staticmethod(reference.farthest_point_sample)

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, points: Tensor, num_samples: int, **kwargs: Any) -> Sample:
            return Sample(name, dict(points=points, num_samples=num_samples, return_distance=True) | kwargs)

        holes = exact(2, 40, 3, steps=8)
        holes[0, ::3, 1] = torch.nan
        holes[1, 5:] = torch.inf
        cases = [
            sample("plain", exact(3, 61, 3), 17),
            sample("lengths", exact(4, 33, 3), 9, lengths=torch.tensor([33, 0, 5, 20])),
            sample("packed", exact(50, 3), 7, offsets=torch.tensor([0, 0, 11, 11, 49, 50, 50])),
            sample("ties", exact(2, 200, 3, steps=4), 200),
            sample("start", exact(3, 30, 3), 12, start=torch.tensor([29, 0, 77])),
            sample("one start", exact(3, 30, 3), 12, start=7),
            sample("not finite", holes, 50),
            sample("too many", exact(2, 5, 3), 9),
            sample("batched on the CPU", exact(2, 700, 3), 500),
            sample("D = 1", exact(2, 60, 1), 30),
            sample("D = 2", exact(2, 60, 2), 30),
            sample("D = 7", exact(2, 60, 7, steps=32), 30),
            sample("pointnet2", exact(2, 90, 3, steps=16), 120, tie="pointnet2"),
            sample("pointnet2, near the origin", exact(2, 90, 3, steps=256) / 32, 60, tie="pointnet2"),
            sample("no clouds", exact(0, 5, 3), 3),
            sample("no points", exact(2, 0, 3), 3),
            sample("no samples", exact(2, 5, 3), 0),
            sample("no packed clouds", exact(0, 3), 3, offsets=torch.tensor([0])),
        ]
        for case in cases:
            yield case.to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        points = exact(3, 61, 3)
        yield dict(points=points.numpy()), TypeError, r"points: expected a tensor .*got ndarray"
        yield dict(points=points[0]), ValueError, r"points: expected shape \[B, N, D\].*got \[61, 3\]"
        yield dict(points=points.long()), TypeError, r"points: expected float16.*got torch.int64"
        yield dict(points=points[..., :0]), ValueError, r"points: expected D >= 1, got shape \[3, 61, 0\]"
        yield dict(num_samples=-1), ValueError, r"num_samples: expected at least 0, got -1"
        yield dict(num_samples=2.0), TypeError, r"num_samples: expected an int, got float"
        yield dict(lengths=torch.tensor([1, 2])), ValueError, r"lengths: expected shape \[B\] = \[3\]"
        yield dict(lengths=torch.tensor([1, 2, 62])), ValueError, r"lengths: expected values in 0..N = 61"
        yield dict(offsets=torch.tensor([0, 3])), ValueError, r"points: expected shape \[P, D\]"
        yield (
            dict(points=points[0], offsets=torch.tensor([0, 9, 5, 61])),
            ValueError,
            r"offsets: expected 0, ..., P = 61, never falling",
        )
        yield dict(start=-1), ValueError, r"start: expected at least 0, got -1"
        yield dict(start=0.5), TypeError, r"start: expected an int, got float"
        yield dict(start="first"), ValueError, r"start: expected an int, a tensor \[B\] or \"random\""
        yield dict(start=torch.tensor([1, 2])), ValueError, r"start: expected shape \[B\] = \[3\], got \[2\]"
        yield dict(start=torch.rand(3)), TypeError, r"start: expected int64"
        yield dict(generator=torch.Generator()), ValueError, r'generator: expected None unless start="random"'
        yield dict(start="random", generator=3), TypeError, r"generator: expected a torch.Generator, got int"
        yield dict(tie="first"), ValueError, r'tie: expected "lowest" or "pointnet2", got \'first\''
        yield dict(points=points[..., :2], tie="pointnet2"), ValueError, r"points: expected D = 3 for tie"


# ------------------------------------------------------------------------------------------------ exactness


def clouds(generator: torch.Generator, n: int) -> Iterator[tuple[str, Tensor]]:
    """Clouds [n, 3] that are hard for pruning, for tie rules, or for the range of a float."""
    cube = torch.rand(n, 3, generator=generator)
    normal = torch.randn(n, 3, generator=generator)
    pick = torch.randint(0, n, (n,), generator=generator)
    yield "cube", cube
    yield "sphere", normal / normal.norm(dim=1, keepdim=True)
    yield (
        "rings",
        torch.stack(
            [(k := pick % 16 + 1.0) * (6.3 * cube[:, 0]).cos(), k * (6.3 * cube[:, 0]).sin(), -1.8 + 0 * k], 1
        ),
    )
    yield "clusters", cube[pick % 20] * 2 + 0.02 * normal
    yield "lattice", (cube * 8).floor() / 8
    yield "duplicates", cube[pick // 4]
    yield "all equal", torch.full((n, 3), 0.3)
    yield "two places", (cube > 0.5).float()[:, :1].expand(n, 3) * 0.7
    yield "line", cube[:, :1] * torch.tensor([1.0, 2.0, -3.0])
    yield "plane", cube * torch.tensor([1.0, 1.0, 0.0])
    yield "NaN and inf", cube.where(cube > 0.1, torch.nan).where(cube < 0.95, -torch.inf)
    yield "mostly NaN", cube.where(pick[:, None] > n // 10, torch.nan)
    yield "one finite", cube.where(torch.arange(n)[:, None] == n // 2, torch.nan)
    for scale in (1e3, 1e6, 1e18, 1e19, 1e30, 3e38, 1e-20, 1e-30, 1e-43):
        yield f"times {scale}", (cube - 0.5) * scale
    for shift in (5e4, 1e5, 1e10):
        yield f"plus {shift}", cube + shift
    yield "near the origin", cube * 0.03
    outliers = cube.clone()
    outliers[:4] = torch.tensor([[1e30], [-1e20], [1e10], [1e4]])
    yield "far outliers", outliers


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


# -------------------------------------------------------------------------------------------- rules of picks


@pytest.mark.parametrize("n", [1, 7, 64, 1000, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_points_give_distinct_indices(n: int, dtype: torch.dtype) -> None:
    points = torch.full((2, n, 3), 0.3, dtype=dtype)
    index, distance = farthest_point_sample(points, n + 2, return_distance=True)
    want = torch.cat([torch.arange(n), torch.tensor([-1, -1])])
    assert torch.equal(index, want.expand(2, -1))
    assert (distance[:, 1:] == 0).all()


@pytest.mark.parametrize("n", [5, 600, 5000])
def test_every_finite_point_is_picked_once_and_no_other(n: int) -> None:
    for name, cloud in clouds(torch.Generator().manual_seed(n), n):
        for start in (0, n - 1, 10 * n):
            index = farthest_point_sample(cloud[None], n, start=start)[0]
            finite = cloud.isfinite().all(1).nonzero()[:, 0]
            picked = index[index >= 0]
            assert torch.equal(picked.sort().values, finite), name
            assert (index[len(picked) :] == -1).all(), name
            if start < n and cloud[start].isfinite().all():
                assert int(index[0]) == start, name
            elif len(finite):
                assert int(index[0]) == int(finite[0]), name


def test_scale_and_shift_do_not_change_the_picks() -> None:
    points = exact(1, 1500, 3)
    want = farthest_point_sample(points, 700)
    for power in (-60, -10, 10, 55):
        assert torch.equal(farthest_point_sample(points * 2.0**power, 700), want), power
    assert torch.equal(farthest_point_sample(points + 2.0**14, 700), want)


def test_infinite_distances_tie() -> None:
    """Differences that overflow are all +inf: the lowest index goes first, and none twice."""
    points = torch.tensor([[3e38], [0.0], [-3e38], [3e38], [1.0]])
    index, distance = farthest_point_sample(points[None], 5, return_distance=True)
    assert index.tolist() == [[0, 1, 2, 4, 3]]
    assert distance.tolist() == [[math.inf, math.inf, math.inf, 1.0, 0.0]]


def test_distances_never_rise_and_the_first_is_infinite() -> None:
    points = torch.rand(3, 2000, 3, generator=torch.Generator().manual_seed(0))
    distance = farthest_point_sample(points, 1500, return_distance=True).distance
    assert (distance[:, 0] == torch.inf).all()
    assert (distance.diff(dim=1)[:, 1:] <= 0).all()


def test_nothing_is_differentiable() -> None:
    points = torch.rand(1, 20, 3, requires_grad=True)
    index, distance = farthest_point_sample(points, 5, return_distance=True)
    assert not index.requires_grad
    assert not distance.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_raised_not_rounded(dtype: torch.dtype) -> None:
    points = (torch.rand(1, 500, 3, generator=torch.Generator().manual_seed(0)) * 300).to(dtype)
    got = farthest_point_sample(points, 200, return_distance=True)
    assert got.distance.dtype == torch.float32
    assert_same(got, farthest_point_sample(points.float(), 200, return_distance=True))


# ------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("clouds", range(1, 10))
@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 700])
def test_padded_packed_and_single_clouds_agree(clouds: int, n: int) -> None:
    generator = torch.Generator().manual_seed(clouds * 1000 + n)
    points = torch.rand(clouds, n, 3, generator=generator)
    lengths = torch.randint(0, n + 1, (clouds,), generator=generator)
    start = torch.randint(0, n, (clouds,), generator=generator)
    num_samples = min(n + 1, 350)
    padded = farthest_point_sample(points, num_samples, lengths=lengths, start=start, return_distance=True)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    rows = torch.cat([points[b, : lengths[b]] for b in range(clouds)])
    packed = farthest_point_sample(rows, num_samples, offsets=offsets, start=start, return_distance=True)
    local = packed.index - offsets[:-1, None].where(packed.index >= 0, 0)
    assert_same((local, packed.distance), padded)
    for b in range(clouds):
        alone = farthest_point_sample(
            points[b : b + 1, : lengths[b]], num_samples, start=start[b : b + 1], return_distance=True
        )
        assert_same(alone, (padded.index[b : b + 1], padded.distance[b : b + 1]), f"cloud {b}")


@pytest.mark.parametrize("sizes", [[0, 5, 3], [5, 0, 3], [5, 3, 0], [0, 0, 0], [0], [4]])
def test_empty_clouds_anywhere(sizes: list[int], device: str) -> None:
    offsets = torch.tensor([0, *np.cumsum(sizes)], device=device)
    points = exact(sum(sizes), 3).to(device)
    index = farthest_point_sample(points, 4, offsets=offsets)
    for b, size in enumerate(sizes):
        picked = index[b][index[b] >= 0] - offsets[b]
        assert len(picked) == min(size, 4)
        assert sorted(set(picked.tolist())) == sorted(picked.tolist())
        assert all(0 <= k < size for k in picked.tolist())


def test_int32_lengths_offsets_and_start() -> None:
    points = exact(2, 20, 3)
    small = dict(lengths=torch.tensor([20, 7], dtype=torch.int32), start=torch.tensor([3, 2]).int())
    wide = {name: value.long() for name, value in small.items()}
    assert torch.equal(farthest_point_sample(points, 9, **small), farthest_point_sample(points, 9, **wide))


def test_many_clouds_in_parallel() -> None:
    points = torch.rand(257, 40, 3, generator=torch.Generator().manual_seed(0))
    want = torch.cat([farthest_point_sample(points[b : b + 1], 11) for b in range(len(points))])
    assert torch.equal(farthest_point_sample(points, 11), want)


# ------------------------------------------------------------------------------------------- random starts


def test_random_start_is_reproducible_and_stays_in_the_cloud(device: str) -> None:
    points = torch.rand(400, 9, 3, device=device)
    lengths = (torch.arange(400, device=device) % 9) + 1

    def starts(seed: int, **kwargs: Any) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return farthest_point_sample(points, 2, start="random", generator=generator, **kwargs)[:, 0]

    assert torch.equal(starts(1), starts(1))
    assert not torch.equal(starts(1), starts(2))
    assert starts(1).unique().tolist() == list(range(9))
    limited = starts(1, lengths=lengths)
    assert (limited < lengths).all()
    assert (limited >= 0).all()
    assert len(limited[lengths == 9].unique()) > 4


def test_random_start_of_packed_and_empty_clouds() -> None:
    offsets = torch.tensor([0, 4, 4, 10])
    index = farthest_point_sample(exact(10, 3), 3, offsets=offsets, start="random")
    assert 0 <= int(index[0, 0]) < 4
    assert index[1].tolist() == [-1, -1, -1]
    assert 4 <= int(index[2, 0]) < 10


def test_random_start_uses_torchs_generator_by_default() -> None:
    points = torch.rand(50, 30, 3)
    torch.manual_seed(5)
    first = farthest_point_sample(points, 1, start="random")
    torch.manual_seed(5)
    assert torch.equal(first, farthest_point_sample(points, 1, start="random"))


# -------------------------------------------------------------------------------------------- the hierarchy


@pytest.mark.parametrize("seed", range(5))
def test_hierarchy_is_sampling_of_samples(seed: int) -> None:
    """The identity behind it: the picks of picks are 0, 1, 2, ..., ties and duplicates included."""
    for name, cloud in clouds(torch.Generator().manual_seed(seed), 600):
        if "NaN" in name or "finite" in name:
            continue
        levels = farthest_point_hierarchy(cloud[None], [256, 128, 40])
        for upper, lower in pairwise(levels):
            again = farthest_point_sample(cloud[upper[0]][None], lower.shape[1])
            assert torch.equal(again[0], torch.arange(lower.shape[1])), name
            assert torch.equal(upper[:, : lower.shape[1]], lower), name


def test_hierarchy_levels_are_views_of_one_run() -> None:
    levels = farthest_point_hierarchy(exact(2, 50, 3), [20, 20, 5, 0], start=3)
    assert [tuple(level.shape) for level in levels] == [(2, 20), (2, 20), (2, 5), (2, 0)]
    assert all(level.data_ptr() == levels[0].data_ptr() for level in levels[:3])
    assert levels[0][:, 0].tolist() == [3, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_hierarchy_in_the_order_of_pointnet2_samples_each_level(packed: bool) -> None:
    points = exact(3, 128, 3, steps=4)
    if packed:
        offsets = torch.tensor([0, 128, 128, 384])
        levels = farthest_point_hierarchy(points.flatten(0, 1), [64, 16], offsets=offsets, tie="pointnet2")
        assert (levels[1][1] == -1).all()
        rows = points.flatten(0, 1)
    else:
        levels = farthest_point_hierarchy(points, [64, 16], tie="pointnet2")
        rows = points[0]
    again = farthest_point_sample(rows[levels[0][0]][None], 16, tie="pointnet2")
    assert torch.equal(levels[1][0], levels[0][0][again[0]])


@pytest.mark.parametrize(
    ("sizes", "exception", "pattern"),
    [
        ([128, 256], ValueError, r"num_samples: expected one or more sizes, never rising, got \[128, 256\]"),
        ([], ValueError, r"num_samples: expected one or more sizes"),
        ([4, -1], ValueError, r"num_samples: expected at least 0, got -1"),
        ([4, 2.5], TypeError, r"num_samples: expected an int, got float"),
        (5, TypeError, r"num_samples: expected a list of ints, got int"),
    ],
)
def test_hierarchy_refuses(sizes: Any, exception: type[Exception], pattern: str) -> None:
    with pytest.raises(exception, match=pattern):
        farthest_point_hierarchy(exact(1, 9, 3), sizes)


# --------------------------------------------------------------------------------------- pointnet2's order


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


# --------------------------------------------------------------------------------------- compilation, sizes


def test_compiled_with_changing_sizes() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def pick(points: Tensor, num_samples: int) -> list[Tensor]:
        return [ops.farthest_point_sample(points, num_samples), *farthest_point_hierarchy(points, [4, 2])]

    for n, num_samples in ((30, 7), (31, 9), (64, 20)):
        points = exact(2, n, 3)
        assert torch.equal(pick(points, num_samples)[0], farthest_point_sample(points, num_samples))


def test_exported_program_runs() -> None:
    class Pick(torch.nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return farthest_point_sample(points, 5)

    points = exact(2, 30, 3)
    program = torch.export.export(Pick(), (points,))
    assert torch.equal(program.module()(points), farthest_point_sample(points, 5))


def test_on_the_meta_device() -> None:
    got = farthest_point_sample(torch.empty(4, 10, 3, device="meta"), 6, return_distance=True)
    assert got.index.shape == got.distance.shape == (4, 6)
    assert got.index.dtype == torch.int64


@pytest.mark.slow
def test_full_size_cloud_matches_the_plain_loop() -> None:
    points = torch.rand(1, 100_000, 3, generator=torch.Generator().manual_seed(0))
    assert_same(farthest_point_sample(points, 25_000, return_distance=True), sequential(points, 25_000))


# ----------------------------------------------------------------------------------------------------- GPU

SIZES = [
    1,
    2,
    31,
    32,
    33,
    1000,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
    4095,
    4096,
    4097,
    8191,
    8192,
    8193,
    20000,
]


@pytest.mark.gpu
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7])
def test_cuda_equals_cpu(n: int, dim: int) -> None:
    for points in (torch.randn(3, n, dim), exact(3, n, dim, steps=8), torch.ones(3, n, dim)):
        num_samples = min(n + 2, 200)
        start = torch.tensor([0, n // 2, n + 5])
        want = farthest_point_sample(points, num_samples, start=start, return_distance=True)
        got = farthest_point_sample(points.cuda(), num_samples, start=start.cuda(), return_distance=True)
        assert_same(got, want, f"{n}, {dim}")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [700, 5000, 30_000])
def test_cuda_equals_cpu_on_hard_clouds(n: int) -> None:
    for name, cloud in clouds(torch.Generator().manual_seed(0), n):
        num_samples = min(n, 1000)
        got = farthest_point_sample(cloud[None].cuda(), num_samples, return_distance=True)
        assert_same(got, farthest_point_sample(cloud[None], num_samples, return_distance=True), name)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 33, 1000, 2049, 20_000])
def test_cuda_equals_cpu_in_float64(n: int) -> None:
    """Also in the order of pointnet2, and there in float32."""
    points = torch.randn(2, n, 3, dtype=torch.float64)
    ties = exact(2, n, 3, steps=8)
    for cloud, tie in (
        (points, "lowest"),
        (points, "pointnet2"),
        (ties, "pointnet2"),
        (ties * 0.05, "pointnet2"),
    ):
        got = farthest_point_sample(cloud.cuda(), min(n + 1, 300), return_distance=True, tie=tie)
        assert_same(got, farthest_point_sample(cloud, min(n + 1, 300), return_distance=True, tie=tie), tie)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sizes", [[0, 900, 0, 2000, 33], [5000, 0, 12_000, 70, 2500, 8192, 8193, 1], [20_000]]
)
def test_cuda_ragged_batches(sizes: list[int]) -> None:
    """Sizes that no single kernel serves: registers, several blocks and nothing at all in one call."""
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    points = torch.randn(sum(sizes), 3)
    want = farthest_point_sample(points, 150, offsets=offsets, return_distance=True)
    got = farthest_point_sample(points.cuda(), 150, offsets=offsets.cuda(), return_distance=True)
    assert_same(got, want, "packed")
    padded = torch.randn(len(sizes), max(sizes), 3)
    lengths = torch.tensor(sizes)
    want = farthest_point_sample(padded, 150, lengths=lengths, return_distance=True)
    got = farthest_point_sample(padded.cuda(), 150, lengths=lengths.cuda(), return_distance=True)
    assert_same(got, want, "padded")


@pytest.mark.gpu
def test_cuda_more_blocks_than_the_device_holds() -> None:
    """Too many large clouds for the cooperative launch: they are streamed."""
    points = torch.randn(300, 9000, 3)
    got = farthest_point_sample(points.cuda(), 20, return_distance=True)
    assert_same(got, farthest_point_sample(points, 20, return_distance=True))


@pytest.mark.gpu
def test_cuda_large_cloud_and_graph_replay() -> None:
    points = torch.rand(1, 100_000, 3)
    want = farthest_point_sample(points, 5000, return_distance=True)
    static = points.cuda()
    assert_same(farthest_point_sample(static, 5000, return_distance=True), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = farthest_point_sample(static, 5000, return_distance=True)
    for _ in range(2):
        got.index.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(got, want, "replay")


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_offsets_beyond_2_to_the_31() -> None:
    """B * N * D past 2^31 elements: the last cloud is read where it is."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    points = torch.zeros(700_001, 1024, 3, device="cuda")
    points[-1] = torch.rand(1024, 3)
    got = farthest_point_sample(points, 16)[-1:]
    assert_same(got, farthest_point_sample(points[-1:].cpu(), 16))
