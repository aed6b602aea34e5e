"""Run with TRITON_INTERPRET=1: clouds before the first search, against PyTorch."""

from __future__ import annotations

import torch

from any2point import Any2Point, Any2PointConfig
from any2point.nn.tokenizer import first_centers, repeat_centers
from any2point.sources import Source
from any2point.triton.clouds import farthest_from_mean, prepare, repeat


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    source = Source.random("clip-text", width=48, depth=1, heads=2)
    for center, features, count in ((True, 2, 1100), (True, 0, 40), (False, 0, 40)):
        config = Any2PointConfig(
            num_points=16, num_tokens=4, neighbors=4, input_features=features, center=center
        )
        model = Any2Point(config, source)
        points = 1e3 * torch.randn(3, count, 3, generator=generator) + 5e3
        points[0, 3], points[2, 5, 1] = torch.nan, torch.inf
        more = torch.randn(3, count, features, generator=generator) if features else None
        if more is not None:
            more[1, 0, 1] = torch.nan
        want, _ = model.prepare(points, more)
        got = prepare(points, more, 1e9, center=center)
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert torch.equal(farthest_from_mean(want), first_centers(want, "farthest"))
    empty = torch.full((2, 5, 3), torch.nan)
    assert prepare(empty, None, 1e9, center=True).isnan().all()
    assert torch.equal(farthest_from_mean(empty), first_centers(empty, "farthest"))
    cube = torch.tensor([[x, y, z] for x in (-1.0, 1.0) for y in (-1.0, 1.0) for z in (-1.0, 1.0)])
    assert farthest_from_mean(torch.stack([0.1 * cube, cube])).tolist() == [0, 0]
    index = torch.tensor([[5, 2, 7, 1], [3, 1, -1, -1], [-1, -1, -1, -1]])
    assert torch.equal(repeat(index), repeat_centers(index))


if __name__ == "__main__":
    main()
