"""Which CUDA kernels knn and ball_query launch, for GPUs that need not be there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gpus import GPUS

import any2point.ops  # noqa: F401  # registers the ops

SIZES = (0, 1, 1024, 2048, 2049, 4096, 8192, 10_240, 16_384, 16_385, 100_000, 1_000_000, 2**30)


def launches(gpu: str, clouds: int, queries: int, points: int, k: int = 16, **given: Any) -> dict[str, Any]:
    options = {"dim": 3, "packed": False, "same": False, "wide": False} | given
    dim, *flags = options.values()
    return json.loads(
        torch.ops.any2point._neighbour_launches(GPUS[gpu][2], clouds, queries, points, dim, k, *flags)
    )


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_launches_are_legal(gpu: str, packed: bool, same: bool) -> None:
    for clouds in (0, 1, 3, 32, 1000):
        for points in SIZES:
            for queries in (points,) if same else SIZES:
                for k in (0, 1, 32, 192, 193, 280, 281, 5000):
                    one = launches(gpu, clouds, queries, points, k, packed=packed, same=same)
                    where = (clouds, queries, points, k, one)
                    assert one["kernel"] != "tree" or 0 < k <= 280, where
                    assert one["kernel"] != "scan" or 0 < k <= 192, where
                    rows = points if same else points + queries
                    assert one["sorted"] == 0 or one["sorted"] >= rows, where
                    assert one["shared"] <= GPUS[gpu][2], where
                    assert (one["sorted"] == 0) == (one["shared"] == 0), where
                    assert one["sorted"] == 0 or one["kernel"] == "tree", where


@pytest.mark.parametrize("gpu", GPUS)
def test_what_needs_the_general_kernels(gpu: str) -> None:
    assert launches(gpu, 32, 512, 1024)["kernel"] == "scan"
    assert launches(gpu, 32, 512, 1024, 193)["kernel"] == "general"
    for points in (1024, 100_000):
        for given in ({"dim": 4}, {"wide": True}):
            assert launches(gpu, 1, 1000, points, **given)["kernel"] == "general"


def test_scans_are_for_small_clouds() -> None:
    for clouds, queries, points, k, kernel in (
        *((32, 512, 1024, 81, "scan"), (32, 512, 2048, 32, "scan"), (32, 2048, 2048, 32, "scan")),
        *((32, 2048, 2048, 16, "tree"), (1, 512, 2049, 16, "tree"), (1, 1, 1_000_000, 280, "tree")),
    ):
        assert launches("sm_90", clouds, queries, points, k)["kernel"] == kernel


@pytest.mark.parametrize(
    ("gpu", "queries", "points", "rows"),
    [
        ("sm_90", 2048, 8192, 10_240),
        ("sm_75", 2048, 8192, 10_240),
        ("sm_90", 8192, 8192, 16_384),
        ("sm_86", 8192, 8192, 16_384),
        ("sm_75", 8192, 8192, 0),  # does not fit: all clouds are sorted together
        ("sm_90", 8192, 8193, 0),
    ],
)
def test_clouds_are_sorted_by_blocks(gpu: str, queries: int, points: int, rows: int) -> None:
    found = launches(gpu, 32, queries, points, 32)
    assert (found["kernel"], found["sorted"]) == ("tree", rows)
