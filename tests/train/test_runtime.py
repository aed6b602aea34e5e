"""One update of the weights: clipped by the norm of all gradients, one fused kernel per group."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from any2point.train import TrainConfig
from any2point.train.optimizer import AdamW
from any2point.train.runtime import Runtime


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("clip", [0.0, 0.5, 100.0])
def test_update(precision: str, clip: float, device: str) -> None:
    if precision == "fp16" and device == "cpu":
        pytest.skip("fp16 is for GPUs")
    runtime = Runtime(TrainConfig(device=device, precision=precision))
    weights, others = ([torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2)] for _ in range(2))
    optimizer = runtime.optimizer([{"params": weights, "weight_decay": 0.0}], lr=0.1)
    assert optimizer.defaults["fused"]
    plain = torch.optim.AdamW(others, lr=0.1, weight_decay=0.0)
    for size in (
        1.0,
        0.01,
        1.0,
    ):  # updates do not depend on a size that stays
        for parameter in (*weights, *others):
            parameter.grad = None
        runtime.backward(size * (weights[0] * 3 + weights[1] * 4).sum())
        runtime.update(optimizer, weights, clip)
        (size * (others[0] * 3 + others[1] * 4)).sum().backward()
        # 3 and 4, three times each: the norm is 5 sqrt(3), and clipping keeps the direction.
        for other in others:
            assert other.grad is not None
            other.grad *= min(1.0, clip / (size * 5 * 3**0.5)) if clip else 1.0
        plain.step()
    for weight, other in zip(weights, others):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=0)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_update_interpreted() -> None:
    script = Path(__file__).with_name("adamw_interpreted.py")
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, str(script)], env=os.environ | environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.gpu
def test_optimizer_continues_from_the_state_of_torch() -> None:
    """And torch's own from its state; in a CUDA graph a replay is a step."""
    generator = torch.Generator("cuda").manual_seed(0)
    start = [torch.randn(*shape, device="cuda", generator=generator) for shape in ((3, 700), (5,), (2000,))]
    grads = [[torch.randn_like(p) for p in start] for _ in range(4)]
    results = []
    for kinds in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW), (AdamW, AdamW)):
        params, state = [torch.nn.Parameter(p.clone()) for p in start], None
        for kind, steps in zip(kinds, (grads[:2], grads[2:])):
            optimizer: Any = kind([{"params": params}], lr=0.01)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in steps:
                for p, grad in zip(params, step):
                    p.grad = grad.clone()
                if isinstance(optimizer, AdamW):
                    optimizer.clipped_step(1.0)
                else:
                    torch.nn.utils.clip_grad_norm_(params, 1.0)
                    optimizer.step()
            state = copy.deepcopy(optimizer.state_dict())
        results.append(params)
    for params in results[:2]:
        for got, want in zip(params, results[2]):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = AdamW([{"params": params}], lr=0.01)
    for p, grad in zip(params, grads[0]):
        p.grad = grad.clone()
    optimizer.clipped_step(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.clipped_step(1.0)
    for step in grads[1:]:
        for p, grad in zip(params, step):
            assert p.grad is not None
            p.grad.copy_(grad)
        graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(params, results[2]))


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
