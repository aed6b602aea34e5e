"""Evaluation of local_aggregate in bfloat16 on CPUs that multiply it: errors, edges, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neighbour_clouds import BF16_LEVELS, simd
from op_contract import Recorder, Sample, assert_same, assert_within_twice
from test_local_aggregate import make, make_unit

from any2point import ops, reference
from any2point.ops.local_aggregate import _fold
from any2point.reference.local_aggregate import encode_offsets, group_offsets, normalize_offsets

KERNEL = torch.ops.any2point._local_aggregate.default
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not BF16_LEVELS, reason="this CPU multiplies bfloat16 no faster than float32"),
]
every_level = pytest.mark.parametrize("level", BF16_LEVELS or ["none"])


def samples(sizes: tuple[int, ...], units: int = 1) -> dict[str, Any]:
    """B, N, S, K, C / 2 and H; features in bfloat16."""
    batch, n, s, k, width, hidden = sizes
    kwargs = make(batch, n, s, k, width, 0)
    kwargs["features"] = kwargs["features"].bfloat16()
    generator = torch.Generator().manual_seed(k)
    kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i != 1) for i in range(units)]
    return kwargs


def fused(kwargs: dict[str, Any], level: str) -> torch.Tensor:
    with simd(level), torch.no_grad(), Recorder() as recorder:
        out = ops.local_aggregate(**kwargs)
    (call,) = [call for call in recorder.calls if call[0] is KERNEL]
    assert call[1][1].dtype == out.dtype == torch.bfloat16
    return out


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().double()


def with_rounded_operands(kwargs: dict[str, Any]) -> torch.Tensor:
    """What the kernels compute, with exact sums: operands of the products are rounded, residuals are not."""
    points, features = kwargs["points"].double(), kwargs["features"].double()
    center, neighbor = kwargs["center"], kwargs["neighbor"]
    offset = group_offsets(points, center, neighbor, reference.group)
    offset = normalize_offsets(offset, kwargs.get("normalize", "scan"), guard=kwargs.get("guard", True))
    neighbor = torch.where(neighbor < 0, center[:, :, None], neighbor)
    middle = reference.group(features, center)[:, :, None].expand(*neighbor.shape, -1)
    x = torch.cat([reference.group(features, neighbor), middle], -1)
    x = (x + encode_offsets(offset, x.shape[-1])).flatten(0, 2)
    for unit in kwargs["units"]:
        weight, bias = _fold(unit.in_weight, unit.in_bias, unit.in_norm, 1e-5)
        hidden = (rounded(x) @ rounded(weight).T + bias).relu()
        weight, bias = _fold(unit.out_weight, unit.out_bias, unit.out_norm, 1e-5)
        x = (x + rounded(hidden) @ rounded(weight).T + bias).relu()
    return x.view(*neighbor.shape, -1).amax(2)


def check(kwargs: dict[str, Any], level: str) -> None:
    exact = reference.local_aggregate(**Sample("", kwargs).to(torch.float64).kwargs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = reference.local_aggregate(**kwargs)
    got = fused(kwargs, level)
    assert_within_twice(got, plain, exact, level)
    want = with_rounded_operands(kwargs)
    assert torch.equal(got.isnan(), want.isnan())
    # The result is rounded, and of the operands a few the other way.
    error = ((got.double() - want).abs() / want.abs().clamp(min=1)).nan_to_num()
    assert error.max() < 2**-5, f"error {error.max():.1e}"
    assert error.mean() < 2**-9, f"mean error {error.mean():.1e}"


@every_level
@pytest.mark.parametrize(
    ("sizes", "units"),
    [
        ((3, 29, 11, 5, 3, 4), 1),
        ((2, 29, 11, 1, 12, 5), 2),
        ((2, 29, 11, 6, 17, 33), 1),
        ((1, 99, 11, 81, 96, 96), 2),
        ((1, 99, 11, 64, 192, 192), 1),
        ((1, 70, 11, 33, 384, 32), 1),
        ((2, 29, 11, 17, 99, 16), 3),
        ((2, 29, 11, 4, 5, 1), 0),
        ((2, 29, 11, 9, 1, 2), 1),
    ],
)
def test_shapes(level: str, sizes: tuple[int, ...], units: int) -> None:
    kwargs = samples(sizes, units)
    for normalize, guard in (("scan", True), ("mn40", True), ("mn40", False)):
        check(kwargs | {"normalize": normalize, "guard": guard}, level)


@every_level
def test_missing_neighbours_and_centres(level: str) -> None:
    kwargs = samples((2, 21, 7, 5, 9, 4))
    kwargs["neighbor"][0, 2, 1:3] = -1
    kwargs["neighbor"][1, :, -1] = -1
    kwargs["center"][1, 4] = -1
    kwargs["neighbor"][1, 4] = -1
    check(kwargs, level)


@every_level
def test_flat_groups_and_nan(level: str) -> None:
    kwargs = samples((2, 21, 7, 5, 9, 5), 2)
    kwargs["points"][0, :, 2] = 0.25
    check(kwargs, level)
    assert fused(kwargs | {"guard": False}, level)[0].isnan().all(), "0/0 has to be seen"
    assert not fused(kwargs | {"guard": False}, level)[1].isnan().any()
    for value in (torch.nan, -torch.nan, torch.inf):
        kwargs["features"][1, 3, 0] = value
        want = reference.local_aggregate(**Sample("", kwargs).to(torch.float32).kwargs)
        assert_same(fused(kwargs, level).isfinite(), want.isfinite(), str(value))
    kwargs["units"] = []
    kwargs["features"][1, 3, 0] = torch.nan
    assert_same(fused(kwargs, level).isnan(), reference.local_aggregate(**kwargs).isnan())


@every_level
def test_angles_of_any_size(level: str) -> None:
    """Sine and cosine of far offsets: no unit, so that nothing hides them."""
    kwargs = samples((1, 40, 10, 1, 48, 1), 0) | {"normalize": "mn40"}
    kwargs["neighbor"] = torch.arange(10, 20).view(1, 10, 1)
    kwargs["features"] = torch.zeros_like(kwargs["features"])
    for beta in (1.0, 100.0, 1e4, 1e8, 1e20):
        given = kwargs | {"beta": beta}
        want = reference.local_aggregate(**given | {"features": kwargs["features"].float()})
        assert (fused(given, level) - want).abs().max() < 2**-9 + 1e-3, beta


@every_level
def test_empty(level: str) -> None:
    for batch, centers in ((0, 7), (2, 0)):
        kwargs = samples((2, 21, 7, 5, 3, 4))
        kwargs |= {name: kwargs[name][:batch] for name in ("points", "features", "center", "neighbor")}
        kwargs |= {name: kwargs[name][:, :centers] for name in ("center", "neighbor")}
        assert fused(kwargs, level).shape == (batch, centers, 6)


@every_level
def test_threads(level: str) -> None:
    kwargs = samples((3, 60, 40, 7, 24, 40), 2)
    whole = fused(kwargs, level)
    threads = torch.get_num_threads()
    try:
        for count in (2, 5):
            torch.set_num_threads(count)
            assert_same(fused(kwargs, level), whole)
    finally:
        torch.set_num_threads(threads)


def test_levels_agree() -> None:
    """Sums in another order, and seldom an operand that is rounded the other way."""
    kwargs = samples((1, 99, 11, 41, 96, 96), 2)
    results = [fused(kwargs, level).double() for level in BF16_LEVELS]
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-3 * results[0].norm()


def test_opcheck() -> None:
    with torch.no_grad(), Recorder() as recorder:
        ops.local_aggregate(**samples((2, 21, 7, 5, 6, 4)))
    (call,) = [call for call in recorder.calls if call[0] is KERNEL]
    torch.library.opcheck(*call)
