"""local_aggregate against its composition in torch; the stages of the tokenizer, one cloud on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from any2point.ops.local_aggregate import BatchNorm, ResidualUnit, local_aggregate
from any2point.reference.local_aggregate import local_aggregate as composed
from benchmarks import common, peers

STAGES = [(1024, 512, 81, 96, 96, 2), (512, 256, 81, 192, 192, 1), (256, 128, 81, 384, 32, 1)]
PROVIDERS = {"any2point": local_aggregate, "torch": composed}


def units(width: int, hidden: int, count: int, device: str) -> list[ResidualUnit]:
    generator = torch.Generator().manual_seed(1)

    def norm(channels: int) -> BatchNorm:
        values = [torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)]
        return BatchNorm(*(value.to(device) for value in values))

    def weight(rows: int, columns: int) -> torch.Tensor:
        scale = columns**-0.5
        return (scale * torch.randn(rows, columns, generator=generator)).to(device).requires_grad_()

    return [
        ResidualUnit(weight(hidden, width), None, norm(hidden), weight(width, hidden), None, norm(width))
        for _ in range(count)
    ]


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_local_aggregate(
    measure: Callable[..., Any], provider: str, stage: tuple[int, ...], mode: str, device: str
) -> None:
    rows, centers, k, width, hidden, count = stage
    batch = 32 if device == "cuda" else 1
    points = torch.from_numpy(common.cloud("ball", batch, rows)).to(device)
    neighbor = peers.torch_knn(points[:, :centers], points, k)[0]
    center = torch.arange(centers, device=device).expand(batch, -1).contiguous()
    features = torch.randn(batch, rows, width, generator=torch.Generator().manual_seed(0)).to(device)
    features.requires_grad_()
    weights = units(2 * width, hidden, count, device)
    training = mode == "backward"

    def call(function: Callable[..., Any]) -> torch.Tensor:
        return function(points, features, center, neighbor, weights, training=training)

    function = PROVIDERS[provider]
    with torch.no_grad():
        torch.testing.assert_close(call(function), call(composed), rtol=1e-3, atol=1e-3)
    if mode == "forward":

        def run() -> torch.Tensor:
            with torch.no_grad():
                return call(function)
    else:
        out = call(function)
        leaves = [features, *(w for unit in weights for w in (unit.in_weight, unit.out_weight))]
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(device)
        run = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
    pairs = batch * centers * k
    moved = 4 * batch * (rows * (width + 3) + 2 * centers * width) + 8 * pairs
    cost = common.Cost(moved, 4 * pairs * width * hidden * count)
    name = f"{batch},{rows},{width} -> {centers}x{k} H={hidden}x{count}"
    measure(run, op="local_aggregate", provider=provider, shape=name, mode=mode, device=device, cost=cost)
