"""The data of a step: they depend on seed and step alone, not on how many processes share the batch."""

from __future__ import annotations

import pytest
import torch

from any2point.data import transforms

CHAIN = transforms.Compose(
    (
        transforms.UnitSphere(),
        transforms.RandomSubset(32),
        transforms.RandomScale(),
        transforms.RandomYaw(),
        transforms.RandomShift(),
        transforms.Jitter(),
    )
)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_are_those_of_the_whole(parts: int) -> None:
    points = torch.randn(6, 48, 3)
    whole = CHAIN(points, torch.Generator().manual_seed(1))
    size = 6 // parts
    for start in range(0, 6, size):
        rows = slice(start, start + size)
        part = CHAIN(points[rows], transforms.Rows(torch.Generator().manual_seed(1), 6, rows))
        assert torch.equal(part, whole[rows])
    assert not torch.equal(CHAIN(points[:2], torch.Generator().manual_seed(1)), CHAIN(points[:2], None))
