"""Properties of the virtual projection, and of models that use it, on drawn clouds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from any2point import Any2Point, Any2PointConfig, Source, ops
from any2point.nn import VirtualProjection, euler_rotations, given_lines, spread_lines, spread_rotations
from any2point.ops.virtual_project import cell_grid

SETTINGS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
KINDS = ("lines", "images")


pytestmark = pytest.mark.usefixtures("one_thread")


@st.composite
def cases(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """Clouds on a grid of 1/256 (sums and differences are exact), a table, views and cells."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    batch, count, views = draw(st.integers(1, 4)), draw(st.integers(1, 20)), draw(st.integers(1, 7))
    shape = (
        (draw(st.integers(1, 30)),) if kind == "lines" else (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    )
    centers = (torch.randn(batch, count, 3, generator=generator) * 256).round() / 256
    centers *= torch.tensor(draw(st.sampled_from([(1, 1, 1), (1, 1, 0), (0, 1, 0), (0, 0, 0)])))
    given_views: Tensor
    if kind == "lines":
        given_views = spread_lines(views) * draw(st.sampled_from([1.0, 0.01, 300.0]))
    else:
        angles = torch.randint(-360, 360, (views, 3), generator=generator).tolist()
        given_views = draw(st.sampled_from([spread_rotations(views), euler_rotations(angles)]))
    return {
        "centers": centers,
        "table": torch.randn(*shape, 4, generator=generator),
        "views": given_views,
        "cell": draw(st.sampled_from([0.4, 1.0, 2.5, 100.0])),
        "size": draw(st.sampled_from([None, [n * 7 for n in shape]])),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_independence(kind: str) -> None:
    """Of the order of the centres, of their place in space, and of the other clouds of the batch."""

    @SETTINGS
    @given(cases(kind), st.tuples(*[st.integers(-4, 4)] * 3), st.randoms(use_true_random=False))
    def check(case: dict[str, Any], shift: tuple[int, int, int], random: Any) -> None:
        centers = case["centers"]
        want = ops.virtual_project(**case)
        order = list(range(centers.shape[1]))
        random.shuffle(order)
        got = ops.virtual_project(**case | {"centers": centers[:, order]})
        assert torch.equal(got.position, want.position[:, :, order])
        assert torch.equal(got.cell, want.cell[:, :, order])
        assert torch.equal(got.encoding, want.encoding[:, order])

        clouds = list(range(len(centers)))
        random.shuffle(clouds)
        clouds = clouds[: random.randint(1, len(clouds))]
        got = ops.virtual_project(**case | {"centers": centers[clouds]})
        assert torch.equal(got.position, want.position[clouds])
        torch.testing.assert_close(got.encoding, want.encoding[clouds], rtol=1e-6, atol=1e-6)

        got = ops.virtual_project(**case | {"centers": centers + torch.tensor(shift)})
        extent = max(case["size"] or case["table"].shape[:-1])
        torch.testing.assert_close(got.position, want.position, rtol=0, atol=2e-5 * extent)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_range(kind: str) -> None:
    """Positions and cells are inside, encodings between the lowest and the highest of the table."""

    @SETTINGS
    @given(cases(kind), st.sampled_from([1.0, 1e-6, 1e6, 1e18]))
    def check(case: dict[str, Any], scale: float) -> None:
        case = case | {"centers": case["centers"] * scale}
        got = ops.virtual_project(**case)
        size = case["size"] or case["table"].shape[:-1]
        assert got.position.isfinite().all()
        assert got.position.min() >= 0
        for axis, extent in enumerate(reversed(size)):
            assert got.position[..., axis].max() <= extent - 1
        assert got.cell.min() >= 0
        assert got.cell.max() < math.prod(cell_grid(size, case["cell"]))
        table = case["table"].flatten(0, -2)
        assert (got.encoding <= table.amax(0) + 1e-5).all()
        assert (got.encoding >= table.amin(0) - 1e-5).all()

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_of_ones_gives_ones(kind: str) -> None:
    """Weights of the interpolation and of the mean over views sum to one."""

    @SETTINGS
    @given(cases(kind))
    def check(case: dict[str, Any]) -> None:
        got = ops.virtual_project(**case | {"table": torch.ones_like(case["table"])})
        torch.testing.assert_close(got.encoding, torch.ones_like(got.encoding), rtol=0, atol=1e-5)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_views(kind: str) -> None:
    @SETTINGS
    @given(cases(kind))
    def check(case: dict[str, Any]) -> None:
        want = ops.virtual_project(**case)
        single = [ops.virtual_project(**case | {"views": view[None]}) for view in case["views"]]
        mean = torch.stack([one.encoding for one in single]).mean(0)
        torch.testing.assert_close(want.encoding, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(want.position, torch.cat([one.position for one in single], 1))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_the_table(kind: str) -> None:
    """Linear in the table, at any place, with kinks or not."""

    @settings(SETTINGS, max_examples=5)
    @given(cases(kind))
    def check(case: dict[str, Any]) -> None:
        case = {k: v.double() if isinstance(v, Tensor) else v for k, v in case.items()}
        table = case.pop("table").requires_grad_()
        assert torch.autograd.gradcheck(lambda t: ops.virtual_project(table=t, **case).encoding, (table,))

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_the_centres(kind: str) -> None:
    """Of positions and encodings; cells are constants, and clamped coordinates have no gradient."""
    generator = torch.Generator().manual_seed(3)
    centers = torch.randn(1, 5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    shape, views = ((9,), spread_lines(4)) if kind == "lines" else ((5, 6), spread_rotations(4))
    table = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)

    def project(c: Tensor) -> Any:
        return ops.virtual_project(c, table, views, cell=2.0)

    assert torch.autograd.gradcheck(lambda c: project(c)[::2], (centers,))
    assert not project(centers).cell.requires_grad


def test_given_views() -> None:
    torch.testing.assert_close(
        given_lines([(0, 3, 4), (-2, 0, 0)]), torch.tensor([[0, 0.6, 0.8], [-1.0, 0, 0]])
    )
    for bad in ((0, 0, 0), (0, 1), (math.nan, 0, 0), (math.inf, 0, 0)):
        with pytest.raises(ValueError, match="`lines`: expected directions of three numbers, not all zero"):
            given_lines([bad])
    with pytest.raises(ValueError, match="`rotations`: expected three angles in degrees"):
        euler_rotations([(0, math.inf, 0)])
    turned = euler_rotations([(0, 0, 0), (90, 180, -270), (12.5, 340, -77)])
    torch.testing.assert_close(turned @ turned.mT, torch.eye(3).expand(3, 3, 3))
    torch.testing.assert_close(torch.linalg.det(turned), torch.ones(3))
    assert set(turned[1].abs().flatten().tolist()) == {0.0, 1.0}, "multiples of 90 degrees are exact"
    with pytest.raises(ValueError, match="views: expected directions that are not zero"):
        ops.virtual_project(torch.rand(1, 4, 3), torch.rand(5, 2), torch.zeros(1, 3), cell=1)


def test_a_trained_table() -> None:
    module = VirtualProjection(torch.randn(7, 4), spread_lines(2), cell=2, trained=True)
    module(torch.randn(2, 5, 3)).encoding.square().sum().backward()
    assert [name for name, _ in module.named_parameters()] == ["table"]
    assert module.table.grad is not None


@pytest.fixture(scope="module", params=["clip-text", "dinov2"])
def model(request: pytest.FixtureRequest) -> Any2Point:
    positions = (11,) if request.param == "clip-text" else (4, 6)
    source = Source.random(request.param, width=24, depth=1, heads=2, positions=positions)
    config = Any2PointConfig(
        num_points=40, num_tokens=10, neighbors=4, views=2, num_classes=3, voxel_size=0.5
    )
    return Any2Point(config, source).eval()


def test_invariants_of_the_model(model: Any2Point) -> None:
    """Order, translation and batch mates do not matter; degenerate clouds are finite."""

    @SETTINGS
    @given(st.integers(0, 10**6), st.integers(1, 4), st.tuples(*[st.integers(-4, 4)] * 3))
    @torch.no_grad()
    def check(seed: int, batch: int, shift: tuple[int, int, int]) -> None:
        generator = torch.Generator().manual_seed(seed)
        points = torch.randn(batch, 40, 3, generator=generator)  # on a grid, equal distances would be ties
        want = model(points)
        order = torch.randperm(40, generator=generator)
        torch.testing.assert_close(model(points[:, order]), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(points + torch.tensor(shift)), want, rtol=1e-4, atol=1e-4)
        mates = torch.randperm(batch, generator=generator)[: 1 + seed % batch]
        torch.testing.assert_close(model(points[mates]), want[mates], rtol=1e-4, atol=1e-4)

    flatten: list[Callable[[Tensor], Tensor]] = [
        lambda x: x * 0 + 0.3,
        lambda x: x * torch.tensor([1.0, 0, 0]),
        lambda x: x * torch.tensor([1.0, 1, 0]),
        lambda x: x * 1e6,
    ]
    check()
    for change in flatten:
        with torch.no_grad():
            assert model(change(torch.randn(2, 40, 3))).isfinite().all()
