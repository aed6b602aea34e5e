"""Small sources, models and clouds for the tests of models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from any2point import Any2Point, Any2PointConfig, Source

SMALL = {"num_points": 96, "num_tokens": 16, "neighbors": 8, "views": 3, "num_classes": 5, "voxel_size": 0.5}
FAMILIES = ("clip-text", "bert", "dinov2")


def make_source(family: str = "clip-text", seed: int = 0) -> Source:
    positions = {"clip-text": (11,), "bert": (40,), "dinov2": (5, 5)}[family]
    return Source.random(family, width=48, depth=2, heads=4, positions=positions, seed=seed)


def make(family: str = "clip-text", source: Source | None = None, **options: Any) -> Any2Point:
    """A model whose normalisations have statistics that matter, in evaluation mode."""
    torch.manual_seed(1)
    model = Any2Point(Any2PointConfig(**(SMALL | options)), source or make_source(family))
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def tiny(family: str = "clip-text", **options: Any) -> Any2Point:
    """One block, one stage, one view: what tracing takes least time for."""
    positions = (7,) if family == "clip-text" else (3, 4)
    source = Source.random(family, width=16, depth=1, heads=2, positions=positions)
    sizes = {"num_points": 24, "num_tokens": 6, "neighbors": 4, "views": 1, "tokenizer_units": (1,)}
    return make(source=source, **(sizes | options))


def clouds(batch: int = 3, count: int = 96) -> Tensor:
    """Points on a grid of 1/1024, so that their differences are exact."""
    points = torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(7)) / 2
    return (points * 1024).round() / 1024


@torch.no_grad()
def close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
