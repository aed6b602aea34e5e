"""Which CUDA kernels farthest point sampling launches, for GPUs that need not be there."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
import torch

import any2point.ops  # noqa: F401  # registers the ops

# (capability, processors, shared memory a block can have)
GPUS = {
    "sm_75": (75, 40, 65_536),
    "sm_80": (80, 108, 166_912),
    "sm_86": (86, 84, 101_376),
    "sm_89": (89, 128, 101_376),
    "sm_90": (90, 132, 232_448),
    "sm_100": (100, 148, 232_448),
    "sm_120": (120, 170, 101_376),
}
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
                    assert one["held"] in (1, 2, 4, 8), where
                    assert one["up_to"] <= one["capacity"] == one["parts"] * one["held"] * 1024, where
                    # Blocks that wait for each other are all resident: one on each processor.
                    assert one["parts"] == 1 or clouds * one["parts"] <= processors, where
                    assert one["parts"] == 1 or cooperative, where
                    assert 3 * one["wanted"] <= 4 * one["most"], where


@pytest.mark.parametrize(
    ("clouds", "most", "samples", "parts", "held"),
    [
        (32, 1024, 512, 1, 1),
        (32, 2048, 512, 1, 2),
        (32, 4096, 1024, 4, 1),
        (32, 8192, 2048, 4, 2),
        (8, 16_384, 4096, 16, 1),
        (1, 100_000, 25_000, 98, 1),
        (1, 1_000_000, 250_000, 132, 8),
        (64, 8192, 2048, 2, 4),
        (200, 8192, 2048, 1, 8),
    ],
)
def test_blocks_of_the_batched_kernel(clouds: int, most: int, samples: int, parts: int, held: int) -> None:
    (only,) = launches("sm_90", clouds, most, samples)
    assert only["kernel"] == "batched"
    assert (only["parts"], only["held"]) == (parts, held)


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
