"""farthest_point_sample against fpsample (CPU) and the peers given by `--peers` (GPU)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from any2point import ops
from any2point.reference import squared_distance
from benchmarks import common, peers

SIZES = [(1024, 512), (2048, 512), (8192, 2048), (100_000, 25_000)]
GPU_SHAPES = [(32, 1024, 512), (32, 2048, 512), (32, 8192, 2048), (8, 16384, 4096), (1, 100_000, 25_000)]
OURS = ["any2point", "any2point.numpy"]
SAMPLERS = peers.samplers() | peers.approximate_samplers()


@cache
def reference(kind: str, rows: int, samples: int, start: int) -> np.ndarray:
    """Picks by the definition: one pass over the cloud per pick, in the library's fixed arithmetic."""
    cloud = torch.from_numpy(common.cloud(kind, 1, rows)[0])
    nearest, picks = torch.full((rows,), torch.inf), [start]
    for _ in range(samples - 1):
        nearest = torch.minimum(nearest, squared_distance(cloud, cloud[picks[-1]]))
        picks.append(int(nearest.argmax()))
    return np.array(picks)


def check(picks: np.ndarray, provider: str, kind: str, rows: int) -> float:
    """Small clouds: against the definition. Large ones: this library and fpsample against each other.

    fpsample's trees reorder the points before they look up the start, so each is checked from its first pick.
    """
    samples, start = len(picks), int(picks[0])
    assert len(np.unique(picks)) == samples
    match = 0.99 if provider not in peers.approximate_samplers() else 0.0
    if rows <= 8192:
        return common.check_samples(
            picks, reference(kind, rows, samples, start), exact=provider in OURS, match=match
        )
    points = torch.from_numpy(common.cloud(kind, 1, rows))
    if provider in OURS and peers.samplers():
        expected = peers.samplers()["fpsample kdline h=7"](points[0].numpy(), samples)
        again = ops.farthest_point_sample(points, samples, start=int(expected[0]))[0]
        common.check_samples(again, expected, exact=False, match=0.99)
    exact = provider in OURS
    return common.check_samples(
        picks, ops.farthest_point_sample(points, samples, start=start)[0], exact=exact, match=match
    )


@pytest.mark.parametrize("kind", ["cube", "surface"])
@pytest.mark.parametrize(("rows", "samples"), SIZES)
@pytest.mark.parametrize("provider", [*OURS, *SAMPLERS])
def test_cpu(measure: Callable[..., Any], provider: str, rows: int, samples: int, kind: str) -> None:
    points = common.cloud(kind, 1, rows)
    tensor = torch.from_numpy(points)
    if provider == "any2point":
        call = lambda: ops.farthest_point_sample(tensor, samples)[0]  # noqa: E731
    elif provider == "any2point.numpy":
        numpy_ops = pytest.importorskip("any2point.numpy")
        call = lambda: numpy_ops.farthest_point_sample(points[0], samples)  # noqa: E731
    else:
        call = lambda: SAMPLERS[provider](points[0], samples)  # noqa: E731
    match = check(np.asarray(call()).astype(np.int64), provider, kind, rows)
    measure(
        call,
        op="farthest_point_sample",
        provider=provider,
        shape=f"{kind} 1,{rows},{samples}",
        cost=common.cost_farthest_point_sample(1, rows, samples),
        match=match,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["any2point", *peers.GPU_PEERS])
def test_gpu(
    measure: Callable[..., Any], gpu_peer: Callable[..., Any], provider: str, shape: tuple[int, int, int]
) -> None:
    batch, rows, samples = shape
    points = torch.from_numpy(common.cloud("ball", batch, rows))
    run, finish = gpu_peer(provider, "fps", ops.farthest_point_sample, points.cuda(), samples)
    expected = ops.farthest_point_sample(points, samples)
    # Peers may order rounding's ties otherwise, and pointnet2_ops leaves points out: gpu.py looks closer.
    match = common.check_samples(finish(run()).cpu(), expected, exact=provider == "any2point")
    measure(
        run,
        op="farthest_point_sample",
        provider=provider,
        shape=f"ball {batch},{rows},{samples}",
        device="cuda",
        cost=common.cost_farthest_point_sample(*shape),
        match=match,
    )
