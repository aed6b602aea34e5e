"""voxel_cluster: the contract, NumPy's unique, and the ends of the number range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from op_contract import OpContract, Sample, assert_same
from torch import Tensor

from any2point import ops, reference


class TestVoxelCluster(OpContract):
    op = staticmethod(ops.voxel_cluster)
    reference = staticmethod(reference.voxel_cluster)

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, points: Tensor, size: Any, **more: Any) -> Sample:
            return Sample(name, dict(points=points, size=size, **more)).to(device)

        holes = torch.rand(3, 40, 3)
        holes[0, 3, 1], holes[1, :, 2], holes[2, 7] = torch.nan, torch.inf, -torch.inf
        lengths, offsets = torch.tensor([40, 0, 17]), torch.tensor([0, 0, 25, 31, 31, 90])
        yield sample("plain", torch.rand(2, 50, 3), 0.25)
        yield sample("packed", torch.rand(90, 3), 0.3, offsets=offsets)
        yield sample("lengths", holes, 0.2, lengths=lengths)
        yield sample("packed with holes", holes.flatten(0, 1), 0.2, offsets=torch.tensor([0, 40, 80, 120]))
        yield sample("an edge for each axis", torch.rand(2, 50, 3), [0.5, 0.1, 0.3])
        for dims in (1, 2):
            yield sample(f"D = {dims}", torch.randn(2, 45, dims), 0.4)
            yield sample(f"packed D = {dims}", torch.randn(90, dims), 0.4, offsets=offsets)
        yield sample("around an origin", torch.randn(2, 60, 3), 0.7, origin=torch.zeros(3))
        yield sample("an origin for each", torch.randn(2, 60, 3), 0.7, origin=torch.randn(2, 3))
        yield sample("duplicates", torch.randint(0, 3, (2, 80, 3)).float(), 1.0)
        yield sample("all in one", torch.rand(2, 30, 3), 10.0)
        yield sample("each its own", torch.rand(1, 30, 3), 1e-6)
        yield sample("a large cloud", torch.rand(1, 1500, 3), 0.1)
        yield sample("far apart", torch.rand(1, 1200, 3) * 2000 - 1000, 1e-5, origin=torch.zeros(3))
        yield sample("many tiles", torch.rand(2, 2600, 2), 0.01)
        yield sample("one point", torch.rand(1, 1, 3), 0.1)
        yield sample("no points", torch.rand(2, 0, 3), 0.1)
        yield sample("no clouds", torch.rand(0, 5, 3), 0.1)
        yield sample("no packed points", torch.rand(0, 3), 0.1, offsets=torch.tensor([0, 0]))
        yield sample("nothing finite", torch.full((2, 9, 3), torch.nan), 0.1)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield dict(points=[0.0]), TypeError, r"points: expected a tensor"
        yield dict(points=torch.zeros(5, 3)), ValueError, r"points: expected shape \[B, N, D\]"
        yield dict(points=torch.zeros(2, 5, 4)), ValueError, r"points: expected 1, 2 or 3 coordinates"
        yield dict(points=torch.zeros(2, 5, 0)), ValueError, r"points: expected 1, 2 or 3 coordinates"
        yield dict(points=torch.zeros(2, 5, 3).long()), TypeError, r"points: expected float16"
        yield dict(lengths=torch.tensor([5, 51])), ValueError, r"lengths: expected values in 0..N"
        for size in (0, -1.0, torch.inf, torch.nan, [0.1, 0.1], [0.1, 0.1, 0.0]):
            yield dict(size=size), ValueError, r"size: expected a positive number"
        for size in ("0.1", None, True, torch.tensor(0.1), [0.1, "0.1", 0.1]):
            yield dict(size=size), TypeError, r"size: expected a number"
        yield dict(origin=[0.0, 0.0, 0.0]), TypeError, r"origin: expected a tensor"
        yield dict(origin=torch.zeros(2)), ValueError, r"origin: expected shape \[3\] or \[2, 3\]"
        yield dict(size=1e-30), ValueError, r"^size: expected voxels large enough .* row 0"


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("rows", [30, 3000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_against_numpy(device: str, dims: int, rows: int, dtype: type) -> None:
    """np.unique over keys, and the arithmetic of the voxel in NumPy."""
    points = np.random.default_rng(rows + dims).normal(size=(2, rows, dims)).astype(dtype)
    edges = np.array([0.3, 0.2, 0.5][:dims])
    voxels = np.trunc((points - points.min(1, keepdims=True)) / edges.astype(dtype)).astype(np.int64)
    cloud = np.arange(2)[:, None, None].repeat(rows, 1)
    keys = np.concatenate([cloud, voxels[..., ::-1]], -1).reshape(2 * rows, -1)
    unique, inverse, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    got = ops.voxel_cluster(torch.from_numpy(points).to(device), edges.tolist())
    assert int(got.count) == len(unique)
    assert np.array_equal(got.cluster.cpu().numpy().ravel(), inverse.ravel())
    assert np.array_equal(got.start.cpu().numpy()[: len(unique) + 1], np.cumsum([0, *counts]))
    assert np.array_equal(got.order.cpu().numpy(), np.argsort(inverse.ravel(), kind="stable"))
    assert (got.start[len(unique) :] == 2 * rows).all()


@pytest.mark.parametrize("clouds", [5, 40])
def test_padded_equals_packed(device: str, clouds: int) -> None:
    lengths = torch.randint(0, 90, (clouds,))
    points = torch.randn(clouds, 90, 3)
    points[:, 11, 0] = torch.nan
    inside = torch.arange(90) < lengths[:, None]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device)
    padded = ops.voxel_cluster(points.to(device), 0.8, lengths=lengths.to(device))
    packed = ops.voxel_cluster(points[inside].to(device), 0.8, offsets=offsets)
    assert torch.equal(padded.cluster[inside.to(device)], packed.cluster)
    assert int(padded.count) == int(packed.count)
    assert torch.equal(padded.start[: len(packed.start)], packed.start)
    valid = int(packed.start[-1])
    rows = torch.arange(clouds * 90, device=device)[inside.flatten().to(device)]
    assert torch.equal(padded.order[:valid], rows[packed.order[:valid]])


@pytest.mark.parametrize("rows", [50, 1500])
def test_ends_of_int32(device: str, rows: int) -> None:
    """Coordinates that need all 32 bits on every axis, which no 64-bit key of three can hold."""
    ends = torch.tensor([-(2.0**31), -1.0, 0.0, 1.0, 2.0**31 - 128], dtype=torch.float64)
    points = ends[torch.randint(0, 5, (2, rows, 3))]
    origin = torch.zeros(3, dtype=torch.float64)
    want = reference.voxel_cluster(points, 1.0, origin=origin)
    assert_same(ops.voxel_cluster(points.to(device), 1.0, origin=origin.to(device)), want)
    offsets = torch.tensor([0, rows, 2 * rows])
    want = reference.voxel_cluster(points.flatten(0, 1), 1.0, offsets=offsets, origin=origin)
    got = ops.voxel_cluster(
        points.flatten(0, 1).to(device), 1.0, offsets=offsets.to(device), origin=origin.to(device)
    )
    assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [50, 1500])
def test_beyond_int32_on_cuda(rows: int) -> None:
    """No cluster for such a point: never a wrong one, and never a wait."""
    points = torch.rand(1, rows, 3, device="cuda")
    points[0, 7, 1], points[0, 9, 0] = 3e9, -3e9
    got = ops.voxel_cluster(points, 1.0, origin=torch.zeros(3, device="cuda"))
    assert got.cluster[0, [7, 9]].tolist() == [-1, -1]
    assert int((got.cluster < 0).sum()) == 2
    assert got.order[-2:].tolist() == [7, 9]


def test_bits_of_the_quotient(device: str) -> None:
    """Points on the faces of voxels: float32 subtraction and division, as NumPy rounds them."""
    points = (torch.arange(4000) * 0.1).reshape(1, -1, 1)
    want = np.trunc((points.numpy() - points.numpy().min()) / np.float32(0.1)).ravel()
    got = ops.voxel_cluster(points.to(device), 0.1)
    assert np.array_equal(got.cluster[0].cpu().numpy(), np.unique(want, return_inverse=True)[1])


def test_16_bit_points_are_widened(device: str) -> None:
    points = torch.rand(2, 40, 3, device=device).half()
    assert_same(ops.voxel_cluster(points, 0.1), ops.voxel_cluster(points.float(), 0.1))


def test_does_not_depend_on_threads() -> None:
    points, threads = torch.rand(7, 500, 3), torch.get_num_threads()
    want = ops.voxel_cluster(points, 0.1)
    try:
        torch.set_num_threads(1)
        assert_same(ops.voxel_cluster(points, 0.1), want)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
def test_broken_offsets_on_cuda_stay_in_bounds() -> None:
    points = torch.rand(100, 3, device="cuda")
    for offsets in ([0, 500, -3, 100], [50, 40, 30], [7], [-(2**40), 2**40]):
        got = ops.voxel_cluster(points, 0.2, offsets=torch.tensor(offsets, device="cuda"))
        assert sorted(got.order.tolist()) == list(range(100))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    rows = (1 << 31) // 3 + 1000
    points = torch.zeros(rows, 3, device="cuda")
    points[:, 0] = torch.arange(rows, device="cuda") >> 16
    got = ops.voxel_cluster(points, 1.0, offsets=torch.tensor([0, rows], device="cuda"))
    assert int(got.count) == (rows - 1 >> 16) + 1
    for begin in (0, rows // 2, rows - 5000):
        part = torch.arange(begin, begin + 5000, device="cuda")
        assert torch.equal(got.order[part], part)
        assert torch.equal(got.cluster[part], part >> 16)
