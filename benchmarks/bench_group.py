"""group, forward and backward, against torch indexing and gather."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from any2point import ops
from benchmarks import common, peers

SHAPES = [(1, 1024, 96, 512, 81), (4, 512, 192, 256, 64)]  # clouds, points, channels, queries, k
PROVIDERS = {
    "any2point": ops.group,
    "torch index": peers.torch_group,
    "torch gather": peers.torch_group_gather,
}


def inputs(shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, rows, width, queries, k = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, rows, width, generator=generator)
    points = torch.from_numpy(common.cloud("ball", batch, rows))
    index, _ = peers.torch_knn(points[:, :queries], points, k)  # neighbourhoods, as in use
    grad = torch.randn(batch, queries, k, width, generator=generator)
    return features.to(device), index.to(device), grad.to(device)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_group(
    measure: Callable[..., Any], provider: str, shape: tuple[int, ...], mode: str, device: str
) -> None:
    features, index, grad = inputs(shape, device)
    function = PROVIDERS[provider]
    features.requires_grad_()
    out = function(features, index)
    assert torch.equal(out, peers.torch_group(features, index))
    expected = torch.autograd.grad(peers.torch_group(features.double(), index), features, grad.double())[0]
    actual = torch.autograd.grad(out, features, grad, retain_graph=True)[0]
    torch.testing.assert_close(actual, expected.to(actual), rtol=1e-4, atol=1e-4)
    if mode == "forward":
        plain = features.detach()
        call = lambda: function(plain, index)  # noqa: E731
    else:
        call = lambda: torch.autograd.grad(out, features, grad, retain_graph=True)  # noqa: E731
    batch, rows, width, queries, k = shape
    cost = common.cost_group(batch, rows, queries, k, width)
    name = f"{batch},{rows},{width} -> {queries}x{k}"
    measure(call, op="group", provider=provider, shape=name, mode=mode, device=device, cost=cost, match=1.0)
