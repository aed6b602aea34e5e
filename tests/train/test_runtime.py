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


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
def test_precisions_of_gpus(precision: str) -> None:
    with pytest.raises(ValueError, match=f"`precision`: expected fp32 or bf16 on a CPU, got {precision}"):
        Runtime(TrainConfig(device="cpu", precision=precision))


@pytest.mark.gpu
def test_tf32_holds_for_the_run_alone() -> None:
    """In the forward pass, in the backward one, and no longer."""
    x = torch.randn(256, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    exact = x.double() @ x.double()

    def error() -> float:
        return float(((x @ x).double() - exact).norm() / exact.norm())

    runtime = Runtime(TrainConfig(device="cuda", precision="tf32"))
    before = torch.backends.cuda.matmul.fp32_precision
    plain = error()
    with runtime.session():
        outside = error()
        with runtime.autocast():
            inside = error()
    assert plain < 1e-6
    assert inside > 1e-4
    assert outside == inside
    assert error() == plain
    assert torch.backends.cuda.matmul.fp32_precision == before
