"""The CPU's kernels for local_aggregate, against the composition in float64, at every SIMD level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neighbour_clouds import LEVELS, simd
from op_contract import Recorder, assert_same
from test_local_aggregate import make, make_unit
from torch.utils._pytree import tree_leaves, tree_map

from any2point import ops, reference
from any2point.ops import local_aggregate

KERNEL = torch.ops.any2point._local_aggregate.default
TRAIN = torch.ops.any2point._local_aggregate_train.default


def fused(kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad(), Recorder() as recorder:
        out = local_aggregate(**kwargs)
    assert KERNEL in [call[0] for call in recorder.calls], "the composition ran"
    return out


def check(kwargs: dict[str, Any], level: str, tolerance: float = 2e-6) -> None:
    with simd(level):
        got = fused(kwargs)
    exact = {
        name: value.double() if name in ("points", "features") else value for name, value in kwargs.items()
    }
    exact["units"] = tree_map(lambda x: x if x is None else x.double(), kwargs["units"])
    want = reference.local_aggregate(**exact)
    assert torch.equal(got.isnan(), want.isnan())
    scale = want.nan_to_num().abs().max().clamp(min=1)
    error = ((got - want).nan_to_num().abs().max() / scale).item()
    assert error < tolerance, f"relative error {error:.1e}"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("k", "width", "hidden", "units"),
    [
        (5, 3, 4, 1),
        (1, 12, 5, 2),
        (6, 17, 33, 1),
        (13, 48, 70, 2),
        (7, 99, 16, 3),
        (4, 5, 1, 0),
        (9, 1, 2, 1),
    ],
)
def test_shapes(level: str, k: int, width: int, hidden: int, units: int) -> None:
    kwargs = make(3, 29, 11, k, width, 0)
    generator = torch.Generator().manual_seed(k)
    kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i != 1) for i in range(units)]
    for normalize, guard in (("scan", True), ("mn40", True), ("mn40", False)):
        check(kwargs | {"normalize": normalize, "guard": guard}, level, 6e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_missing_neighbours_and_centres(level: str) -> None:
    kwargs = make(2, 21, 7, 5, 9, 1)
    kwargs["neighbor"][0, 2, 1:3] = -1
    kwargs["neighbor"][1, :, -1] = -1
    kwargs["center"][1, 4] = -1
    kwargs["neighbor"][1, 4] = -1
    check(kwargs, level)


@pytest.mark.parametrize("level", LEVELS)
def test_flat_groups_and_nan(level: str) -> None:
    kwargs = make(2, 21, 7, 5, 9, 1)
    kwargs["points"][0, :, 2] = 0.25
    check(kwargs, level)
    with simd(level):
        assert fused(kwargs | {"guard": False})[0].isnan().all(), "0/0 has to be seen"
        assert not fused(kwargs | {"guard": False})[1].isnan().any()
    kwargs["features"][1, 3, 0] = torch.nan
    check(kwargs, level)
    kwargs["features"][1, 3, 0] = torch.inf
    with simd(level):
        assert_same(fused(kwargs).isfinite(), reference.local_aggregate(**kwargs).isfinite())


@pytest.mark.parametrize("level", LEVELS)
def test_angles_of_any_size(level: str) -> None:
    """Sine and cosine of far offsets: no unit, so that nothing hides them."""
    kwargs = make(1, 40, 10, 1, 48, 0) | {"normalize": "mn40"}
    kwargs["neighbor"] = torch.arange(10, 20).view(1, 10, 1)
    for beta in (1.0, 100.0, 1e4, 1e8, 1e20):
        given = kwargs | {"beta": beta}
        with simd(level):
            got = fused(given)
        want = reference.local_aggregate(**given)
        # The kernel switches to the C library's functions where its own reduction would lose digits.
        assert (got - want).abs().max() < 1.5e-6, beta


def test_empty() -> None:
    for batch, centers in ((0, 7), (2, 0)):
        kwargs = make(2, 21, 7, 5, 3, 1)
        kwargs |= {name: kwargs[name][:batch] for name in ("points", "features", "center", "neighbor")}
        kwargs |= {name: kwargs[name][:, :centers] for name in ("center", "neighbor")}
        assert fused(kwargs).shape == (batch, centers, 6)


@pytest.mark.parametrize("level", LEVELS)
def test_low_precision_and_threads(level: str) -> None:
    """float16, and bfloat16 where there are no products of it: computed in float32."""
    kwargs = make(3, 29, 11, 5, 12, 2)
    with simd(level):
        whole = fused(kwargs)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert_same(fused(kwargs), whole)
        finally:
            torch.set_num_threads(threads)
        for dtype in (torch.float16, torch.bfloat16):
            low = kwargs | {"features": kwargs["features"].to(dtype)}
            want = fused(kwargs | {"features": low["features"].float()})
            assert_same(fused(low), want.to(dtype))


def test_autocast() -> None:
    """In evaluation the features are rounded; training, which would gain nothing, keeps them."""
    kwargs = make(3, 29, 11, 5, 12, 1)
    low = fused(kwargs | {"features": kwargs["features"].bfloat16()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(fused(kwargs), low)
        with torch.no_grad():
            assert local_aggregate(**kwargs, training=True).dtype == torch.float32
        kwargs["features"].requires_grad_()
        assert local_aggregate(**kwargs).dtype == torch.float32


def test_when_it_may_run() -> None:
    kwargs = make(2, 21, 7, 5, 3, 1)
    weight = kwargs["units"][0].in_weight
    cases = {
        "training with moving points": kwargs
        | {"training": True, "points": kwargs["points"].clone().requires_grad_()},
        "float64": kwargs | {"features": kwargs["features"].double()},
        "gradient": kwargs | {"features": kwargs["features"].clone().requires_grad_()},
        "weight": kwargs
        | {"units": [kwargs["units"][0]._replace(in_weight=weight.clone().requires_grad_())]},
    }
    for name, case in cases.items():
        with Recorder() as recorder:
            local_aggregate(**case)
        assert not {KERNEL, TRAIN} & {call[0] for call in recorder.calls}, name


def test_bad_rows() -> None:
    kwargs = make(2, 21, 7, 5, 3, 1)
    for name, value in (("neighbor", 21), ("center", 21), ("center", -2)):
        bad = kwargs[name].clone()
        bad.view(-1)[-1] = value
        with pytest.raises(ValueError, match=f"{name}: expected .*got {value}"):
            fused(kwargs | {name: bad})


def test_opcheck() -> None:
    for normalize in ("scan", "mn40"):
        with torch.no_grad(), Recorder() as recorder:
            ops.local_aggregate(**make(), normalize=normalize)
        calls = [call for call in recorder.calls if call[0] is KERNEL]
        assert len(calls) == 1
        torch.library.opcheck(*calls[0])


def train(function: Callable[..., torch.Tensor], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """Output, gradients of the features and of every parameter, and the statistics after one step."""

    def own(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype, copy=True).requires_grad_()

    given = tree_map(own, kwargs)
    given["points"].requires_grad_(False)
    statistics, leaves = [], [given["features"]]
    for unit in given["units"]:
        for norm in (unit.in_norm, unit.out_norm):
            statistics += [norm.running_mean.requires_grad_(False), norm.running_var.requires_grad_(False)]
            leaves += [norm.weight, norm.bias]
        leaves += [unit.in_weight, unit.out_weight]
    with Recorder() as recorder:
        out = function(**given, training=True)
    fused = TRAIN in [call[0] for call in recorder.calls]
    assert fused == (function is local_aggregate), "the composition ran"
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    biases = [b for unit in given["units"] for b in (unit.in_bias, unit.out_bias) if b is not None]
    found = torch.autograd.grad(out, leaves + biases, grad)
    for value in found[len(leaves) :]:
        assert value.abs().max() < 1e-6 * grad.abs().sum(), "a bias before a normalisation has no gradient"
    return out, found[: len(leaves)], statistics


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("k", "width", "hidden", "units"), [(5, 6, 4, 1), (1, 12, 5, 2), (6, 17, 33, 1), (13, 8, 20, 3)]
)
def test_training(level: str, k: int, width: int, hidden: int, units: int) -> None:
    kwargs = make(3, 29, 11, k, width, 0)
    generator = torch.Generator().manual_seed(k)
    kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i != 1) for i in range(units)]
    kwargs["neighbor"][0, 2, : k // 2] = -1
    kwargs["neighbor"][1, 3] = kwargs["center"][1, 3] = -1
    for normalize, guard in (("scan", True), ("mn40", True), ("mn40", False)):
        given = kwargs | {"normalize": normalize, "guard": guard}
        with simd(level):
            got = train(local_aggregate, given, torch.float32)
        want = train(reference.local_aggregate, given, torch.float64)
        for a, b in zip(tree_leaves(got), tree_leaves(want), strict=True):
            # A ReLU's kink between the two precisions would show as a single wrong row.
            error = (a - b).norm() / b.norm().clamp(min=1e-3)
            assert error < 3e-5, f"{normalize}: relative error {error:.1e} of {list(a.shape)}"


def test_training_is_deterministic() -> None:
    """Whatever the number of threads; sums go by chunks of groups."""
    kwargs = make(3, 200, 90, 5, 12, 2)
    want = train(local_aggregate, kwargs, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (2, 5):
            torch.set_num_threads(count)
            assert_same(train(local_aggregate, kwargs, torch.float32), want)
    finally:
        torch.set_num_threads(threads)


def test_training_compiles() -> None:
    kwargs = make(2, 21, 7, 5, 6, 2)
    compiled = torch.compile(local_aggregate, fullgraph=True, backend="aot_eager")

    def step(function: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        given = tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, kwargs)
        given["features"].requires_grad_()
        out = function(**given, training=True)
        norms = [x for unit in given["units"] for x in (*unit.in_norm[2:], *unit.out_norm[2:])]
        return (out.detach(), *torch.autograd.grad(out.square().sum(), given["features"]), *norms)

    # What is traced beside the kernels may be rounded otherwise.
    torch.testing.assert_close(step(compiled), step(local_aggregate), rtol=1e-5, atol=1e-5)


def test_training_opcheck() -> None:
    kwargs = make(2, 21, 7, 5, 6, 2)
    with Recorder() as recorder:
        local_aggregate(**kwargs, training=True)
    (call,) = [call for call in recorder.calls if call[0] is TRAIN]
    torch.library.opcheck(*call)
    kwargs["features"].requires_grad_()
    out = local_aggregate(**kwargs, training=True)
    with Recorder() as recorder:
        out.sum().backward()
    (call,) = [
        c for c in recorder.calls if c[0] is torch.ops.any2point._local_aggregate_train_backward.default
    ]
    detached = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, call)
    torch.library.opcheck(*detached)
