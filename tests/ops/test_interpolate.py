"""interpolate and inverse_distance_weight: the contract, missing neighbours, low precision, wrong indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from neighbour_clouds import LEVELS, simd
from op_contract import OpContract, Sample, assert_same

from any2point import ops, reference


class TestInterpolate(OpContract):
    op = staticmethod(ops.interpolate)
    reference = staticmethod(reference.interpolate)
    differentiable = ("features", "weight")
    double_backward = True

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, features: tuple[int, ...], index: tuple[int, ...]) -> Sample:
            rows = features[-2]
            picked = torch.randint(-1, max(rows, 1), index) if rows else torch.full(index, -1)
            kwargs = dict(features=torch.randn(features), index=picked, weight=torch.rand(index))
            return Sample(name, kwargs).to(device)

        yield sample("plain", (2, 9, 5), (2, 7, 3))
        yield sample("packed", (13, 8), (6, 4))
        for channels in (1, 3, 96, 97, 300):
            yield sample(f"C = {channels}", (2, 11, channels), (2, 5, 3))
        yield sample("one neighbour", (1, 5, 4), (1, 3, 1))
        yield sample("no rows", (2, 0, 4), (2, 3, 2))
        yield sample("no clouds", (0, 5, 4), (0, 3, 2))
        yield sample("no queries", (2, 5, 4), (2, 0, 2))
        yield sample("no neighbours", (2, 5, 4), (2, 3, 0))
        yield sample("no channels", (2, 5, 0), (2, 3, 2))
        short = sample("int32 index", (2, 9, 6), (2, 4, 3))
        yield Sample(short.name, short.kwargs | dict(index=short.kwargs["index"].int()))

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        index = torch.tensor([[[0, 3, -1], [3, 3, 1]]])
        weight = torch.rand(1, 2, 3).double()
        kwargs = dict(features=torch.randn(1, 4, 2).double(), index=index, weight=weight)
        yield Sample("padded", kwargs).to(device)
        yield Sample("packed", {name: value[0] for name, value in kwargs.items()}).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield dict(features=torch.zeros(9)), ValueError, r"features: expected shape"
        yield dict(features=torch.zeros(2, 9, 5).long()), TypeError, r"features: expected float16"
        yield dict(index=torch.zeros(2, 7).long()), ValueError, r"index: expected shape \[B, S, K\]"
        yield dict(index=torch.zeros(1, 7, 3).long()), ValueError, r"index: expected shape \[B, ...\]"
        yield dict(index=torch.zeros(2, 7, 3)), TypeError, r"index: expected int64"
        yield dict(weight=1.0), TypeError, r"weight: expected a tensor"
        yield dict(weight=torch.zeros(2, 7, 4)), ValueError, r"weight: expected shape \[2, 7, 3\]"
        yield dict(weight=torch.zeros(2, 7, 3).long()), TypeError, r"weight: expected float16"
        yield dict(weight=torch.zeros(2, 7, 3, device="meta")), ValueError, r"weight: expected .* on cpu"
        yield dict(index=torch.full((2, 7, 3), 9)), ValueError, r"^index: expected values in -1..8, got 9 at"


def test_missing_neighbours_do_not_count(device: str) -> None:
    """Not even with an infinite weight, in the result or a gradient."""
    features = torch.ones(1, 2, 3, device=device, requires_grad=True)
    weight = torch.tensor([[[0.5, torch.inf, torch.nan]]], device=device, requires_grad=True)
    got = ops.interpolate(features, torch.tensor([[[1, -1, -1]]], device=device), weight)
    assert got.tolist() == [[[0.5, 0.5, 0.5]]]
    got.sum().backward()
    assert weight.grad is not None
    assert features.grad is not None
    assert weight.grad.tolist() == [[[3.0, 0.0, 0.0]]]
    assert features.grad.tolist() == [[[0.0] * 3, [0.5] * 3]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_features_with_float32_weights(device: str, dtype: torch.dtype) -> None:
    """As under autocast: one rounding at the end, and each gradient in its own dtype."""
    features = torch.randn(2, 9, 24, device=device).to(dtype).requires_grad_()
    index = torch.randint(0, 9, (2, 30, 5), device=device)
    weight = torch.rand(2, 30, 5, device=device, requires_grad=True)
    got = ops.interpolate(features, index, weight)
    exact = (ops.group(features.detach().double(), index) * weight.detach().double()[..., None]).sum(-2)
    torch.testing.assert_close(got.detach(), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    got.sum().backward()
    assert weight.grad is not None
    assert features.grad is not None
    assert (features.grad.dtype, weight.grad.dtype) == (dtype, torch.float32)
    want = ops.group(features.detach().double(), index).sum(-1)
    torch.testing.assert_close(weight.grad.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_instruction_set_gives_the_same_bits(dtype: torch.dtype) -> None:
    features, index = torch.randn(2, 9, 41).to(dtype), torch.randint(-1, 9, (2, 30, 5))
    results = []
    for level in LEVELS:
        with simd(level):
            weight = torch.linspace(0, 1, 300, dtype=torch.float64).view(2, 30, 5).requires_grad_()
            got = ops.interpolate(features, index, weight)
            results.append([got, *torch.autograd.grad(got.sum(), weight)])
    for result in results[1:]:
        assert_same(result, results[0])


def test_one_gradient_at_a_time(device: str) -> None:
    features, weight = torch.randn(1, 4, 2, device=device), torch.rand(1, 3, 2, device=device)
    index = torch.tensor([[[0, 1], [1, 3], [2, -1]]], device=device)
    for leaf in (features, weight):
        leaf.requires_grad_()
        ops.interpolate(features, index, weight).sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        leaf.requires_grad_(False)


@pytest.mark.gpu
def test_wrong_index_on_cuda() -> None:
    features = torch.ones(1, 4, 5, device="cuda", requires_grad=True)
    weight = torch.ones(1, 3, 2, device="cuda", requires_grad=True)
    got = ops.interpolate(features, torch.tensor([[[0, 4], [1, 3], [-7, 2]]], device="cuda"), weight)
    assert got[0].isnan().any(-1).tolist() == [True, False, True]
    got.sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].isnan().tolist() == [[False, True], [False, False], [True, False]]


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    channels, queries = 512, (1 << 31) // 512 + 1000
    features = torch.randn(64, channels, device="cuda", dtype=torch.float16)
    index = (torch.arange(queries, device="cuda") % 64)[:, None]
    weight = torch.full((queries, 1), 2.0, device="cuda")
    got = ops.interpolate(features, index, weight)
    for begin in (0, queries - 1000):
        assert torch.equal(got[begin : begin + 1000], 2 * features[index[begin : begin + 1000, 0]])
    inner = torch.ops.any2point._interpolate_weight_grad(got[None], features[None], index[None])
    want = 2 * features[index[-1000:, 0]].float().square().sum(-1)
    torch.testing.assert_close(inner[0, -1000:, 0], want, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_inverse_distance_weight(device: str, dtype: torch.dtype) -> None:
    rows = [[1.0, 3.0, torch.inf], [0.0, 1.0, 2.0], [torch.inf] * 3, [0.0, 0.0, torch.inf]]
    distance = torch.tensor(rows, device=device).to(dtype)
    weight = ops.inverse_distance_weight(distance)
    assert weight.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = torch.tensor([[0.75, 0.25, 0], [1, 0, 0], [0, 0, 0], [0.5, 0.5, 0]]).to(weight)
    torch.testing.assert_close(weight, want, rtol=1e-6, atol=1e-6)
    if dtype != torch.float16:
        assert torch.equal(weight, reference.inverse_distance_weight(distance))


def test_gradient_of_inverse_distance_weight() -> None:
    distance = torch.rand(4, 3, dtype=torch.float64) + 0.1
    distance[1, 2] = torch.inf
    distance[2] = torch.inf
    distance.requires_grad_()
    (grad,) = torch.autograd.grad(ops.inverse_distance_weight(distance).square().sum(), distance)
    assert grad.isfinite().all()
    assert grad[2].tolist() == [0, 0, 0]
    inner = (torch.rand(4, 3, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(ops.inverse_distance_weight, inner)
    assert torch.autograd.gradgradcheck(ops.inverse_distance_weight, inner)


def test_inverse_distance_weight_refuses() -> None:
    for distance, eps, error in (
        ([1.0], 1e-8, TypeError),
        (torch.tensor([1]), 1e-8, TypeError),
        (torch.tensor(1.0), 1e-8, ValueError),
        (torch.ones(2), 0.0, ValueError),
        (torch.ones(2), "small", TypeError),
    ):
        with pytest.raises(error, match=r"(distance|eps): expected"):
            ops.inverse_distance_weight(distance, eps)  # type: ignore[arg-type]


def test_knn_to_features(device: str) -> None:
    """The whole of PointNet++'s feature propagation: exact at the centres, differentiable in the points."""
    centers = torch.rand(2, 20, 3, device=device)
    points = torch.cat([centers[:, :5], torch.rand(2, 11, 3, device=device)], 1).requires_grad_()
    features = torch.randn(2, 20, 6, device=device)
    neighbours = ops.knn(points, centers, 3)
    carried = ops.interpolate(features, neighbours.index, ops.inverse_distance_weight(neighbours.distance))
    torch.testing.assert_close(carried[:, :5], features[:, :5], rtol=1e-4, atol=1e-4)
    carried.sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()
