"""virtual_project (lines and images) against its composition in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from any2point.ops.virtual_project import virtual_project
from any2point.reference.virtual_project import virtual_project as composed
from benchmarks import common

SHAPES = [(32, 128, (77,), 768, 6), (32, 128, (37, 37), 768, 6)]  # clouds, centres, table, channels, views
PROVIDERS = {"any2point": virtual_project, "torch": composed}


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_virtual_project(
    measure: Callable[..., Any], provider: str, shape: tuple[Any, ...], mode: str, device: str
) -> None:
    batch, count, grid, width, views = shape
    generator = torch.Generator().manual_seed(0)
    centers = torch.from_numpy(common.cloud("ball", batch, count)).to(device)
    table = torch.randn(*grid, width, generator=generator).to(device).requires_grad_()
    axes = torch.linalg.qr(torch.randn(views, 3, 3, generator=generator))[0].to(device)
    axes = axes if len(grid) == 2 else axes[:, 0].contiguous()

    def call(function: Callable[..., Any], table: torch.Tensor) -> torch.Tensor:
        return function(centers, table, axes, cell=2.0).encoding

    function = PROVIDERS[provider]
    out = call(function, table)
    torch.testing.assert_close(out, call(composed, table), rtol=1e-4, atol=1e-4)
    grad = torch.randn(out.shape, generator=generator).to(device)
    if mode == "forward":
        run = lambda: call(function, table.detach())  # noqa: E731
    else:
        run = lambda: torch.autograd.grad(out, table, grad, retain_graph=True)  # noqa: E731
    cost = common.Cost(4 * (3 * batch * count + table.numel() + out.numel()))
    name = f"{batch},{count} {'x'.join(map(str, grid))},{width} V={views}"
    measure(run, op="virtual_project", provider=provider, shape=name, mode=mode, device=device, cost=cost)
