"""interpolate, forward and backward, against gather + weighted sum in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from any2point import ops
from benchmarks import common, peers

SHAPES = [(2, 128, 384, 1024, 3), (1, 1024, 96, 8192, 3)]  # clouds, points, channels, queries, k


def composed(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return (peers.torch_group(features, index) * weight[..., None]).sum(2)


PROVIDERS = {"any2point": ops.interpolate, "torch": composed}


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_interpolate(
    measure: Callable[..., Any], provider: str, shape: tuple[int, ...], mode: str, device: str
) -> None:
    batch, rows, width, queries, k = shape
    function = PROVIDERS[provider]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, rows, width, generator=generator).to(device).requires_grad_()
    index = torch.randint(rows, (batch, queries, k), generator=generator).to(device)
    weight = torch.rand(batch, queries, k, generator=generator).to(device).requires_grad_()
    grad = torch.randn(batch, queries, width, generator=generator).to(device)
    out, expected = function(features, index, weight), composed(features.double(), index, weight.double())
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-4)
    actual = torch.autograd.grad(out, (features, weight), grad, retain_graph=True)
    for one, other in zip(actual, torch.autograd.grad(expected, (features, weight), grad.double())):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    if mode == "forward":
        call = lambda: function(features.detach(), index, weight.detach())  # noqa: E731
    else:
        call = lambda: torch.autograd.grad(out, (features, weight), grad, retain_graph=True)  # noqa: E731
    cost = common.cost_interpolate(batch, rows, queries, k, width)
    name = f"{batch},{rows},{width} -> {queries}x{k}"
    measure(call, op="interpolate", provider=provider, shape=name, mode=mode, device=device, cost=cost)
