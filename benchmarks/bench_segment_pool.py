"""segment_pool, forward and backward, against index_add and scatter_reduce in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from any2point import ops
from benchmarks import common

SHAPES = [(4096, 768, 1248), (100_000, 96, 20_000)]  # rows, channels, segments


def composed(features: Tensor, segment: Tensor, count: int, reduce: str) -> Tensor:
    out = features.new_zeros(count, features.shape[1])
    if reduce == "max":
        return out.scatter_reduce(
            0, segment[:, None].expand_as(features), features, "amax", include_self=False
        )
    total = out.index_add(0, segment, features)
    return total / torch.bincount(segment, minlength=count).clamp(min=1)[:, None].to(features)


PROVIDERS = {"any2point": ops.segment_pool, "torch": composed}


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_segment_pool(
    measure: Callable[..., Any], provider: str, shape: tuple[int, ...], reduce: str, mode: str, device: str
) -> None:
    rows, width, count = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, width, generator=generator).to(device).requires_grad_()
    segment = torch.randint(count, (rows,), generator=generator).to(device)
    grad = torch.randn(count, width, generator=generator).to(device)
    function = PROVIDERS[provider]
    out, expected = (
        function(features, segment, count, reduce),
        composed(features.double(), segment, count, reduce),
    )
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)
    actual = torch.autograd.grad(out, features, grad, retain_graph=True)[0]
    torch.testing.assert_close(
        actual, torch.autograd.grad(expected, features, grad.double())[0], rtol=1e-4, atol=1e-4
    )
    if mode == "forward":
        call = lambda: function(features.detach(), segment, count, reduce)  # noqa: E731
    else:
        call = lambda: torch.autograd.grad(out, features, grad, retain_graph=True)  # noqa: E731
    cost = common.Cost(4 * rows * width + 8 * rows + 4 * count * width)
    name = f"{rows},{width} -> {count} {reduce}"
    measure(call, op="segment_pool", provider=provider, shape=name, mode=mode, device=device, cost=cost)
