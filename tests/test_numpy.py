"""any2point.numpy: the same answers as the torch ops, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import any2point.numpy as a2n
from any2point import ops

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_imports_without_torch_and_fast() -> None:
    code = (
        "import sys, time, numpy; t = time.perf_counter(); import any2point.numpy as a;"
        "seconds = time.perf_counter() - t; assert 'torch' not in sys.modules;"
        "a.farthest_point_sample(numpy.random.rand(2000, 3), 50); assert 'torch' not in sys.modules;"
        "print(seconds)"
    )
    assert min(float(run(code)) for _ in range(3)) < 0.15


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (50, 3), (2000, 3), (2000, 2), (300, 6)])
def test_farthest_point_sample_equals_torch(dtype: type, n: int, dim: int) -> None:
    points = np.random.default_rng(n + dim).standard_normal((n, dim)).astype(dtype)
    samples = min(n + 2, 700)
    index, distance = a2n.farthest_point_sample(points, samples, start=n // 2, return_distance=True)
    want = ops.farthest_point_sample(
        torch.from_numpy(points)[None], samples, start=n // 2, return_distance=True
    )
    np.testing.assert_array_equal(index, want.index[0].numpy())
    np.testing.assert_array_equal(distance, want.distance[0].numpy())
    assert distance.dtype == want.distance.numpy().dtype


def test_farthest_point_sample_takes_views_and_lists_of_rows() -> None:
    points = np.random.default_rng(0).random((100, 6), dtype=np.float32)
    view = points[::2, ::-2]
    np.testing.assert_array_equal(
        a2n.farthest_point_sample(view, 20), a2n.farthest_point_sample(view.copy(), 20)
    )


def test_farthest_point_sample_of_nothing() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert a2n.farthest_point_sample(empty, 0).shape == (0,)
    assert a2n.farthest_point_sample(empty, 2).tolist() == [-1, -1]
    assert a2n.farthest_point_sample(np.full((3, 3), np.nan, np.float32), 2).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("points", "samples", "start", "exception", "pattern"),
    [
        (np.zeros(3), 1, 0, ValueError, r"points: expected shape \[N, D\] with D >= 1, got \[3\]"),
        (np.zeros((3, 0)), 1, 0, ValueError, r"points: expected shape \[N, D\] with D >= 1, got \[3, 0\]"),
        (np.zeros((3, 3), int), 1, 0, TypeError, r"points: expected float16, float32 or float64, got int64"),
        (None, 1, 0, TypeError, r"points: expected float16, float32 or float64, got object"),
        (np.zeros((3, 3)), -1, 0, ValueError, r"num_samples: expected at least 0, got -1"),
        (np.zeros((3, 3)), 1.0, 0, TypeError, r"num_samples: expected an int, got float"),
        (np.zeros((3, 3)), 1, -1, ValueError, r"start: expected at least 0, got -1"),
        (np.zeros((3, 3)), 1, "random", TypeError, r"start: expected an int, got str"),
    ],
)
def test_farthest_point_sample_refuses(points, samples, start, exception, pattern) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(exception, match=pattern):
        a2n.farthest_point_sample(points, samples, start=start)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (50, 1), (3000, 3), (300, 6)])
def test_neighbours_equal_torch(dtype: type, n: int, dim: int) -> None:
    points = np.random.default_rng(n + dim).standard_normal((n, dim)).astype(dtype)
    query = points[: max(1, n // 3)]
    pair = torch.from_numpy(query)[None], torch.from_numpy(points)[None]
    for k in (0, 1, 9, n + 1):
        for is_sorted in (True, False):
            got = a2n.knn(query, points, k, sorted=is_sorted)
            for a, b in zip(got, ops.knn(*pair, k, sorted=is_sorted), strict=True):
                np.testing.assert_array_equal(a, b[0].numpy())
        for mode in ("nearest", "first"):
            got = a2n.ball_query(query, points, 0.5, k, mode=mode)
            for a, b in zip(got, ops.ball_query(*pair, 0.5, k, mode=mode), strict=True):
                np.testing.assert_array_equal(a, b[0].numpy())


@pytest.mark.parametrize(
    ("changes", "exception", "pattern"),
    [
        (dict(query=np.zeros(3, np.float32)), ValueError, r"query: expected shape \[N, D\] with D >= 1"),
        (dict(query=np.zeros((2, 2), np.float32)), ValueError, r"query: expected D = 3 like `points`"),
        (dict(query=np.zeros((2, 3))), TypeError, r"query: expected float32 like `points`, got float64"),
        (dict(k=-1), ValueError, r"k: expected at least 0, got -1"),
        (dict(k=None), TypeError, r"k: expected an int, got NoneType"),
        (dict(radius=0), ValueError, r"radius: expected more than 0, got 0"),
        (dict(radius=np.nan), ValueError, r"radius: expected more than 0, got nan"),
        (dict(radius="wide"), TypeError, r"radius: expected a float, got str"),
        (dict(mode="last"), ValueError, r'mode: expected "nearest" or "first"'),
    ],
)
def test_neighbours_refuse(changes, exception, pattern) -> None:  # type: ignore[no-untyped-def]
    points = np.zeros((4, 3), np.float32)
    arguments = dict(query=points, points=points, radius=1.0, k=2) | changes
    with pytest.raises(exception, match=pattern):
        a2n.ball_query(**arguments)
    if not changes.keys() & {"radius", "mode"}:
        with pytest.raises(exception, match=pattern):
            a2n.knn(arguments["query"], points, arguments["k"])
