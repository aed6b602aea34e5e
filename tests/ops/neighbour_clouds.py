"""Clouds and SIMD levels for the tests of knn and ball_query."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def _levels() -> list[str]:
    """The instruction sets of this CPU, best last."""
    import any2point.ops  # noqa: F401  (loads the ops)

    best = torch.ops.any2point._simd("")
    names = ["scalar", "avx2", "avx512", "avx512bf16", "amx"]
    return names[: names.index(best) + 1]


LEVELS = [level for level in _levels() if level in ("scalar", "avx2", "avx512")]
BF16_LEVELS = [level for level in _levels() if level not in LEVELS]  # they only add products of bfloat16


@contextmanager
def simd(level: str) -> Iterator[None]:
    before = torch.ops.any2point._simd("")
    torch.ops.any2point._simd(level)
    try:
        yield
    finally:
        torch.ops.any2point._simd(before)


def grid(*shape: int, steps: int = 256, seed: int = 0) -> Tensor:
    """Multiples of 1 / steps in [0, 1]: squared distances are exact, ties and duplicates are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, steps + 1, shape, generator=generator) / steps


CLOUDS = (
    "grid", "equal", "half zeros", "two places", "line", "diagonal", "plane", "lattice", "clusters",
    "tiny and wide", "powers", "shifted", "huge", "overflowing", "tiny", "many duplicates", "holes",
)  # fmt: skip


def cloud(name: str, n: int, seed: int = 0) -> Tensor:
    """``[n, 3]`` with coordinates of few enough bits that all squared distances are exact (or infinite)."""
    p = grid(n, 3, seed=seed)
    half = n // 2
    if name == "equal":
        p[:] = p[:1].clone()
    elif name == "half zeros":
        p[half:] = 0
    elif name == "two places":
        p[:half], p[half:] = 0, 1
    elif name == "line":
        p[:, 1:] = 0.5
    elif name == "diagonal":
        p[:, 1:] = p[:, :1].clone()
    elif name == "plane":
        p[:, 1] = 0.25
    elif name == "lattice":
        p = grid(n, 3, steps=8, seed=seed)
    elif name == "clusters":  # far apart, so only bits of either the offset or the detail count
        p = p / 16 + torch.randint(0, 3, (n, 1), generator=torch.Generator().manual_seed(seed)) * 16
        p = (p * 64).round() / 64
    elif name == "tiny and wide":
        p[:half] *= 2.0**-30
        p[half:] = (p[half:] * 8).round()
    elif name == "powers":
        p = 2.0 ** -(p * 20).round()
    elif name == "shifted":
        p = p + 50_000
    elif name == "huge":
        p = p * 1e15
        p = torch.frexp(p).mantissa.mul(256).round().div(256).ldexp(torch.frexp(p).exponent)
    elif name == "overflowing":
        p = (p * 16).round() * 2.0**123
    elif name == "tiny":
        p = p * 2.0**-60
    elif name == "many duplicates":
        p = p[: max(1, n // 10)].repeat(11, 1)[:n]
    elif name == "holes":
        p[::3, 1] = torch.nan
        p[1::5, 2] = -torch.inf
    return p
