"""knn: the contract, then the cases where nearest-neighbour codes usually go wrong."""

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


class TestKnn(OpContract):
    op = staticmethod(ops.knn)
    reference = staticmethod(reference.knn)
    differentiable = ("query", "points")
    double_backward = True

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, query: Tensor, points: Tensor, k: int, **more: Any) -> Sample:
            return Sample(name, dict(query=query, points=points, k=k, **more)).to(device)

        yield sample("plain", grid(2, 7, 3), grid(2, 33, 3, seed=1), 5)
        yield sample("a lattice", grid(1, 9, 3, steps=2), grid(1, 70, 3, steps=2, seed=1), 12)
        yield sample("by index", grid(2, 7, 3), grid(2, 40, 3, seed=1), 6, sorted=False)
        yield sample(
            "lengths",
            grid(3, 6, 3),
            grid(3, 20, 3, seed=1),
            4,
            query_lengths=torch.tensor([6, 0, 3]),
            lengths=torch.tensor([0, 20, 2]),
        )
        yield sample(
            "offsets",
            grid(9, 3),
            grid(30, 3, seed=1),
            4,
            query_offsets=torch.tensor([0, 0, 5, 8, 9]),
            offsets=torch.tensor([0, 10, 10, 28, 30]),
        )
        yield sample("few points", grid(1, 3, 3), grid(1, 4, 3, seed=1), 9, sorted=False)
        for dim in (1, 2, 5):
            yield sample(f"D = {dim}", grid(2, 5, dim), grid(2, 17, dim, seed=1), 3)
        yield sample("k = 0", grid(1, 3, 3), grid(1, 4, 3), 0)
        yield sample("no points", grid(1, 3, 3), grid(1, 0, 3), 2)
        yield sample("no clouds", grid(0, 3, 3), grid(0, 4, 3), 2)

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        query, points = torch.rand(2, 3, 3, dtype=torch.float64), torch.rand(2, 6, 3, dtype=torch.float64)
        lengths = dict(query_lengths=torch.tensor([3, 2]), lengths=torch.tensor([2, 6]))
        yield Sample("padded", dict(query=query, points=points, k=2)).to(device)
        yield Sample("lengths", dict(query=query, points=points, k=2, **lengths)).to(device)
        offsets = dict(query_offsets=torch.tensor([0, 4, 6]), offsets=torch.tensor([0, 3, 12]))
        packed = dict(query=query.flatten(0, 1), points=points.flatten(0, 1))
        yield Sample("packed", dict(**packed, k=3, **offsets)).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        rows = torch.zeros(5, 3)
        yield dict(query=[0.0]), TypeError, r"query: expected a tensor"
        yield dict(query=rows), ValueError, r"query: expected shape \[B, N, D\]"
        yield dict(query=torch.zeros(2, 7, 4)), ValueError, r"query: expected D = 3"
        yield dict(query=torch.zeros(1, 7, 3)), ValueError, r"query: expected 2 clouds"
        yield dict(query=torch.zeros(2, 7, 3).double()), TypeError, r"query: expected torch.float32"
        yield dict(points=torch.zeros(2, 7, 3).long()), TypeError, r"points: expected float16"
        yield (
            dict(query=torch.zeros(2, 7, 0), points=torch.zeros(2, 7, 0)),
            ValueError,
            r"points: expected D >= 1",
        )
        yield dict(k=-1), ValueError, r"k: expected at least 0"
        yield dict(k=1.5), TypeError, r"k: expected an int"
        yield dict(lengths=torch.tensor([1, 99])), ValueError, r"lengths: expected values in 0..N"
        yield dict(query_lengths=torch.tensor([1])), ValueError, r"query_lengths: expected shape \[B\]"
        yield dict(offsets=torch.tensor([0, 5])), ValueError, r"query_offsets: expected a tensor"
        yield (
            dict(query=rows, query_offsets=torch.tensor([0, 5])),
            ValueError,
            r"offsets: expected a tensor, as query_offsets",
        )
        packed = dict(query=rows, points=rows, query_offsets=torch.tensor([0, 5]))
        yield packed | dict(offsets=torch.tensor([0, 2, 5])), ValueError, r"query: expected 2 clouds"
        yield packed | dict(offsets=torch.tensor([0, 4])), ValueError, r"offsets: expected 0, ..., P = 5"
