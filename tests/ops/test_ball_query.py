"""ball_query: the contract, then its edges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from op_contract import OpContract, Sample
from torch import Tensor

from any2point import ops, reference


def grid(*shape: int, steps: int = 256, seed: int = 0) -> Tensor:
    """Multiples of 1 / steps in [0, 1]: squared distances are exact, ties and duplicates are common."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, steps + 1, shape, generator=generator) / steps


class TestBallQuery(OpContract):
    op = staticmethod(ops.ball_query)
    reference = staticmethod(reference.ball_query)
    differentiable = ("query", "points")
    double_backward = True

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, query: Tensor, points: Tensor, radius: float, k: int, **more: Any) -> Sample:
            return Sample(name, dict(query=query, points=points, radius=radius, k=k, **more)).to(device)

        yield sample("plain", grid(2, 7, 3), grid(2, 33, 3, seed=1), 0.5, 5)
        yield sample("first", grid(2, 7, 3), grid(2, 33, 3, seed=1), 0.5, 5, mode="first")
        for mode in ("nearest", "first"):
            # Lattice distances that equal the radius exactly are outside.
            yield sample(
                "lattice", grid(1, 9, 3, steps=2), grid(1, 70, 3, steps=2, seed=1), 0.5, 6, mode=mode
            )
            yield sample(
                "lengths",
                grid(3, 6, 3),
                grid(3, 20, 3, seed=1),
                0.75,
                4,
                query_lengths=torch.tensor([6, 0, 3]),
                lengths=torch.tensor([0, 20, 2]),
                mode=mode,
            )
            yield sample(
                "offsets",
                grid(9, 3),
                grid(30, 3, seed=1),
                0.75,
                4,
                query_offsets=torch.tensor([0, 0, 5, 8, 9]),
                offsets=torch.tensor([0, 10, 10, 28, 30]),
                mode=mode,
            )
            yield sample("infinite", grid(1, 3, 2), grid(1, 4, 2, seed=1), float("inf"), 9, mode=mode)
            yield sample("k = 0", grid(1, 3, 3), grid(1, 4, 3), 1.0, 0, mode=mode)
            yield sample("no points", grid(1, 3, 3), grid(1, 0, 3), 1.0, 2, mode=mode)

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        query, points = torch.rand(2, 3, 3, dtype=torch.float64), torch.rand(2, 6, 3, dtype=torch.float64)
        for mode in ("nearest", "first"):
            yield Sample(mode, dict(query=query, points=points, radius=0.6, k=2, mode=mode)).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield dict(query=torch.zeros(2, 7, 4)), ValueError, r"query: expected D = 3"
        yield dict(query=torch.zeros(1, 7, 3)), ValueError, r"query: expected 2 clouds"
        yield dict(k=-1), ValueError, r"k: expected at least 0"
        yield dict(radius=0.0), ValueError, r"radius: expected more than 0"
        yield dict(radius=float("nan")), ValueError, r"radius: expected more than 0, got nan"
        yield dict(radius="1"), TypeError, r"radius: expected a float"
        yield dict(mode="last"), ValueError, r'mode: expected "nearest" or "first"'
