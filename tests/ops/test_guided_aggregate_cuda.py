"""The CUDA kernels of guided_aggregate, against the composition in float64 and the CPU's lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_contract import Recorder, assert_same
from test_guided_aggregate import make
from test_guided_aggregate_fused import (
    KERNEL,
    assert_near,
    composition,
    derive,
    equal_views,
    shapes,
    voxels_across_clouds,
)
from torch import Tensor
from torch.utils._pytree import tree_map

from any2point.ops import guided_aggregate

pytestmark = pytest.mark.gpu


def on_cuda(kwargs: dict[str, Any]) -> dict[str, Any]:
    return tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, kwargs)


def step(kwargs: dict[str, Any]) -> list[Tensor]:
    return [x.cpu() for x in derive(guided_aggregate, on_cuda(kwargs))]


def check(kwargs: dict[str, Any]) -> None:
    """Nearly as close to float64 as the composition in float32; and the same bits again."""
    with Recorder() as recorder:
        got = step(kwargs)
    assert KERNEL in [call[0] for call in recorder.calls], "the composition ran"
    assert_near(got, kwargs, 2e-5)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        assert_same(step(kwargs), got)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("ensemble", ["adaptive", "mean", "max"])
@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_against_float64(ensemble: str, pooling: str) -> None:
    options = {"ensemble": ensemble, "pooling": pooling}
    for training in (False, True):
        check(make() | options | {"training": training})
        odd = make(batch=3, s=40, width=41, views=3, cells=9, hidden=6)
        check(odd | options | {"training": training, "count_empty": training})


@pytest.mark.parametrize("name", shapes())
def test_shapes(name: str) -> None:
    for training in (False, True):
        check(shapes()[name] | {"training": training})


@pytest.mark.parametrize("width", [36, 768, 1024, 1028])
@pytest.mark.parametrize("cells", [39, 400])
def test_six_views(width: int, cells: int) -> None:
    """What has kernels of its own: six views of up to 1,024 channels."""
    kwargs = make(batch=2, s=128, width=width, views=6, cells=cells, hidden=12) | {"num_heads": 6}
    for training in (False, True):
        check(kwargs | {"training": training})


@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
@pytest.mark.parametrize("count", [600, 640, 700])
def test_clouds_that_shared_memory_can_hold_or_not(count: int, pooling: str) -> None:
    """A slice's rows, and the queries, keys and values of a view."""
    kwargs = make(batch=2, s=count, width=20, views=2, cells=60, hidden=24)
    check(kwargs | {"training": True, "pooling": pooling})


def test_views_whose_rows_are_kept_in_turn() -> None:
    """More rows than a block keeps of all views; columns of the projection in two tiles."""
    for count, width, views in ((300, 40, 3), (257, 68, 2), (128, 72, 7)):
        check(make(batch=2, s=count, width=width, views=views, cells=900, hidden=18) | {"training": True})


def test_tokens_without_a_voxel() -> None:
    kwargs = make(batch=3, s=40, width=72, views=3, cells=9, hidden=6)
    kwargs["cluster"][0, ::2] = -1
    kwargs["cluster"][2] = -1
    check(kwargs | {"training": True})


@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_equal_views_share_the_gradient_of_a_maximum(pooling: str) -> None:
    check(equal_views() | {"pooling": pooling})


def test_voxels_across_clouds_and_without_tokens() -> None:
    check(voxels_across_clouds())


# Tokens, channels, inner width, heads and cells: where 16-bit features take one kernel or another.
LOW = {
    "no multiple of eight channels": (30, 36, 12, 6, 11),
    "no multiple of four": (30, 42, 12, 6, 11),
    "one token": (1, 40, 12, 6, 1),
    "most tokens of a product": (128, 136, 12, 6, 43),
    "more tokens": (129, 136, 12, 6, 44),
    "widest attention of a product": (50, 64, 15, 5, 17),
    "wider attention": (50, 64, 16, 4, 17),
    "most channels in shared memory": (70, 1024, 12, 6, 24),
    "more channels": (20, 1032, 12, 6, 7),
    "more rows than at once": (128, 72, 12, 6, 300),
}


def make_low(name: str, dtype: torch.dtype) -> dict[str, Any]:
    count, width, hidden, heads, cells = LOW[name]
    kwargs = make(batch=3, s=count, width=width, views=6, cells=cells, hidden=hidden)
    attention = kwargs["attention"]
    kwargs["attention"] = attention._replace(qkv_weight=attention.qkv_weight * width**-0.5)
    return on_cuda(kwargs | {"num_heads": heads, "features": kwargs["features"].to(dtype)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(dtype: torch.dtype, name: str, autocast: bool) -> None:
    """16-bit features are rounded where the tensor cores take them and at the end, their gradient too."""
    kwargs = make_low(name, dtype) | {"training": True}
    low = kwargs["features"]
    results = []
    for features in (low, low.float()):
        given = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, kwargs)
        leaf = features.clone().requires_grad_()
        weight = given["attention"].qkv_weight.requires_grad_()
        with torch.autocast("cuda", dtype, enabled=autocast and features is low):
            out = guided_aggregate(**given | {"features": leaf})
        assert out.dtype == leaf.dtype
        grads = torch.autograd.grad(out.float().square().sum(), [leaf, weight])
        results.append([out, grads[0], grads[1]])
    bound = 3e-3 if dtype == torch.float16 else 2.4e-2
    for got, want, most in zip(*results, (bound, bound, 4 * bound), strict=True):
        error = float((got.detach().float() - want).norm() / (want.norm() + 1e-3))
        assert error < most, error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_errs_like_the_composition(dtype: torch.dtype, name: str, autocast: bool) -> None:
    """At most twice as far from float64, under the same autocast; gradients of the features too."""
    for training in (False, True):
        kwargs = make_low(name, dtype) | {"training": training}
        double = tree_map(lambda x: x.double() if _floats(x) else x, kwargs)
        exact = _with_gradient(composition, double)
        results = []
        for function in (guided_aggregate, composition):
            given = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, kwargs)
            with torch.autocast("cuda", dtype, enabled=autocast):
                found = _with_gradient(function, given)
            results.append([x.double() - y for x, y in zip(found, exact, strict=True)])
        got, plain = (
            [float(out.abs().max()), *(float(x.norm()) for x in (out, grad))] for out, grad in results
        )
        assert all(x <= 2 * y for x, y in zip(got, plain, strict=True)), (got, plain)


@pytest.mark.parametrize("name", LOW)
@pytest.mark.parametrize("training", [False, True])
def test_float32_features_keep_their_bits_in_bfloat16(name: str, training: bool) -> None:
    """What is added to them is rounded, and what is added to their gradient, but nothing else."""
    kwargs = make_low(name, torch.float32) | {"training": training}
    exact = _with_gradient(composition, tree_map(lambda x: x.double() if _floats(x) else x, kwargs))
    given = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, kwargs)
    with torch.autocast("cuda", torch.bfloat16):
        got = _with_gradient(guided_aggregate, given)
        none = _with_gradient(guided_aggregate, given | {"coefficient": 0.0})
    features, grad = kwargs["features"], none[1]
    assert got[0].dtype == got[1].dtype == torch.float32
    assert torch.equal(none[0], features)
    for found, want, base in zip(got, exact, (features, grad), strict=True):
        assert (found - want).norm() < 4e-2 * (want - base).norm()


def _with_gradient(function: Callable[..., Tensor], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = kwargs["features"].requires_grad_()
    out = function(**kwargs)
    eighths = (torch.arange(out.numel(), device=out.device) * 7 % 17 - 8).view(out.shape).to(out.dtype) / 8
    return out.detach(), torch.autograd.grad(out, leaf, eighths)[0]


# Clouds, tokens, channels, views, cells and inner width. Where blocks of a cloud and 192 channels are as many
# as processors, or half of them at least, there are kernels for them: here of 132.
CLOUDS = {
    "odd": (40, 29, 200, 3, 9, 6),
    "one token": (70, 1, 40, 2, 5, 4),
    "as in the model": (20, 128, 768, 6, 39, 12),
    "more cells than a block has room for": (24, 128, 392, 6, 400, 12),
    "more clouds than run at once": (140, 20, 72, 6, 7, 12),
    "many views": (12, 50, 1536, 9, 20, 15),
    "one view of one cell": (80, 60, 8, 1, 1, 4),
    "few clouds": (3, 128, 768, 6, 39, 12),
    "one cloud": (1, 128, 768, 6, 39, 12),
    "few clouds of cells with many tokens": (1, 100, 72, 3, 2, 12),
    "few clouds of one cell": (2, 60, 10, 1, 1, 4),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CLOUDS)
@pytest.mark.parametrize("option", ["plain", "mean of views", "empty cells count", "voxels across clouds"])
def test_clouds_in_low_precision(dtype: torch.dtype, name: str, option: str) -> None:
    """As far from what float32 gives for the same tokens as twice the rounding of the result."""
    batch, count, width, views, cells, hidden = CLOUDS[name]
    kwargs = make(batch=batch, s=count, width=width, views=views, cells=cells, hidden=hidden)
    kwargs["attention"] = kwargs["attention"]._replace(
        qkv_weight=kwargs["attention"].qkv_weight * width**-0.5
    )
    if option == "mean of views":
        kwargs["ensemble"] = "mean"
    kwargs["count_empty"] = option == "empty cells count"
    if option == "voxels across clouds":  # and tokens without a voxel
        kwargs["cluster"] = torch.arange(batch * count).view(batch, count) * 7 % (batch * count // 2 + 1)
        kwargs["cluster"][:, ::3] = -1
    kwargs = on_cuda(kwargs | {"num_heads": 1})
    low = kwargs["features"].to(dtype)
    for training in (False, True):
        results = []
        for features in (low, low.float(), low):
            given = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, kwargs)
            given |= {"features": features, "training": training}
            out = guided_aggregate(**given)
            results.append([out, *given["view_norm"][2:], *given["space_norm"][2:]])
        got, want, again = results
        assert_same(again, got)
        rounding = float((want[0].to(dtype).double() - want[0].double()).norm())
        error = float((got[0].double() - want[0].double()).norm())
        assert error <= 2 * rounding + 1e-6, (error, rounding)
        for x, y in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# As above: odd numbers, tiles of rows in more than one turn, more views than tiles have room for.
GRADIENTS = {
    "odd": (3, 29, 72, 3, 9, 6),
    "one token": (5, 1, 40, 2, 5, 4),
    "a row for every token": (2, 128, 72, 6, 4000, 12),
    "one row for all tokens": (9, 128, 64, 2, 1, 15),
    "rows of a tile and one": (2, 100, 136, 5, 17, 12),
    "many views": (2, 50, 64, 9, 20, 15),
    "too many views": (2, 20, 24, 48, 6, 4),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("option", ["plain", "empty cells count", "voxels across clouds"])
def test_gradients_of_clouds_in_low_precision(dtype: torch.dtype, name: str, option: str) -> None:
    """Of features and weights, as near those of float32 as rounding allows; and the same bits again."""
    batch, count, width, views, cells, hidden = GRADIENTS[name]
    kwargs = make(batch=batch, s=count, width=width, views=views, cells=cells, hidden=hidden)
    kwargs["attention"] = kwargs["attention"]._replace(
        qkv_weight=kwargs["attention"].qkv_weight * width**-0.5
    )
    kwargs["count_empty"] = option == "empty cells count"
    if option == "voxels across clouds":  # and tokens without a voxel
        kwargs["cluster"] = torch.arange(batch * count).view(batch, count) * 7 % (batch * count // 2 + 1)
        kwargs["cluster"][:, ::3] = -1
    kwargs = on_cuda(kwargs | {"num_heads": 1, "training": True})
    low = kwargs["features"].to(dtype)
    results = []
    for features in (low, low.float(), low):
        given = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, kwargs)
        norms = [*given["view_norm"][:2], *given["space_norm"][:2]]
        leaves = [features.clone(), given["attention"].proj_weight, given["attention"].qkv_weight, *norms]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        out = guided_aggregate(**given | {"features": leaves[0]})
        eighths = (torch.arange(out.numel(), device="cuda") * 7 % 17 - 8).view(out.shape).to(out.dtype) / 8
        found = torch.autograd.grad(out, leaves, eighths)
        results.append([found[0].float() - eighths.float(), *found[1:]])
    got, want, again = results
    assert_same(again, got)
    bound = 6e-3 if dtype == torch.float16 else 4e-2
    for x, y in zip(got, want, strict=True):
        assert float((x - y).norm()) <= bound * float(y.norm()) + 1e-3, (x - y).norm() / y.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["as in the model", "few clouds"])
def test_what_all_rows_have_in_common_leaves_their_variance_exact(dtype: torch.dtype, name: str) -> None:
    batch, count, width, views, cells, hidden = CLOUDS[name]
    kwargs = make(batch=batch, s=count, width=width, views=views, cells=cells, hidden=hidden)
    weight = kwargs["attention"].qkv_weight * width**-0.5
    far = kwargs["attention"].proj_bias + 300
    kwargs["attention"] = kwargs["attention"]._replace(qkv_weight=weight, proj_bias=far)
    kwargs["features"] = kwargs["features"].to(dtype)
    kwargs = on_cuda(kwargs | {"num_heads": 1, "training": True, "momentum": 1.0})
    double = tree_map(lambda x: x.double() if _floats(x) else x, kwargs)
    guided_aggregate(**kwargs)
    composition(**double)
    for norm in ("view_norm", "space_norm"):
        got, want = (found[norm].running_var.double() for found in (kwargs, double))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)


def _floats(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


# Tokens, channels and columns: less than a tile, no multiples, more than at once.
PRODUCTS = [(5, 8, 3), (70, 104, 36), (128, 192, 224), (150, 200, 216), (300, 136, 250)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [*PRODUCTS, (513, 768, 216), (700, 1024, 250)])
def test_product(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Operands in 16 bits, sums in float32; float32 tokens are rounded first."""
    rows, width, columns = sizes
    torch.manual_seed(rows)
    whole = 2 + 3 * torch.randn(1, rows, width, device="cuda")
    x, low = whole.to(dtype), torch.randn(columns, width, device="cuda").to(dtype)
    bias = torch.randn(columns, device="cuda")
    args = low.float(), low, low.float().sum(1), bias, 1e-5
    got = torch.ops.any2point._guided_product(x, *args)
    wide = x[0].double()
    want = F.linear(F.layer_norm(wide, (width,)), low.double(), bias.double())
    moments = torch.stack([wide.mean(1), (wide.var(1, unbiased=False) + 1e-5).rsqrt()])
    for value, exact in zip(got, (want[None], moments), strict=False):
        assert float((value.double() - exact).norm() / exact.norm()) < 1e-5
    rounded = torch.ops.any2point._guided_product(whole, *args)
    assert_same(rounded, [*got[:2], x])
    assert_same(torch.ops.any2point._guided_product(x, *args), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", PRODUCTS)
def test_gradient_of_the_product(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Operands and the tokens' gradient are rounded to the features' dtype, nothing else."""
    rows, width, columns = sizes
    torch.manual_seed(rows)
    x = (2 + 3 * torch.randn(1, rows, width, device="cuda")).to(dtype)
    low = torch.randn(columns, width, device="cuda").to(dtype)
    bias, grad = torch.randn(columns, device="cuda"), torch.randn(1, rows, columns, device="cuda")
    leaves = [tensor.double().requires_grad_() for tensor in (x, low, bias)]
    product = F.linear(F.layer_norm(leaves[0], (width,)), *leaves[1:])
    want = torch.autograd.grad(product, leaves, grad.double())
    wide = x[0].double()
    moments = torch.stack([wide.mean(1), (wide.var(1, unbiased=False) + 1e-5).rsqrt()]).float()
    args = grad, product.detach().float(), x, low, low.float().sum(1), bias, moments
    got = torch.ops.any2point._guided_product_backward(*args)
    bound = 5e-4 if dtype == torch.float16 else 4e-3
    for value, exact, most in zip(got, want, (bound, bound, 1e-6), strict=True):
        assert float((value.double() - exact).norm() / exact.norm()) < most
    assert_same(torch.ops.any2point._guided_product_backward(*args), got)
    torch.library.opcheck(torch.ops.any2point._guided_product_backward, args)


def test_voxels_across_clouds_of_six_views() -> None:
    """Rows of voxels that are not together are kept per token."""
    kwargs = make(batch=3, s=40, width=72, views=6, hidden=12) | {"num_heads": 6, "training": True}
    kwargs["cluster"] = torch.arange(120).view(3, 40) * 7 % 90
    check(kwargs)


def test_lists_are_those_of_the_cpu() -> None:
    for batch, views, count, cells in ((3, 2, 37, 11), (2, 6, 300, 5000), (1, 1, 1, 1), (0, 2, 3, 4)):
        cell = torch.randint(cells, (batch, views, count))
        cluster = torch.randint(-1, max(batch * count, 1), (batch, count))
        want = torch.ops.any2point._guided_lists(cell, cluster, cells)
        got = torch.ops.any2point._guided_lists(cell.cuda(), cluster.cuda(), cells)
        inside = int(want[2][-1, -1])  # what is in no voxel is listed nowhere
        for x, y in zip(got, want, strict=True):
            assert_same([x[:-1].cpu(), x[-1, :inside].cpu()], [y[:-1], y[-1, :inside]])


@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_training_step_in_a_graph_and_behind_another_stream(pooling: str) -> None:
    kwargs = on_cuda(make(batch=2, s=30, width=36, views=6, hidden=12)) | {"training": True, "num_heads": 6}
    kwargs["pooling"] = pooling
    want = derive(guided_aggregate, kwargs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        assert_same(derive(guided_aggregate, kwargs), want)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = derive(guided_aggregate, kwargs)
    for x in got:
        x.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want)


def test_drawn_on_the_device() -> None:
    for rows in (False, True):
        kwargs = make(batch=6, s=9) | {"training": True, "drop_path": 0.4, "drop_path_rows": rows}
        assert all(x.isfinite().all() for x in step(kwargs))


def test_no_tokens() -> None:
    for batch, count in ((0, 9), (2, 0)):
        kwargs = on_cuda(make()) | {"training": True}
        kwargs["features"] = torch.zeros(batch, count, 8, device="cuda", requires_grad=True)
        kwargs["cell"] = torch.zeros(batch, 2, count, dtype=torch.int64, device="cuda")
        kwargs["cluster"] = torch.zeros(batch, count, dtype=torch.int64, device="cuda")
        out = guided_aggregate(**kwargs)
        assert out.shape == (batch, count, 8)
        out.sum().backward()


def test_op_is_registered_as_torch_asks() -> None:
    for options in ({}, {"training": True, "pooling": "max+mean"}, {"ensemble": "max", "training": True}):
        low = bool(options)  # with float32 features that the blend is added to
        with Recorder() as recorder, torch.autocast("cuda", torch.bfloat16, enabled=low):
            guided_aggregate(**on_cuda(make(s=5) | options))
        for op, args, kwargs in recorder.calls:
            torch.library.opcheck(op, args, kwargs)
