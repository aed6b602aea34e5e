"""knn: the contract, batches, broken input, gradients. Exactness is in test_knn_exact.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from neighbour_clouds import grid
from op_contract import OpContract, Sample, assert_same
from torch import Tensor

from any2point import ops, reference


class TestKnn(OpContract):
    op = staticmethod(ops.knn)
    reference = staticmethod(reference.knn)
    differentiable = ("query", "points")
    double_backward = True

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, query: Tensor, points: Tensor, k: int, **more: Any) -> Sample:
            return Sample(name, dict(query=query, points=points, k=k, **more)).to(device)

        yield sample("plain", grid(2, 7, 3), grid(2, 33, 3, seed=1), 5)
        yield sample("a lattice", grid(1, 9, 3, steps=2), grid(1, 70, 3, steps=2, seed=1), 12)
        yield sample("by index", grid(2, 7, 3), grid(2, 40, 3, seed=1), 6, sorted=False)
        yield sample(
            "lengths",
            grid(3, 6, 3),
            grid(3, 20, 3, seed=1),
            4,
            query_lengths=torch.tensor([6, 0, 3]),
            lengths=torch.tensor([0, 20, 2]),
        )
        yield sample(
            "offsets",
            grid(9, 3),
            grid(30, 3, seed=1),
            4,
            query_offsets=torch.tensor([0, 0, 5, 8, 9]),
            offsets=torch.tensor([0, 10, 10, 28, 30]),
        )
        yield sample("few points", grid(1, 3, 3), grid(1, 4, 3, seed=1), 9, sorted=False)
        for dim in (1, 2, 5):
            yield sample(f"D = {dim}", grid(2, 5, dim), grid(2, 17, dim, seed=1), 3)
        points = grid(2, 30, 3, steps=3)  # many coincide
        for is_sorted in (True, False):
            yield sample("no selves", points, points, 6, exclude_self=True, sorted=is_sorted)
            more = dict(k_per_cloud=torch.tensor([4, 0]), sorted=is_sorted)
            yield sample("k per cloud", grid(2, 7, 3), grid(2, 33, 3, seed=1), 5, **more)
        yield sample(
            "no selves, k per cloud, offsets",
            grid(30, 3),
            grid(30, 3),
            4,
            query_offsets=torch.tensor([0, 0, 11, 28, 30]),
            offsets=torch.tensor([0, 0, 11, 28, 30]),
            exclude_self=True,
            k_per_cloud=torch.tensor([1, 3, 4, 2]),
        )
        yield sample("k = 0", grid(1, 3, 3), grid(1, 4, 3), 0)
        yield sample("no points", grid(1, 3, 3), grid(1, 0, 3), 2)
        yield sample("no clouds", grid(0, 3, 3), grid(0, 4, 3), 2)

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        query, points = torch.rand(2, 3, 3, dtype=torch.float64), torch.rand(2, 6, 3, dtype=torch.float64)
        lengths = dict(query_lengths=torch.tensor([3, 2]), lengths=torch.tensor([2, 6]))
        yield Sample("padded", dict(query=query, points=points, k=2)).to(device)
        yield Sample("lengths", dict(query=query, points=points, k=2, **lengths)).to(device)
        offsets = dict(query_offsets=torch.tensor([0, 4, 6]), offsets=torch.tensor([0, 3, 12]))
        packed = dict(query=query.flatten(0, 1), points=points.flatten(0, 1))
        yield Sample("packed", dict(**packed, k=3, **offsets)).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        rows = torch.zeros(5, 3)
        yield dict(query=[0.0]), TypeError, r"query: expected a tensor"
        yield dict(query=rows), ValueError, r"query: expected shape \[B, N, D\]"
        yield dict(query=torch.zeros(2, 7, 4)), ValueError, r"query: expected D = 3"
        yield dict(query=torch.zeros(1, 7, 3)), ValueError, r"query: expected 2 clouds"
        yield dict(query=torch.zeros(2, 7, 3).double()), TypeError, r"query: expected torch.float32"
        yield dict(points=torch.zeros(2, 7, 3).long()), TypeError, r"points: expected float16"
        yield (
            dict(query=torch.zeros(2, 7, 0), points=torch.zeros(2, 7, 0)),
            ValueError,
            r"points: expected D >= 1",
        )
        yield dict(k=-1), ValueError, r"k: expected at least 0"
        yield (
            dict(query=torch.zeros(2, 7, 3), exclude_self=True),
            ValueError,
            r"query: expected \d+ rows like",
        )
        yield dict(k_per_cloud=torch.tensor([1])), ValueError, r"k_per_cloud: expected shape \[B\]"
        yield dict(k_per_cloud=torch.tensor([1.0, 1.0])), TypeError, r"k_per_cloud: expected int64"
        for values in ([1, 99], [-1, 1]):
            wrong = torch.tensor(values)
            yield dict(k_per_cloud=wrong), ValueError, r"k_per_cloud: expected values in 0..k = \d+, got"
        yield dict(k=1.5), TypeError, r"k: expected an int"
        yield dict(lengths=torch.tensor([1, 99])), ValueError, r"lengths: expected values in 0..N"
        yield dict(query_lengths=torch.tensor([1])), ValueError, r"query_lengths: expected shape \[B\]"
        yield dict(offsets=torch.tensor([0, 5])), ValueError, r"query_offsets: expected a tensor"
        yield (
            dict(query=rows, query_offsets=torch.tensor([0, 5])),
            ValueError,
            r"offsets: expected a tensor, as query_offsets",
        )
        packed = dict(query=rows, points=rows, query_offsets=torch.tensor([0, 5]))
        yield packed | dict(offsets=torch.tensor([0, 2, 5])), ValueError, r"query: expected 2 clouds"
        yield packed | dict(offsets=torch.tensor([0, 4])), ValueError, r"offsets: expected 0, ..., P = 5"


def test_packed_and_padded_agree() -> None:
    """Empty clouds first, in the middle and last; rows beyond the lengths hold anything."""
    sizes, queries = [0, 40, 0, 3, 70, 1, 0], [2, 30, 0, 0, 11, 5, 4]
    points, query = grid(7, 75, 3), grid(7, 33, 3, seed=1)
    for b, (n, s) in enumerate(zip(sizes, queries)):
        points[b, n:] = torch.nan if b % 2 else 0.5
        query[b, s:] = 0.25
    lengths, query_lengths = torch.tensor(sizes), torch.tensor(queries)
    for is_sorted in (True, False):
        padded = ops.knn(query, points, 4, query_lengths=query_lengths, lengths=lengths, sorted=is_sorted)
        packed = ops.knn(
            torch.cat([q[:s] for q, s in zip(query, queries)]),
            torch.cat([p[:n] for p, n in zip(points, sizes)]),
            4,
            query_offsets=torch.tensor([0, *queries]).cumsum(0),
            offsets=torch.tensor([0, *sizes]).cumsum(0),
            sorted=is_sorted,
        )
        rows = torch.tensor([0, *sizes]).cumsum(0)
        index = torch.where(padded.index >= 0, padded.index + rows[:-1, None, None], -1)
        assert_same(packed.index, torch.cat([i[:s] for i, s in zip(index, queries)]))
        assert_same(packed.distance, torch.cat([d[:s] for d, s in zip(padded.distance, queries)]))
        for b, s in enumerate(queries):
            assert (padded.index[b, s:] == -1).all()
            assert padded.distance[b, s:].isposinf().all()


def test_lengths_may_be_int32() -> None:
    lengths = torch.tensor([3, 8])
    want = ops.knn(grid(2, 5, 3), grid(2, 8, 3, seed=1), 4, lengths=lengths)
    assert_same(ops.knn(grid(2, 5, 3), grid(2, 8, 3, seed=1), 4, lengths=lengths.int()), want)


def test_points_that_are_not_finite_are_no_neighbours() -> None:
    points, query = grid(1, 300, 3), grid(1, 40, 3, seed=1)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        points[0, i::7, i] = value
        query[0, i::9, i] = value
    broken = ~points[0].isfinite().all(1)
    index, distance = ops.knn(query, points, 300)
    assert_same((index, distance), reference.knn(query, points, 300))
    found = index[0][index[0] >= 0]
    assert not broken[found].any()
    no_query = ~query[0].isfinite().all(1)
    assert (index[0, no_query] == -1).all()
    assert ((index[0, ~no_query] >= 0).sum(1) == (~broken).sum()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [40, 3000])
def test_overflowed_distances_come_last_by_index(n: int, dtype: torch.dtype) -> None:
    """Finite points whose squared distance is infinite are neighbours still."""
    huge = 3e38 if dtype == torch.float32 else 1e308
    points = torch.full((1, n, 3), huge, dtype=dtype)
    points[0, ::2] *= -1
    points[0, 5] = 0
    points[0, 7, 0] = torch.nan
    query = torch.zeros(1, n // 4, 3, dtype=dtype)
    query[0, 1:] = points[0, 6]
    index, distance = ops.knn(query, points, 6)
    assert index[0, 0].tolist() == [5, 0, 1, 2, 3, 4]
    assert index[0, 1].tolist() == [0, 2, 4, 6, 8, 10]
    assert distance[0, 0].tolist() == [0] + [torch.inf] * 5
    assert_same(ops.knn(query, points, 6, sorted=False).index[0, 0], torch.arange(6))


def test_a_query_of_many_coincident_points_is_not_its_own_neighbour() -> None:
    points = torch.zeros(1, 300, 3)
    points[0, 250:] = 1
    index, distance = ops.knn(points, points, 5, exclude_self=True)
    assert index[0, 0].tolist() == [1, 2, 3, 4, 5]
    assert index[0, 2].tolist() == [0, 1, 3, 4, 5]
    assert index[0, 200].tolist() == [0, 1, 2, 3, 4]
    assert (distance == 0).all()


def test_gradient_without_selves_and_with_k_of_each_cloud() -> None:
    points = torch.rand(2, 9, 3, dtype=torch.float64).requires_grad_()
    more = dict(exclude_self=True, k_per_cloud=torch.tensor([2, 4]))
    results = []
    for knn in (ops.knn, reference.knn):
        distance = knn(points, points, 4, **more)[1]
        results.append(torch.autograd.grad(distance[distance.isfinite()].sum(), points)[0])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [60, 2500])
def test_gradient_is_that_of_the_reference(n: int) -> None:
    query, points = (x.double().requires_grad_() for x in (grid(1, 700, 3), grid(1, n, 3, seed=1)))
    weight = torch.rand(1, 700, 5, dtype=torch.float64)
    got = torch.autograd.grad((ops.knn(query, points, 5).distance * weight).sum(), (query, points))
    want = torch.autograd.grad((reference.knn(query, points, 5)[1] * weight).sum(), (query, points))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradient_of_zero_distances_and_missing_neighbours() -> None:
    points = torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [torch.nan, 0.0, 0.0]]], requires_grad=True)
    query = torch.tensor([[[1.0, 2.0, 3.0], [torch.inf, 0.0, 0.0]]], requires_grad=True)
    index, distance = ops.knn(query, points, 4)
    assert index.tolist() == [[[0, 1, -1, -1], [-1, -1, -1, -1]]]
    grads = torch.autograd.grad(distance, (query, points), torch.full_like(distance, 3.0), create_graph=True)
    for grad in grads:
        assert (grad == 0).all()
    # Whatever comes in for a missing neighbour goes nowhere.
    incoming = torch.where(index >= 0, 1.0, torch.nan)
    for grad in torch.autograd.grad(distance, (query, points), incoming):
        assert (grad == 0).all()


def test_gradient_flows_to_low_precision_inputs() -> None:
    query, points = (grid(1, 5, 3, seed=i).half().requires_grad_() for i in range(2))
    ops.knn(query, points, 2).distance.sum().backward()
    assert query.grad is not None
    assert query.grad.dtype == torch.float16
    assert points.grad is not None


def test_mixed_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"query_offsets: expected a tensor, as offsets is given"):
        ops.knn(grid(1, 5, 3), grid(5, 3), 2, offsets=torch.tensor([0, 5]))


def test_raw_op_checks_what_it_is_given() -> None:
    """A direct call of the registered op raises instead of reading out of bounds."""
    op, query, points = torch.ops.any2point.knn, grid(2, 5, 3), grid(2, 6, 3)
    none = (None, None, None, None, True)
    for args in (
        (query[0], points, 2, *none),
        (query[:1], points, 2, *none),
        (query[..., :2], points, 2, *none),
        (query.double(), points, 2, *none),
        (query.half(), points.half(), 2, *none),
        (query, points, -1, *none),
        (query[..., :0], points[..., :0], 1, *none),
        (query, points, 2, torch.tensor([1]), None, None, None, True),
        (query, points, 2, torch.tensor([1.0, 1.0]), None, None, None, True),
        (query[0], points, 2, None, None, torch.tensor([0, 5]), None, True),
    ):
        with pytest.raises(RuntimeError):
            op(*args)
    # Lengths and offsets out of range are clamped.
    wild = torch.tensor([-5, 99])
    index, _ = op(query, points, 2, wild, wild, None, None, True)[::-1]
    assert (index[0] == -1).all()
    assert (index[1] >= 0).all()
    index, _ = op(query[0], points[0], 2, None, None, wild, torch.tensor([3, -9]), True)[::-1]
    assert index.max() < 6
