"""Farthest point sampling: the op battery, the rules of picks, batches, random starts, the hierarchy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from farthest_point_sample_clouds import clouds, exact
from op_contract import OpContract, Sample, assert_same
from torch import Tensor

from any2point import reference
from any2point.ops import farthest_point_hierarchy, farthest_point_sample


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
            sample(
                "several starts",
                exact(3, 30, 3),
                12,
                start=torch.tensor([[29, 0, 5], [3, 3, 3], [77, -1, 4]]),
            ),
            sample("more starts than picks", holes, 2, start=torch.tensor([[1, 0, 5], [3, 9, 4]])),
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
        yield dict(start=torch.tensor([1, 2])), ValueError, r"start: expected shape \[B\] = \[3\] .*got \[2\]"
        yield dict(start=torch.rand(3)), TypeError, r"start: expected int64"
        yield dict(start=torch.zeros(3, 0, dtype=torch.int64)), ValueError, r"start: expected .*got \[3, 0\]"
        yield (
            dict(start=torch.zeros(3, 2, dtype=torch.int64), tie="pointnet2"),
            ValueError,
            r"start: expected one start a cloud with tie",
        )
        yield dict(generator=torch.Generator()), ValueError, r'generator: expected None unless start="random"'
        yield dict(start="random", generator=3), TypeError, r"generator: expected a torch.Generator, got int"
        yield dict(tie="first"), ValueError, r'tie: expected "lowest" or "pointnet2", got \'first\''
        yield dict(points=points[..., :2], tie="pointnet2"), ValueError, r"points: expected D = 3 for tie"


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_continues_from_given_picks(dtype: torch.dtype, device: str) -> None:
    points = exact(3, 200, 3).to(device, dtype)
    whole = farthest_point_sample(points, 150, return_distance=True)
    for given in (2, 60, 149, 150):
        again = farthest_point_sample(points, 150, start=whole.index[:, :given], return_distance=True)
        assert_same(again, whole, str(given))


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


def test_compiled_with_changing_sizes() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def pick(points: Tensor, num_samples: int) -> list[Tensor]:
        return [farthest_point_sample(points, num_samples), *farthest_point_hierarchy(points, [4, 2])]

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
