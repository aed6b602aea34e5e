"""Clouds for the tests of farthest point sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def exact(*shape: int, steps: int = 256, seed: int = 0) -> Tensor:
    """Multiples of 1/steps in [-1, 1]: all squared distances are exact, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-steps, steps + 1, shape, generator=generator).float() / steps


def clouds(generator: torch.Generator, n: int) -> Iterator[tuple[str, Tensor]]:
    """Clouds [n, 3] that are hard for pruning, for tie rules, or for the range of a float."""
    cube = torch.rand(n, 3, generator=generator)
    normal = torch.randn(n, 3, generator=generator)
    pick = torch.randint(0, n, (n,), generator=generator)
    yield "cube", cube
    yield "sphere", normal / normal.norm(dim=1, keepdim=True)
    yield (
        "rings",
        torch.stack(
            [(k := pick % 16 + 1.0) * (6.3 * cube[:, 0]).cos(), k * (6.3 * cube[:, 0]).sin(), -1.8 + 0 * k], 1
        ),
    )
    yield "clusters", cube[pick % 20] * 2 + 0.02 * normal
    yield "lattice", (cube * 8).floor() / 8
    yield "duplicates", cube[pick // 4]
    yield "all equal", torch.full((n, 3), 0.3)
    yield "two places", (cube > 0.5).float()[:, :1].expand(n, 3) * 0.7
    yield "line", cube[:, :1] * torch.tensor([1.0, 2.0, -3.0])
    yield "plane", cube * torch.tensor([1.0, 1.0, 0.0])
    yield "NaN and inf", cube.where(cube > 0.1, torch.nan).where(cube < 0.95, -torch.inf)
    yield "mostly NaN", cube.where(pick[:, None] > n // 10, torch.nan)
    yield "one finite", cube.where(torch.arange(n)[:, None] == n // 2, torch.nan)
    for scale in (1e3, 1e6, 1e18, 1e19, 1e30, 3e38, 1e-20, 1e-30, 1e-43):
        yield f"times {scale}", (cube - 0.5) * scale
    for shift in (5e4, 1e5, 1e10):
        yield f"plus {shift}", cube + shift
    yield "near the origin", cube * 0.03
    outliers = cube.clone()
    outliers[:4] = torch.tensor([[1e30], [-1e20], [1e10], [1e4]])
    yield "far outliers", outliers
