"""The kernels between the products of a block: in the interpreter on any machine, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from any2point.sources import Source, glue


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_interpreted() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(here / "glue_interpreted.py")],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def results(family: str, dtype: torch.dtype, storage: torch.dtype) -> list[torch.Tensor]:
    """Output and gradient of a source's blocks, with an adapter in each."""
    positions = (5, 5) if family == "dinov2" else (16,)
    source = Source.random(family, width=96, depth=3, heads=4, positions=positions)
    encoder = source.encoder(storage).cuda()
    generator = torch.Generator().manual_seed(0)
    for name, value in encoder.named_parameters():
        if "ls" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    x = torch.randn(2, 17, 96, generator=generator).cuda().requires_grad_()
    grad = torch.randn(2, 17, 96, generator=generator).cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        y = x
        for block in encoder.blocks:
            y = block(y, lambda z: 0.5 * torch.tanh(z))
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["clip-text", "dinov2", "bert"])
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_blocks_equal_plain_ones(
    family: str, dtype: torch.dtype, storage: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert glue._has_kernels(0)
    fused = results(family, dtype, storage)
    monkeypatch.setattr(glue, "_fused", lambda *_: False)
    plain = results(family, dtype, storage)
    exact = results(family, torch.float32, torch.float32)
    for got, other, want in zip(fused, plain, exact):
        assert got.dtype == other.dtype
        if dtype == storage == torch.float32:
            torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4)
        elif storage == torch.float32:  # at most twice PyTorch's own error
            assert (got - want).norm() <= 2 * (other - want).norm()
        else:
            torch.testing.assert_close(got, other, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
def test_blocks_repeat_on_another_stream() -> None:
    first = results("clip-text", torch.bfloat16, torch.float32)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = results("clip-text", torch.bfloat16, torch.float32)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_trained_weights_and_compilers_take_the_composition() -> None:
    x = torch.zeros(2, 4)
    assert not glue._fused(x)
    norm = torch.nn.LayerNorm(4)
    assert glue.fork_norm(x, norm, torch.bfloat16)[1].requires_grad
