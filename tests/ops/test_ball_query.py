"""ball_query: the contract, then its edges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from neighbour_clouds import CLOUDS, LEVELS, cloud, grid, simd
from op_contract import OpContract, Sample, assert_same
from torch import Tensor

from any2point import ops, reference

MODES = ("nearest", "first")


class TestBallQuery(OpContract):
    op = staticmethod(ops.ball_query)
    reference = staticmethod(reference.ball_query)
    differentiable = ("query", "points")
    double_backward = True

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, query: Tensor, points: Tensor, radius: float, k: int, **more: Any) -> Sample:
            return Sample(name, dict(query=query, points=points, radius=radius, k=k, **more)).to(device)

        yield sample("plain", grid(2, 7, 3), grid(2, 33, 3, seed=1), 0.5, 5)
        yield sample("first", grid(2, 7, 3), grid(2, 33, 3, seed=1), 0.5, 5, mode="first")
        for mode in ("nearest", "first"):
            # Lattice distances that equal the radius exactly are outside.
            yield sample(
                "lattice", grid(1, 9, 3, steps=2), grid(1, 70, 3, steps=2, seed=1), 0.5, 6, mode=mode
            )
            yield sample(
                "lengths",
                grid(3, 6, 3),
                grid(3, 20, 3, seed=1),
                0.75,
                4,
                query_lengths=torch.tensor([6, 0, 3]),
                lengths=torch.tensor([0, 20, 2]),
                mode=mode,
            )
            yield sample(
                "offsets",
                grid(9, 3),
                grid(30, 3, seed=1),
                0.75,
                4,
                query_offsets=torch.tensor([0, 0, 5, 8, 9]),
                offsets=torch.tensor([0, 10, 10, 28, 30]),
                mode=mode,
            )
            yield sample("infinite", grid(1, 3, 2), grid(1, 4, 2, seed=1), float("inf"), 9, mode=mode)
            yield sample("k = 0", grid(1, 3, 3), grid(1, 4, 3), 1.0, 0, mode=mode)
            yield sample("no points", grid(1, 3, 3), grid(1, 0, 3), 1.0, 2, mode=mode)

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        query, points = torch.rand(2, 3, 3, dtype=torch.float64), torch.rand(2, 6, 3, dtype=torch.float64)
        for mode in ("nearest", "first"):
            yield Sample(mode, dict(query=query, points=points, radius=0.6, k=2, mode=mode)).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield dict(query=torch.zeros(2, 7, 4)), ValueError, r"query: expected D = 3"
        yield dict(query=torch.zeros(1, 7, 3)), ValueError, r"query: expected 2 clouds"
        yield dict(k=-1), ValueError, r"k: expected at least 0"
        yield dict(radius=0.0), ValueError, r"radius: expected more than 0"
        yield dict(radius=float("nan")), ValueError, r"radius: expected more than 0, got nan"
        for radius in ("1", True, torch.tensor(1.0)):
            yield dict(radius=radius), TypeError, r"radius: expected a float"
        yield dict(mode="last"), ValueError, r'mode: expected "nearest" or "first"'


def in_order(query: Tensor, points: Tensor, radius: float, k: int, mode: str) -> tuple[list, list]:
    """One query at a time, written out."""
    indices, counts = [], []
    limit = torch.tensor(radius, dtype=points.dtype).square()
    for q in query:
        distance = reference.squared_distance(q, points)
        inside = [i for i in range(len(points)) if distance[i] < limit]
        if mode == "nearest":
            inside.sort(key=lambda i: (float(distance[i]), i))
        counts.append(len(inside[:k]))
        indices.append(inside[:k] + [-1] * (k - counts[-1]))
    return indices, counts


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("radius", [1 / 256, 0.1, 0.25, 0.75, 5.0])
def test_written_out(mode: str, radius: float) -> None:
    query, points = grid(12, 3), grid(150, 3, steps=16, seed=1)
    for k in (1, 7, 200):
        index, distance, count = ops.ball_query(query[None], points[None], radius, k, mode=mode)
        indices, counts = in_order(query, points, radius, k, mode)
        assert index[0].tolist() == indices
        assert count[0].tolist() == counts
        assert (distance.isposinf() == (index < 0)).all()


def test_radius_is_squared_in_the_dtype() -> None:
    """A point at exactly the radius is outside, in float32 and in float64."""
    for dtype in (torch.float32, torch.float64):
        radius = 0.1
        edge = torch.tensor(radius, dtype=dtype)
        points = torch.zeros(1, 3, 1, dtype=dtype)
        points[0, :, 0] = torch.stack([edge, torch.nextafter(edge, edge * 0), -edge])
        found = ops.ball_query(torch.zeros(1, 1, 1, dtype=dtype), points, radius, 3)
        assert found.index.tolist() == [[[1, -1, -1]]]


def test_extreme_radii() -> None:
    query, points = torch.zeros(1, 1, 3), torch.zeros(1, 2, 3)
    points[0, 1] = 1e30  # its squared distance is infinite, and so is not less than an infinite radius
    for mode in MODES:
        assert ops.ball_query(query, points, 1e-30, 2, mode=mode).count.item() == 0  # the square is 0
        assert ops.ball_query(query, points, 1e-18, 2, mode=mode).count.item() == 1
        assert ops.ball_query(query, points, float("inf"), 2, mode=mode).index.tolist() == [[[0, -1]]]
        assert ops.ball_query(query, points, 1e300, 2, mode=mode).index.tolist() == [[[0, -1]]]


@pytest.mark.parametrize("name", CLOUDS)
def test_large_clouds_and_every_instruction_set(name: str) -> None:
    """Enough queries and points for the tree; the same bits at every SIMD level."""
    points = cloud(name, 3000)[None]
    query = points[:, ::4]
    distance = ops.knn(query, points, 8).distance
    radius = float(distance[distance.isfinite()].double().median().sqrt().clamp(1e-20, 1e38)) * 1.5
    for mode, k in (("nearest", 1), ("nearest", 20), ("first", 20)):
        want = reference.ball_query(query, points, radius, k, mode=mode)
        for level in LEVELS:
            with simd(level):
                assert_same(
                    ops.ball_query(query, points, radius, k, mode=mode), want, f"{name} {mode} {level}"
                )


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 70), s=st.integers(0, 5), dim=st.integers(1, 4), k=st.integers(0, 40),
    steps=st.sampled_from([1, 3, 64]), radius=st.sampled_from([0.25, 0.5, 1.0, 2.0]),
    mode=st.sampled_from(MODES), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_small_cloud(
    n: int, s: int, dim: int, k: int, steps: int, radius: float, mode: str, seed: int
) -> None:
    query, points = grid(1, s, dim, steps=steps, seed=seed), grid(1, n, dim, steps=steps, seed=seed + 1)
    got = ops.ball_query(query, points, radius, k, mode=mode)
    assert_same(got, reference.ball_query(query, points, radius, k, mode=mode))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_gives_the_same_bits(name: str, mode: str) -> None:
    for n in (100, 1024, 3000):
        points = cloud(name, n)[None]
        query = points[:, 1::3]  # holes are every third
        distance = ops.knn(query, points, 8).distance
        radius = float(distance[distance.isfinite()].double().median().sqrt().clamp(1e-20, 1e38)) * 1.5
        for k in (1, 20, 150, 500):
            want = ops.ball_query(query, points, radius, k, mode=mode)
            assert_same(ops.ball_query(query.cuda(), points.cuda(), radius, k, mode=mode), want, f"{n} {k}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_tree(name: str, mode: str) -> None:
    """Clouds large enough for the tree of boxes."""
    points = cloud(name, 60_000)[None]
    query = points[:, 1::151]  # some of the holes among them
    distance = ops.knn(query, points, 8).distance
    near = float(distance[distance.isfinite()].double().median().sqrt().clamp(1e-20, 1e38)) * 1.5
    for radius in (near, 100 * near):
        for k in (1, 32, 100):
            want = ops.ball_query(query, points, radius, k, mode=mode)
            got = ops.ball_query(query.cuda(), points.cuda(), radius, k, mode=mode)
            assert_same(got, want, f"{radius} {k}")
