"""knn against k-d trees (CPU: build and query, one thread) and cdist + topk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from any2point import ops
from benchmarks import common, peers

# queries, points, k
SIZES = [(512, 1024, 81), (256, 512, 64), (512, 1024, 16), (2048, 8192, 32), (100_000, 100_000, 16)]
GPU_SHAPES = [(32, 512, 1024, 81), (32, 2048, 8192, 32), (1, 25_000, 100_000, 32), (1, 100_000, 100_000, 16)]
OURS = ["any2point", "any2point.numpy"]


@cache
def inputs(kind: str, batch: int, queries: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    points = common.cloud(kind, batch, rows)
    return np.ascontiguousarray(points[:, :queries]), points


@cache
def reference(kind: str, queries: int, rows: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours of some queries by the definition in float64: (which queries, index, squared distance)."""
    query, points = inputs(kind, 1, queries, rows)
    some = np.random.default_rng(1).choice(queries, min(queries, 512), replace=False)
    distance = torch.cdist(
        torch.from_numpy(query[0, some]).double(),
        torch.from_numpy(points[0]).double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    ).square()
    values, index = distance.topk(k, largest=False)
    return some, index.numpy(), values.numpy()


@pytest.mark.parametrize("kind", ["cube", "surface"])
@pytest.mark.parametrize(("queries", "rows", "k"), SIZES)
@pytest.mark.parametrize("provider", [*OURS, *peers.searches(), "torch cdist+topk"])
def test_cpu(measure: Callable[..., Any], provider: str, queries: int, rows: int, k: int, kind: str) -> None:
    query, points = inputs(kind, 1, queries, rows)
    squared = provider in OURS
    if provider == "any2point":
        a, b = torch.from_numpy(query), torch.from_numpy(points)
        call = lambda: ops.knn(a, b, k)  # noqa: E731
    elif provider == "torch cdist+topk":
        if queries * rows > 1 << 26:
            pytest.skip("the distance matrix does not fit")
        a, b = torch.from_numpy(query), torch.from_numpy(points)
        call = lambda: peers.torch_knn(a, b, k)  # noqa: E731
    elif provider == "any2point.numpy":
        numpy_ops = pytest.importorskip("any2point.numpy")
        call = lambda: numpy_ops.knn(query[0], points[0], k)  # noqa: E731
    else:
        call = lambda: peers.searches()[provider](query[0], points[0], k)  # noqa: E731
    index, distance = (np.asarray(part).reshape(queries, k) for part in call())
    some, expected, values = reference(kind, queries, rows, k)
    match = common.check_neighbors(
        index[some],
        distance[some] if squared else distance[some].astype(np.float64) ** 2,
        (expected, values),
        tolerance=1e-5 if provider != "torch cdist+topk" else 1e-2,
        match=0.999 if provider != "torch cdist+topk" else 0.99,
    )
    cost = common.cost_knn(1, queries, rows, k)
    measure(call, op="knn", provider=provider, shape=f"{kind} 1,{queries},{rows},{k}", cost=cost, match=match)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["any2point", *peers.GPU_PEERS])
def test_gpu(
    measure: Callable[..., Any], gpu_peer: Callable[..., Any], provider: str, shape: tuple[int, int, int, int]
) -> None:
    batch, queries, rows, k = shape
    query, points = (torch.from_numpy(part) for part in inputs("ball", batch, queries, rows))
    run, finish = gpu_peer(provider, "knn", ops.knn, query.cuda(), points.cuda(), k)
    expected, got = ops.knn(query, points, k), finish(run())
    if provider == "any2point":
        match = common.check_samples(got[0].cpu(), expected[0])
        torch.testing.assert_close(got[1].cpu(), expected[1], rtol=0, atol=0)
    else:
        match = common.check_neighbors(got[0].cpu(), got[1].cpu(), expected, tolerance=1e-4)
    measure(
        run,
        op="knn",
        provider=provider,
        shape=f"ball {batch},{queries},{rows},{k}",
        device="cuda",
        cost=common.cost_knn(*shape),
        match=match,
    )
