"""farthest_point_sample against fpsample (CPU) and the peers given by `--peers` (GPU)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common, peers

ops = common.require("farthest_point_sample")

SIZES = [(1024, 512), (2048, 512), (8192, 2048), (100_000, 25_000)]
GPU_SHAPES = [(32, 1024, 512), (32, 2048, 512), (32, 8192, 2048), (8, 16384, 4096), (1, 100_000, 25_000)]
OURS = ["any2point", "any2point.numpy"]


@cache
def reference(kind: str, rows: int, samples: int) -> np.ndarray:
    """Picks that the op must give: by the definition up to 8192 points, by fpsample's own picks above."""
    points = common.cloud(kind, 1, rows)
    if rows <= 8192 or not peers.samplers():
        # The shortest exact form: one pass per pick, in the library's fixed arithmetic.
        from any2point.reference import squared_distance

        cloud = torch.from_numpy(points[0])
        nearest, picks = torch.full((rows,), torch.inf), [0]
        for _ in range(samples - 1):
            nearest = torch.minimum(nearest, squared_distance(cloud, cloud[picks[-1]]))
            picks.append(int(nearest.argmax()))
        return np.array(picks)
    return peers.samplers()["fpsample kdline h=7"](points[0], samples)


@pytest.mark.parametrize("kind", ["cube", "surface"])
@pytest.mark.parametrize(("rows", "samples"), SIZES)
@pytest.mark.parametrize("provider", [*OURS, *peers.samplers()])
def test_cpu(measure: Callable[..., Any], provider: str, rows: int, samples: int, kind: str) -> None:
    points = common.cloud(kind, 1, rows)
    tensor = torch.from_numpy(points)
    if provider == "any2point":
        call = lambda: ops.farthest_point_sample(tensor, samples)  # noqa: E731
        picks = call()[0].numpy()
    else:
        if provider == "any2point.numpy":
            sample = getattr(pytest.importorskip("any2point.numpy"), "farthest_point_sample", None)
            if sample is None:
                pytest.skip("any2point.numpy has no farthest_point_sample")
        else:
            sample = peers.samplers()[provider]
        call = lambda: sample(points[0], samples)  # noqa: E731
        picks = call()
    exact = provider in OURS and rows <= 8192
    match = common.check_samples(picks, reference(kind, rows, samples), exact=exact, match=0.9)
    cost = common.cost_farthest_point_sample(1, rows, samples)
    measure(
        call,
        op="farthest_point_sample",
        provider=provider,
        shape=f"{kind} 1,{rows},{samples}",
        cost=cost,
        match=match,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(measure: Callable[..., Any], shape: tuple[int, int, int]) -> None:
    batch, rows, samples = shape
    points = torch.from_numpy(common.cloud("ball", batch, rows))
    device = points.cuda()
    match = common.check_samples(
        ops.farthest_point_sample(device, samples).cpu(), ops.farthest_point_sample(points, samples)
    )
    measure(
        lambda: ops.farthest_point_sample(device, samples),
        op="farthest_point_sample",
        provider="any2point",
        shape=f"ball {batch},{rows},{samples}",
        device="cuda",
        cost=common.cost_farthest_point_sample(*shape),
        match=match,
    )
