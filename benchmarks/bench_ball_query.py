"""ball_query (both modes) against a SciPy tree (CPU) and cdist + topk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from any2point import ops
from benchmarks import common, peers

SHAPES = [(512, 1024, 0.2, 32), (2048, 8192, 0.1, 32)]  # queries, points, radius, k


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["any2point nearest", "any2point first", "torch cdist+topk"])
def test_ball_query(measure: Callable[..., Any], provider: str, shape: tuple[Any, ...], device: str) -> None:
    queries, rows, radius, k = shape
    points = torch.from_numpy(common.cloud("ball", 1, rows)).to(device)
    query = points[:, :queries].contiguous()
    if provider == "torch cdist+topk":
        call = lambda: peers.torch_knn(query, points, k)  # noqa: E731
    else:
        mode = provider.split()[-1]
        call = lambda: ops.ball_query(query, points, radius, k, mode=mode)  # noqa: E731
        index, distance, count = (part[0].cpu().numpy() for part in call())
        squared = (query[0, :, None].double() - points[0].double()).square().sum(-1).cpu().numpy()
        inside = squared < np.float32(radius) ** 2
        edge = (np.abs(squared - radius**2) < 1e-6).sum(1)
        assert (np.abs(count - np.minimum(inside.sum(1), k)) <= edge).all()
        valid = index >= 0
        assert (valid.sum(1) == count).all()
        picked = np.take_along_axis(squared, np.where(valid, index, 0), 1)
        np.testing.assert_allclose(distance[valid], picked[valid], rtol=1e-5, atol=1e-6)
    cost = common.cost_knn(1, queries, rows, k)
    name = f"ball 1,{queries},{rows},r={radius},{k}"
    measure(call, op="ball_query", provider=provider, shape=name, device=device, cost=cost)
