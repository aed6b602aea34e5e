"""Frozen linear layers on a CPU: the products of torch, eagerly and everywhere else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.sources.linear import Linear, _is_product

pytestmark = pytest.mark.usefixtures("one_thread")
IS_THERE = torch.backends.mkldnn.is_available()


def frozen(width: int = 37, out: int = 53, bias: bool = True) -> Linear:
    torch.manual_seed(0)
    return Linear(width, out, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (2, 9, 37), (3, 1, 37)])
def test_product_and_gradient(shape: tuple[int, ...], bias: bool) -> None:
    layer = frozen(bias=bias)
    x = torch.randn(shape).requires_grad_()
    assert _is_product(x, layer) == IS_THERE
    got, exact = layer(x), copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(got, exact.float(), rtol=1e-5, atol=1e-5)
    grad = torch.randn(got.shape)
    (got_x,) = torch.autograd.grad(got, x, grad)
    torch.testing.assert_close(got_x, grad @ layer.weight, rtol=1e-5, atol=1e-5)


def test_strided_input_and_gradient() -> None:
    layer = frozen()
    x = torch.randn(37, 6, 4).transpose(0, 2).requires_grad_()
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    (got,) = torch.autograd.grad(out.sum(), x)  # an expanded gradient
    torch.testing.assert_close(got, layer.weight.sum(0).expand(x.shape), rtol=1e-5, atol=1e-5)


def test_gradient_twice() -> None:
    layer, x = frozen(), torch.randn(4, 37).requires_grad_()
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(first.sum(), x)
    (first,) = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).pow(3).sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_what_torch_does() -> None:
    layer, x = frozen(), torch.randn(4, 37)
    assert not _is_product(x.double(), layer.double())
    layer = frozen()
    assert not _is_product(x.bfloat16(), layer)
    assert not _is_product(x[:0], layer)
    assert layer(x[:0]).shape == (0, 53)
    with torch.autocast("cpu", torch.bfloat16):
        assert not _is_product(x, layer)
        assert layer(x).dtype == torch.bfloat16
    trained = frozen().requires_grad_()
    assert not _is_product(x, trained)
    assert trained(x).requires_grad
    with torch.no_grad():
        assert _is_product(x, trained) == IS_THERE


@pytest.mark.filterwarnings("ignore")
def test_transformations() -> None:
    layer, x = frozen(), torch.randn(4, 37)
    want = F.linear(x, layer.weight, layer.bias)

    def check(got: Tensor) -> None:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    check(torch.func.vmap(layer)(x))
    check(torch.compile(layer, backend="aot_eager", fullgraph=True)(x))
    check(torch.export.export(layer, (x,)).module()(x))
    check(torch.jit.trace(layer, (x,))(x))
    check(nn.Sequential(layer)(x))
    grads = torch.func.jacrev(lambda y: layer(y).sum())(x)
    torch.testing.assert_close(grads, layer.weight.sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)
