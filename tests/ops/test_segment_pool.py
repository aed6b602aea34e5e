"""segment_pool: the contract for every reduction, ties and NaN, prebuilt lists, long and empty segments."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from neighbour_clouds import LEVELS, simd
from op_contract import OpContract, Sample, assert_same

from any2point import ops, reference


class Pooling(OpContract):
    op = staticmethod(ops.segment_pool)
    reference = staticmethod(reference.segment_pool)
    differentiable = ("features",)
    double_backward = True
    reduce: str

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, features: tuple[int, ...], segments: int, low: int = -1) -> Sample:
            # Eighths: exact in 16 bits, with ties between rows
            values = torch.randint(-32, 33, features) / 8
            segment = (
                torch.randint(low, segments, features[:-1]) if segments else torch.full(features[:-1], -1)
            )
            kwargs = dict(features=values, segment=segment, num_segments=segments, reduce=self.reduce)
            return Sample(name, kwargs).to(device)

        yield sample("plain", (23, 5), 6)
        yield sample("batched", (2, 9, 8), 4)
        for channels in (1, 3, 96, 97, 300):
            yield sample(f"C = {channels}", (19, channels), 5)
        yield sample("one segment", (700, 4), 1)
        yield sample("mostly empty", (7, 4), 90)
        yield sample("no rows", (0, 4), 3)
        yield sample("no segments", (5, 4), 0)
        yield sample("no channels", (5, 0), 3)
        yield sample("no clouds", (0, 5, 4), 3)
        nothing = sample("no row in a segment", (6, 3), 4)
        yield Sample(nothing.name, nothing.kwargs | dict(segment=torch.full((6,), -1, device=device)))
        short = sample("int32 segment", (9, 6), 4)
        yield Sample(short.name, short.kwargs | dict(segment=short.kwargs["segment"].int()))
        listed = sample("prebuilt list", (25, 6), 5)
        order = torch.where(listed.kwargs["segment"] < 0, 5, listed.kwargs["segment"]).argsort(stable=True)
        counts = torch.bincount(listed.kwargs["segment"] + 1, minlength=6)[1:]
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        yield Sample(listed.name, listed.kwargs | dict(order=order, start=start))

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        # A shuffled ramp: no two values are close, so the maximum has a derivative.
        features = torch.randperm(2 * 7 * 3).reshape(14, 3).double() / 4
        segment = torch.tensor([0, 2, -1, 0, 0, 2, 4, 0, 2, 2, -1, 4, 0, 2])
        kwargs = dict(features=features, segment=segment, num_segments=6, reduce=self.reduce)
        yield Sample("ramp", kwargs).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        order, start = torch.arange(23), torch.zeros(7).long()
        yield dict(features=[1.0]), TypeError, r"features: expected a tensor"
        yield dict(features=torch.zeros(23)), ValueError, r"features: expected shape \[R, C\]"
        yield dict(features=torch.zeros(23, 5).long()), TypeError, r"features: expected float16"
        yield dict(segment=torch.zeros(22).long()), ValueError, r"segment: expected shape \[23\]"
        yield dict(segment=torch.zeros(23)), TypeError, r"segment: expected int64"
        yield dict(num_segments=-1), ValueError, r"num_segments: expected at least 0"
        yield dict(num_segments=2.0), TypeError, r"num_segments: expected an int"
        yield dict(reduce="min"), ValueError, r"reduce: expected 'mean', 'max' or 'sum', got 'min'"
        yield dict(order=order), ValueError, r"order, start: expected both"
        yield dict(order=order[1:], start=start), ValueError, r"order: expected shape \[R\] = \[23\]"
        yield dict(order=order, start=start[1:]), ValueError, r"start: expected at least 7 values"
        yield dict(order=order, start=start.float()), TypeError, r"start: expected int64"
        yield dict(segment=torch.full((23,), 6)), ValueError, r"^segment: expected values in -1..5, got 6 at"


class TestSum(Pooling):
    reduce = "sum"


class TestMean(Pooling):
    reduce = "mean"


class TestMax(Pooling):
    reduce = "max"


def test_maximum_goes_to_the_lowest_row(device: str) -> None:
    features = torch.tensor([[1.0, 5.0], [3.0, 5.0], [3.0, 5.0], [-1.0, -2.0]], device=device)
    features.requires_grad_()
    segment = torch.tensor([0, 0, 0, 2], device=device)
    got = ops.segment_pool(features, segment, 3, "max")
    assert got.tolist() == [[3, 5], [0, 0], [-1, -2]]
    got.sum().backward()
    assert features.grad is not None
    assert features.grad.tolist() == [[0, 1], [1, 0], [0, 0], [1, 1]]


def test_nan_is_the_maximum(device: str) -> None:
    rows = [[1.0], [torch.nan], [torch.inf], [torch.nan], [-torch.inf], [-torch.inf]]
    features = torch.tensor(rows, device=device, requires_grad=True)
    segment = torch.tensor([0, 0, 0, 0, 1, 1], device=device)
    got = ops.segment_pool(features, segment, 2, "max")
    assert bool(got[0].isnan())
    assert got[1].item() == -torch.inf
    got.sum().backward()
    assert features.grad is not None
    assert features.grad.flatten().tolist() == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("segments", [1, 3, 700, 3000])
@pytest.mark.parametrize("channels", [1, 4, 33])
def test_against_torch(device: str, segments: int, channels: int) -> None:
    """index_add and scatter_reduce on whole numbers, where the order of the sum does not matter."""
    rows = 9000
    features = torch.randint(-9, 10, (rows, channels), device=device).float()
    segment = torch.randint(0, segments, (rows,), device=device)
    total = torch.zeros(segments, channels, device=device).index_add_(0, segment, features)
    count = torch.bincount(segment, minlength=segments)[:, None]
    place = segment[:, None].expand(rows, channels)
    most = torch.zeros(segments, channels, device=device)
    most = most.scatter_reduce(0, place, features, "amax", include_self=False)
    for reduce, want in (("sum", total), ("mean", total / count.clamp(min=1)), ("max", most)):
        assert torch.equal(ops.segment_pool(features, segment, segments, reduce), want), reduce


@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_list_of_voxel_cluster(device: str, reduce: str) -> None:
    """The list that voxel_cluster returns gives the same bits, forward and backward."""
    points = torch.rand(3, 60, 3, device=device)
    points[1, 5] = torch.nan
    lengths = torch.tensor([60, 0, 20], device=device)
    voxels = ops.voxel_cluster(points, 0.3, lengths=lengths)
    features = torch.randn(3, 60, 12, device=device, requires_grad=True)
    results = []
    for extra in ({}, dict(order=voxels.order, start=voxels.start)):
        pooled = ops.segment_pool(features, voxels.cluster, 180, reduce, **extra)
        results.append((pooled, *torch.autograd.grad(pooled.square().sum(), features)))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_broken_list_stays_in_bounds(device: str) -> None:
    """Nonsense for a list gives nonsense, not a crash."""
    features, segment = torch.randn(40, 3, device=device), torch.zeros(40, dtype=torch.int64, device=device)
    order = torch.tensor([2**40, -(2**40)] * 20, device=device)
    start = torch.tensor([-(2**40), 2**40, 30, 7, 1 << 33], device=device)
    for reduce in ("sum", "mean", "max"):
        got = ops.segment_pool(features, segment, 4, reduce, order=order, start=start)
        assert got.shape == (4, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_long_segments_in_16_bits(device: str, dtype: torch.dtype) -> None:
    features = torch.ones(30000, 8, device=device, dtype=dtype)
    segment = torch.zeros(30000, dtype=torch.int64, device=device)
    assert ops.segment_pool(features, segment, 1, "mean").tolist() == [[1.0] * 8]
    want = torch.tensor(30000.0).to(dtype).item()
    assert ops.segment_pool(features, segment, 1, "sum").tolist() == [[want] * 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype) -> None:
    features, segment = torch.randn(300, 41).to(dtype), torch.randint(-1, 9, (300,))
    features[7, 3], features[200, 4] = torch.nan, torch.inf
    results = []
    for level in LEVELS:
        with simd(level):
            results.append([ops.segment_pool(features, segment, 9, r) for r in ("sum", "mean", "max")])
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_more_than_2_to_the_31_elements(reduce: str) -> None:
    channels, rows = 512, (1 << 31) // 512 + 1000
    features = torch.zeros(rows, channels, device="cuda", dtype=torch.float16)
    features[-1] = 3
    segment = torch.arange(rows, device="cuda") // 1024
    features.requires_grad_()
    pooled = ops.segment_pool(features, segment, rows // 1024 + 1, reduce)
    assert (pooled[-1] == 3).all()
    assert not pooled[:-1].any()
    (grad,) = torch.autograd.grad(pooled[-1].sum(), features)
    assert (grad[-1] == 1).all()
