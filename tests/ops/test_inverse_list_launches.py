"""Which CUDA kernels build inverse lists, for GPUs that need not be there."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from gpus import GPUS

import any2point.ops  # noqa: F401  # registers the ops


def launches(gpu: str, clouds: int, entries: int, rows: int) -> dict[str, Any]:
    return json.loads(torch.ops.any2point._inverse_list_launches(*GPUS[gpu], clouds, entries, rows))


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("clouds", [1, 3, 32, 1000])
def test_launches_are_legal(gpu: str, clouds: int) -> None:
    capability, _, shared = GPUS[gpu]
    for rows in (1, 2, 512, 513, 1024, 1025, 2048, 2049, 100_000):
        for entries in (1, 255, 256, 511, 513, 2048, 2049, 41_472, 65_536, 65_537, 1 << 17, 1 << 20, 1 << 31):
            one = launches(gpu, clouds, entries, rows)
            where = (entries, rows, one)
            if one["kernel"] != "cluster":
                assert one["kernel"] == "sorted" or (rows <= 2048 and rows <= 4 * entries), where
                continue
            assert capability >= 90, where
            assert 1 <= one["parts"] <= 8, where
            assert rows <= one["rows"] in (1024, 2048), where
            assert 1 <= one["each"] <= 16, where
            assert one["parts"] * one["each"] * 512 >= entries, where
            assert one["shared"] <= shared, where


@pytest.mark.parametrize(
    ("gpu", "clouds", "entries", "rows", "kernel", "parts", "each"),
    [
        ("sm_90", 32, 41_472, 1024, "cluster", 6, 14),  # all clusters at once
        ("sm_90", 1, 41_472, 2048, "cluster", 8, 11),
        ("sm_90", 32, 12_288, 1024, "cluster", 3, 8),  # a processor for each block
        ("sm_90", 32, 65_537, 1024, "counted", 0, 0),
        ("sm_90", 32, 41_472, 2049, "sorted", 0, 0),
        ("sm_90", 32, 100, 1024, "sorted", 0, 0),
        ("sm_80", 32, 41_472, 1024, "counted", 0, 0),
        ("sm_75", 32, 41_472, 1024, "counted", 0, 0),
        ("sm_120", 32, 41_472, 2048, "cluster", 8, 11),
    ],
)
def test_kernels_of_some_sizes(
    gpu: str, clouds: int, entries: int, rows: int, kernel: str, parts: int, each: int
) -> None:
    found = launches(gpu, clouds, entries, rows)
    assert (found["kernel"], found["parts"], found["each"]) == (kernel, parts, each)
