"""voxel_cluster against floor + unique in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from any2point import ops
from benchmarks import common

SHAPES = [(32, 128, 0.08), (1, 100_000, 0.05)]  # clouds, points, voxel edge


def composed(points: Tensor, size: float) -> Tensor:
    """Cluster of each point, numbered by (cloud, z, y, x)."""
    voxel = ((points - points.amin(1, keepdim=True)) / size).long()
    extent = voxel.amax((0, 1)) + 1
    cloud = torch.arange(len(points), device=points.device)[:, None]
    key = ((cloud * extent[2] + voxel[..., 2]) * extent[1] + voxel[..., 1]) * extent[0] + voxel[..., 0]
    return torch.unique(key, return_inverse=True)[1]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", ["any2point", "torch unique"])
def test_voxel_cluster(
    measure: Callable[..., Any], provider: str, shape: tuple[Any, ...], device: str
) -> None:
    batch, rows, size = shape
    points = torch.from_numpy(common.cloud("ball", batch, rows)).to(device)
    if provider == "any2point":
        call = lambda: ops.voxel_cluster(points, size)  # noqa: E731
        assert torch.equal(call().cluster, composed(points, size))
    else:
        call = lambda: composed(points, size)  # noqa: E731
    cost = common.Cost(batch * rows * (12 + 8 + 8 + 8))
    name = f"{batch},{rows},{size}"
    measure(call, op="voxel_cluster", provider=provider, shape=name, device=device, cost=cost)
