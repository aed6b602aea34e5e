"""Which CUDA kernels farthest point sampling launches, for GPUs that need not be there."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch
from gpus import GPUS

import any2point.ops  # noqa: F401  # registers the ops

# (warps, points a thread, candidates / 32) that there are kernels for
BLOCKS = {(16, 2, 3), (16, 4, 4), (32, 4, 4), (32, 8, 4)}
CLUSTERS = {(16, 2, 4), (16, 4, 4), (16, 6, 4), (16, 8, 4)}
SIZES = [0, 1, 1024, 1025, 2048, 2049, 4096, 8192, 8193, 16_384, 30_000, 100_000, 1_000_000, 2**31]


def launches(
    gpu: str,
    clouds: int,
    most: int,
    samples: int,
    *,
    packed: bool = False,
    ragged: bool = False,
    cooperative: bool = True,
) -> list[dict[str, Any]]:
    ragged = ragged or packed
    text = torch.ops.any2point._farthest_point_launches(
        *GPUS[gpu], cooperative, clouds, most, packed, ragged, samples
    )
    return json.loads(text)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cooperative", [False, True])
def test_launches_are_legal_and_serve_every_cloud(gpu: str, packed: bool, cooperative: bool) -> None:
    capability, processors, shared = GPUS[gpu]
    for clouds in (1, 2, 3, 8, 32, 100, 132, 133, 1000):
        for most in SIZES:
            for samples in (1, 255, 256, 384, 5000):
                found = launches(gpu, clouds, most, samples, packed=packed, cooperative=cooperative)
                where = (clouds, most, samples, found)
                assert found, where
                assert found[0]["above"] == -1, where
                assert found[-1]["up_to"] >= most, where
                for one, after in pairwise(found):
                    assert after["above"] == one["up_to"] > one["above"], where
                for one in found:
                    assert one["kernel"] != "registers" or one["up_to"] <= 8192, where
                    if one["kernel"] != "batched":
                        continue
                    assert capability >= 80, where
                    assert samples >= 256, where
                    assert one["shared"] <= shared, where
                    threads = 32 * one["warps"]
                    assert one["up_to"] <= one["capacity"] == one["parts"] * one["held"] * threads, where
                    assert 4 * one["wanted"] <= 3 * one["most"], where
                    if one["words"]:  # one block, or a cluster, which runs or waits as a whole
                        assert one["most"] == 32 * one["words"] <= threads, where
                        assert one["parts"] == 1 or (capability >= 90 and one["parts"] <= 8), where
                        shapes = CLUSTERS if one["parts"] > 1 else BLOCKS
                        assert (one["warps"], one["held"], one["words"]) in shapes, where
                    else:  # blocks that wait for each other are all resident: one on each processor
                        assert 1 < one["parts"] <= processors // clouds, where
                        assert cooperative, where
                        assert one["held"] in (1, 2, 4, 8), where


# Of each GPU, for a batch: (blocks a cloud, points a thread, whether a cluster), or None: sequential.
BATCHES = [(32, 1024, 512), (32, 2048, 512), (8, 8192, 2048), (32, 8192, 2048), (1, 100_000, 25_000)]
CHOSEN: dict[str, list[tuple[int, int, bool] | None]] = {
    "sm_75": [None, None, None, None, None],
    "sm_80": [(1, 2, True), (1, 4, True), (8, 1, False), (3, 4, False), (98, 1, False)],
    "sm_86": [(1, 2, True), (1, 4, True), (8, 1, False), (2, 4, False), (84, 2, False)],
    "sm_89": [(1, 2, True), (1, 4, True), (8, 1, False), (4, 2, False), (98, 1, False)],
    "sm_90": [(1, 2, True), (1, 4, True), (8, 2, True), (3, 6, True), (98, 1, False)],
    "sm_100": [(1, 2, True), (1, 4, True), (8, 2, True), (4, 4, True), (98, 1, False)],
    "sm_120": [(1, 2, True), (1, 4, True), (8, 2, True), (4, 4, True), (98, 1, False)],
}


@pytest.mark.parametrize("gpu", GPUS)
def test_blocks_of_each_gpu(gpu: str) -> None:
    for (clouds, most, samples), chosen in zip(BATCHES, CHOSEN[gpu], strict=True):
        (only,) = launches(gpu, clouds, most, samples)
        if chosen is None:
            assert only["kernel"] != "batched"
        else:
            assert only["kernel"] == "batched"
            assert (only["parts"], only["held"], only["words"] > 0) == chosen, (clouds, most)


@pytest.mark.parametrize(
    ("clouds", "most", "samples", "parts", "held", "warps"),
    [
        (32, 4096, 1024, 3, 4, 16),
        (16, 8192, 2048, 4, 4, 16),
        (50, 8192, 2048, 2, 8, 16),
        (200, 8192, 2048, 1, 8, 32),
        (200, 4096, 2048, 1, 4, 32),
        (8, 16_384, 4096, 16, 1, 32),
        (1, 1_000_000, 250_000, 132, 8, 32),
    ],
)
def test_blocks_of_the_batched_kernels(
    clouds: int, most: int, samples: int, parts: int, held: int, warps: int
) -> None:
    (only,) = launches("sm_90", clouds, most, samples)
    assert only["kernel"] == "batched"
    assert (only["parts"], only["held"], only["warps"]) == (parts, held, warps)


def test_few_picks_and_old_gpus_stay_sequential() -> None:
    assert [one["kernel"] for one in launches("sm_90", 32, 8192, 383)] == ["registers"]
    assert [one["kernel"] for one in launches("sm_90", 133, 1024, 512)] == ["registers"]
    assert [one["kernel"] for one in launches("sm_75", 32, 8192, 2048)] == ["registers"]
    assert [one["kernel"] for one in launches("sm_75", 1, 100_000, 25_000)] == ["large"]


def test_packed_clouds_are_served_by_size() -> None:
    """The sum of the sizes is all that the host knows: small clouds, those near the average, larger ones."""
    found = launches("sm_90", 32, 32 * 8192, 2048, packed=True)
    assert [one["kernel"] for one in found] == ["registers", "batched", "batched", "large"]
    assert [one["up_to"] for one in found] == [2048, 16_384, 32_768, 32 * 8192]
