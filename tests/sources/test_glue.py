"""The kernels between the products of a block: in the interpreter on any machine, and on a GPU."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from any2point.bench.timing import products
from any2point.nn.adapter import Adapter
from any2point.sources import Source, glue
from any2point.sources.encoder import MLP
from any2point.sources.linear import Linear


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize("part", ["glue", "attention", "adapter", "mlp", "half_mlp"])
def test_interpreted(part: str) -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, str(here / f"{part}_interpreted.py")],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here.parents[1]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def results(family: str, dtype: torch.dtype, storage: torch.dtype) -> list[torch.Tensor]:
    """Output and gradient of a source's blocks, with an adapter in each."""
    positions = (5, 5) if family == "dinov2" else (16,)
    source = Source.random(family, width=96, depth=3, heads=3, positions=positions)
    encoder = source.encoder(storage).cuda()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    adapter = Adapter(96, 20, scale=0.5, dropout=0.0).cuda()
    mixed = storage != torch.float32 and dtype == torch.float32  # the weights of adapters are not rounded
    for name, value in encoder.named_parameters():
        if "ls" in name:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    x = torch.randn(2, 17, 96, generator=generator).cuda().requires_grad_()
    grad = torch.randn(2, 17, 96, generator=generator).cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        y = x
        for block in encoder.blocks:
            y = block(y, (lambda z: 0.5 * torch.tanh(z)) if mixed else adapter)
    leaves = [x] if mixed else [x, *adapter.parameters()]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


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
    assert glue.has_kernels(0)
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width", "over_batch"),
    [(32, 129, 12, 64, False), (3, 144, 2, 32, False), (5, 77, 2, 16, False), (133, 3, 2, 64, True)],
)
def test_attention_is_as_exact_as_torch(
    batch: int, tokens: int, heads: int, width: int, over_batch: bool, dtype: torch.dtype
) -> None:
    """In float32, where torch allows TF32, as exact as products in that are."""
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, tokens, 3 * heads * width)
    qkv = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    grad = torch.randn(batch, tokens, heads * width, device="cuda", generator=generator).to(dtype)
    # Beyond the range of float16, which operands in float32 are rounded to.
    size = 1e-7 if dtype == torch.float32 else 1.0
    qkv[..., 2 * heads * width :] /= size
    grad *= size

    def both(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = glue.attend(x, heads, over_batch=over_batch)
        return [y.detach(), *torch.autograd.grad(y, x, grad.to(x.dtype))[0].chunk(3, -1)]

    length = batch if over_batch else tokens
    assert glue.attends(dtype, length, width, 0) == (dtype != torch.float32)
    with products("tf32"):
        assert glue.attends(dtype, length, width, 0)
        found, again = both(qkv), both(qkv)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(glue, "attends", lambda *_: False)
            plain = both(qkv)
    exact = both(qkv.double())
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    for got, other, want in zip(found, plain, exact):
        # A result of TF32 is rounded twice to 11 bits on its way.
        limit = 2**-10 * want.norm() if dtype == torch.float32 else 2 * (other - want).norm()
        assert 0 < (got - want).norm() <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_mlp_is_as_exact_as_torch(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    mlp = MLP(96, 328, activation).cuda().requires_grad_(False)
    x = (2 * torch.randn(3, 777, 96, device="cuda")).to(dtype)
    with torch.autocast("cuda", dtype):
        got, again = mlp(x), mlp(x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(glue, "_has_tma", lambda _: False)
            plain = mlp(x)
    want = copy.deepcopy(mlp).double()(x.double())
    assert torch.equal(got, again)
    assert not torch.equal(got, plain) or torch.cuda.get_device_capability() < (9, 0)
    assert (got - want).norm() <= 2 * (plain - want).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1.0, 1e-12])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_mlp_in_tf32_is_as_exact_as_torch(activation: str, size: float) -> None:
    """Also far beyond the range of float16, which its factors are rounded to; `size`: of the gradient."""
    torch.manual_seed(0)
    mlp = MLP(96, 328, activation).cuda().requires_grad_(False)
    mlp.fc2.weight.mul_(1e7)
    x = (2 * torch.randn(3, 777, 96, device="cuda")).requires_grad_()
    grad = size * torch.randn(3, 777, 96, device="cuda")

    def both(mlp: MLP, x: torch.Tensor) -> list[torch.Tensor]:
        y = mlp(x)
        return [y.detach(), *torch.autograd.grad(y, x, grad.to(x.dtype))]

    with products("tf32"):
        found, again = both(mlp, x), both(mlp, x)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("any2point.sources.encoder.half_mlp", lambda *_: None)
            plain = both(mlp, x)
    exact = both(copy.deepcopy(mlp).double(), x.detach().double().requires_grad_())
    for got, same, other, want in zip(found, again, plain, exact):
        assert torch.equal(got, same)
        assert not torch.equal(got, other)
        assert (got - want).norm() <= 1.2 * (other - want).norm()


@pytest.mark.gpu
def test_rounded_weights_follow_the_parameters() -> None:
    layer = Linear(32, 48).cuda().requires_grad_(False)
    x = torch.randn(4, 32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with torch.inference_mode():
            first = layer(x)
        torch.testing.assert_close(
            first, torch.nn.functional.linear(x, layer.weight, layer.bias), rtol=0, atol=0
        )
        with torch.cuda.graph(graph):
            captured = layer(x)
        layer.load_state_dict({"weight": torch.randn(48, 32), "bias": torch.randn(48)})
        new = layer(x.requires_grad_())
        new.sum().backward()
        assert not torch.equal(new, first)
        graph.replay()
        assert torch.equal(new, captured)
        layer.requires_grad_()
        assert torch.equal(layer(x), new)
    layer.requires_grad_(False).half().float()
    assert copy.deepcopy(layer)._copies is None
    assert "_copies" not in layer.__getstate__()


@pytest.mark.gpu
def test_transposed_weights_follow_the_parameters() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    layer = Linear(96, 160).cuda().requires_grad_(False)
    x = torch.randn(7, 96, device="cuda", generator=generator).requires_grad_()
    grad = torch.randn(7, 160, device="cuda", generator=generator)

    def check(limit: float) -> None:
        (got,) = torch.autograd.grad(layer(x), x, grad)
        want = grad.double() @ layer.weight.double()
        assert (got - want).norm() <= limit * want.norm()

    check(1e-6)
    assert not layer._copies
    with products("tf32"):
        check(2**-9)
        assert layer._copies is not None
        first = layer._copies["transposed"].tensors[0]
        layer.load_state_dict({"weight": torch.randn(160, 96), "bias": torch.randn(160)})
        check(2**-9)
        assert layer._copies["transposed"].tensors[0] is first
        (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(gradient.sum(), x)[0].isfinite().all()


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
