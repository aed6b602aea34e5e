"""guided_aggregate against its composition in torch; forward as in evaluation, backward as in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from any2point.ops.guided_aggregate import BatchNorm, CellAttention, guided_aggregate
from any2point.reference.guided_aggregate import guided_aggregate as composed
from benchmarks import common

SHAPES = [  # clouds, tokens, channels, views, inner width, cells
    (32, 128, 768, 6, 12, 39),
    (32, 128, 768, 6, 12, 400),
]


def _composed(*args: Any, **options: Any) -> torch.Tensor:
    return composed(*args, scale=12**-0.5, **options)


PROVIDERS = {"any2point": guided_aggregate, "torch": _composed}


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_guided_aggregate(
    measure: Callable[..., Any], provider: str, shape: tuple[int, ...], mode: str, device: str
) -> None:
    batch, count, width, views, inner, cells = shape
    batch = batch if device == "cuda" else 4
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device)

    features = random(batch, count, width).requires_grad_()
    cell = torch.randint(cells, (batch, views, count), generator=generator).to(device)
    # About 80 voxels a cloud, numbered consecutively over the batch.
    voxel = torch.randint(80, (batch, count), generator=generator) + 80 * torch.arange(batch)[:, None]
    cluster = torch.unique(voxel, return_inverse=True)[1].to(device)
    attention = CellAttention(
        torch.ones(views, width, device=device),
        torch.zeros(views, width, device=device),
        width**-0.5 * random(views, 3 * inner, width),
        torch.zeros(views, 3 * inner, device=device),
        inner**-0.5 * random(views, width, inner),
        torch.zeros(views, width, device=device),
    )

    def norm(*size: int) -> BatchNorm:
        ones, zeros = torch.ones(*size, device=device), torch.zeros(*size, device=device)
        return BatchNorm(ones, zeros, zeros.clone(), ones.clone())

    norms = norm(views, width), norm(width)
    options = {"num_cells": cells, "num_heads": 6, "coefficient": 0.3, "training": mode == "backward"}

    def call(function: Callable[..., Any]) -> torch.Tensor:
        return function(features, cell, cluster, attention, *norms, **options)

    function = PROVIDERS[provider]
    with torch.no_grad():
        torch.testing.assert_close(call(function), call(_composed), rtol=1e-3, atol=1e-3)
    if mode == "forward":

        def run() -> torch.Tensor:
            with torch.no_grad():
                return call(function)
    else:
        out = call(function)
        grad = random(*out.shape)
        run = lambda: torch.autograd.grad(out, features, grad, retain_graph=True)  # noqa: E731
    moved = 8 * features.numel() + 8 * (cell.numel() + cluster.numel()) + 4 * views * 4 * inner * width
    name = f"{batch},{count},{width} V={views} cells={cells}"
    cost = common.Cost(moved, 4 * batch * count * width * views * inner)
    measure(run, op="guided_aggregate", provider=provider, shape=name, mode=mode, device=device, cost=cost)
