"""One update of the weights: clipped by the norm of all gradients, one fused kernel per group."""

from __future__ import annotations

import pytest
import torch

from any2point.train import TrainConfig
from any2point.train.runtime import Runtime


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_update(precision: str, clip: float, device: str) -> None:
    if precision == "fp16" and device == "cpu":
        pytest.skip("fp16 is for GPUs")
    runtime = Runtime(TrainConfig(device=device, precision=precision))
    weights = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = runtime.optimizer([{"params": weights, "weight_decay": 0.0}], lr=0.1)
    assert optimizer.defaults["fused"]
    runtime.backward((weights[0] * 3 + weights[1] * 4).sum())
    runtime.update(optimizer, weights, clip)
    # 3 and 4, three times each: the norm is 5 sqrt(3), and clipping keeps the direction.
    scale = min(1.0, clip / (5 * 3**0.5)) if clip else 1.0
    for weight, gradient in zip(weights, (3.0, 4.0)):
        torch.testing.assert_close(weight.grad, torch.full_like(weight, gradient * scale), rtol=1e-4, atol=0)
        torch.testing.assert_close(weight.detach(), torch.full_like(weight, 0.9), rtol=1e-3, atol=0)
