"""virtual_project: the battery, independent computations of lines and images, invariants, official quirks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_contract import OpContract, Sample

from any2point import ops, reference
from any2point.nn import spread_lines, spread_rotations
from any2point.ops.virtual_project import cell_grid


def lines(batch: int = 2, s: int = 9, length: int = 11, width: int = 5, views: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(s)
    return {
        "centers": torch.randn(batch, s, 3, generator=generator),
        "table": torch.randn(length, width, generator=generator),
        "views": spread_lines(views),
        "cell": 2.0,
    }


def images(
    batch: int = 2, s: int = 9, grid: tuple[int, int] = (5, 7), width: int = 4, views: int = 6
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(s)
    return {
        "centers": torch.randn(batch, s, 3, generator=generator),
        "table": torch.randn(*grid, width, generator=generator),
        "views": spread_rotations(views),
        "cell": 1.5,
    }


pytestmark = pytest.mark.usefixtures("one_thread")


class TestVirtualProject(OpContract):
    op = staticmethod(ops.virtual_project)
    reference = staticmethod(reference.virtual_project)
    differentiable = ("table", "centers")

    def samples(self, device: str) -> Iterator[Sample]:
        yield Sample("lines", Sample("", lines()).to(device).kwargs)
        yield Sample("images", Sample("", images()).to(device).kwargs)
        yield Sample("one token", Sample("", lines(batch=1, s=1)).to(device).kwargs)
        yield Sample("more positions", Sample("", lines() | {"size": (29,), "cell": 3}).to(device).kwargs)
        yield Sample("wrapped lines", Sample("", lines() | {"wrap": True}).to(device).kwargs)
        official = {"wrap": True, "camera": 6.0, "scramble": True, "size": (70, 90), "cell": 20}
        yield Sample("wrapped images", Sample("", images() | official).to(device).kwargs)

    def compare(self, got: Any, want: Any, dtype: torch.dtype, note: str) -> None:
        # Tables are interpolated at coordinates of up to some tens: one rounding there is 1e-5 of the result.
        super().compare(got[:2], want[:2], torch.float32 if dtype != torch.float64 else dtype, note)
        tolerance = {torch.float64: 1e-10, torch.float32: 3e-5}.get(dtype, 2e-2)
        torch.testing.assert_close(
            got.encoding,
            want.encoding.to(got.encoding),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m: f"{note}: {m}",
        )

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield {"centers": torch.rand(2, 9, 2)}, ValueError, r"centers: expected shape \[B, S, 3\]"
        yield {"centers": torch.rand(2, 0, 3)}, ValueError, "S > 0"
        yield {"centers": torch.zeros(2, 9, 3, dtype=torch.int32)}, TypeError, "centers: expected float16"
        yield {"table": torch.rand(5)}, ValueError, r"table: expected shape \[L, C\]"
        yield {"table": torch.rand(0, 5)}, ValueError, "table: expected at least one position"
        yield {"views": torch.eye(3)[None]}, ValueError, r"views: expected shape \[V, 3\] for this table"
        yield {"views": torch.rand(4, 2)}, ValueError, r"views: expected shape \[V, 3\] for this table"
        yield {"cell": 0}, ValueError, "cell: expected a positive number"
        yield {"cell": float("inf")}, ValueError, "cell: expected a positive number, got inf"
        yield {"cell": "2"}, TypeError, "cell: expected a number, got str"
        yield {"cell": 1e-9}, ValueError, r"cell: expected less than 2\^31 cells, got 11000000000"
        yield {"size": (3, 4)}, ValueError, "size: expected 1 number"
        yield {"size": 3}, ValueError, "size: expected 1 number"
        yield {"size": (0,)}, ValueError, "size: expected at least 1, got 0"
        yield {"size": (2.5,)}, TypeError, "size: expected an int, got float"
        yield {"views": torch.ones(3, 3).long()}, TypeError, "views: expected float16"
        yield {"camera": 2.0}, ValueError, "camera: expected None for a sequence, got 2.0"
        yield {"scramble": True}, ValueError, "scramble: expected False for a sequence"
        yield images() | {"camera": 0}, ValueError, "camera: expected a positive number, got 0"


@pytest.mark.parametrize("kwargs", [lines(batch=0), images(batch=0)])
def test_no_clouds(kwargs: dict[str, Any]) -> None:
    got = ops.virtual_project(**kwargs)
    assert got.encoding.shape == (0, 9, kwargs["table"].shape[-1])
    assert got.cell.shape == (0, len(kwargs["views"]), 9)
    with pytest.raises(ValueError, match="wrap: expected False for a batch without clouds"):
        ops.virtual_project(**kwargs, wrap=True)


def test_lines_independently() -> None:
    kwargs = Sample("", lines()).to(torch.float64).kwargs
    got = ops.virtual_project(**kwargs)
    centers, table, views = (kwargs[k].numpy() for k in ("centers", "table", "views"))
    for b, v, s in np.ndindex(2, 3, 9):
        along = centers[b] @ views[v] / np.linalg.norm(views[v])
        position = (along[s] - along.min()) / (along.max() - along.min()) * 10
        assert got.position[b, v, s, 0].item() == pytest.approx(position, abs=1e-12)
        assert got.cell[b, v, s].item() == position // 2
    want = np.zeros((2, 9, 5))
    for b, v, s in np.ndindex(2, 3, 9):
        x = got.position[b, v, s, 0].item()
        for channel in range(5):
            want[b, s, channel] += np.interp(x, np.arange(11), table[:, channel]) / 3
    np.testing.assert_allclose(got.encoding, want, rtol=1e-12, atol=1e-12)


def test_images_independently() -> None:
    kwargs = Sample("", images()).to(torch.float64).kwargs
    got = ops.virtual_project(**kwargs)
    centers, table = kwargs["centers"], kwargs["table"]
    want = torch.zeros(2, 9, 4, dtype=torch.float64)
    for b in range(2):
        cloud = centers[b] - (centers[b].amax(0) + centers[b].amin(0)) / 2
        radius = cloud.norm(dim=1).max()
        for v, rotation in enumerate(kwargs["views"]):
            seen = cloud @ rotation
            depth = seen[:, 2] + 2**0.5 * radius
            x, y = seen[:, 0] / depth, seen[:, 1] / depth
            assert max(x.abs().max(), y.abs().max()) <= 1, "the whole cloud is in view"
            torch.testing.assert_close(got.position[b, v, :, 0], (x + 1) * 3, rtol=0, atol=1e-12)
            torch.testing.assert_close(got.position[b, v, :, 1], (y + 1) * 2, rtol=0, atol=1e-12)
            column, row = (got.position[b, v] / 1.5).floor().long().unbind(-1)
            assert torch.equal(got.cell[b, v], row * 5 + column)
            where = torch.stack([x, y], -1)[None, None]
            seen_table = F.grid_sample(table.permute(2, 0, 1)[None], where, align_corners=True)
            want[b] += seen_table[0, :, 0].T / 6
    torch.testing.assert_close(got.encoding, want, rtol=1e-9, atol=1e-9)


def test_official_lines_independently() -> None:
    kwargs = Sample("", lines() | {"wrap": True}).to(torch.float64).kwargs
    got = ops.virtual_project(**kwargs)
    assert got.position.amin() > 0
    ends = (got.position[..., 0] - 10.5).abs().sort(-1).values[..., :2]
    torch.testing.assert_close(ends, torch.zeros_like(ends), msg="both ends of a cloud meet at L - 1/2")
    coordinate = got.position[..., 0] * 10 / (got.position.max() - got.position.min())
    want = torch.zeros_like(got.encoding)
    for index in np.ndindex(*coordinate.shape):
        x = coordinate[index].item()
        low, high = min(int(np.floor(x)), 10), min(int(np.ceil(x)), 10)
        value = (high - x) * kwargs["table"][low] + (x - low) * kwargs["table"][high]
        want[index[0], index[2]] += value / 3
    torch.testing.assert_close(got.encoding, want, rtol=1e-9, atol=1e-9)


def test_official_images_independently() -> None:
    size = (70, 90)
    kwargs = (
        Sample("", images() | {"wrap": True, "camera": 2.0, "size": size, "cell": 20})
        .to(torch.float64)
        .kwargs
    )
    got = ops.virtual_project(**kwargs)
    for v, rotation in enumerate(kwargs["views"]):
        seen = kwargs["centers"] @ rotation
        depth = seen[..., 2] + 2.0
        x = torch.remainder((seen[..., 0] / depth + 1) * 45 - 0.5, 90)
        y = torch.remainder((seen[..., 1] / depth * 70 / 90 + 1) * 35 - 0.5, 70)
        torch.testing.assert_close(got.position[:, v], torch.stack([x, y], -1), rtol=1e-6, atol=1e-6)
    where = torch.stack([2 * got.position[..., 0] / 89 - 1, 2 * got.position[..., 1] / 69 - 1], -1)
    table = kwargs["table"].permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    sampled = F.grid_sample(table, where, padding_mode="zeros", align_corners=True).mean(2)
    torch.testing.assert_close(got.encoding, sampled.transpose(1, 2), rtol=1e-9, atol=1e-9)
    scrambled = ops.virtual_project(**kwargs, scramble=True).encoding
    torch.testing.assert_close(scrambled, sampled.reshape(2, 9, 4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [lines, images])
def test_invariants(make: Any) -> None:
    kwargs = make(s=32)
    centers = (kwargs["centers"] * 1024).round() / 1024
    want = ops.virtual_project(**kwargs | {"centers": centers})
    order = torch.randperm(32)
    got = ops.virtual_project(**kwargs | {"centers": centers[:, order]})
    assert torch.equal(got.position, want.position[:, :, order])
    torch.testing.assert_close(got.encoding, want.encoding[:, order])
    got = ops.virtual_project(**kwargs | {"centers": centers[:1]})
    torch.testing.assert_close(got.encoding, want.encoding[:1])
    for change in (centers + 3, centers * 4):
        got = ops.virtual_project(**kwargs | {"centers": change})
        torch.testing.assert_close(got.position, want.position, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lines, images])
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-6, 1e9, 1e18])
def test_any_scale_is_finite_and_in_range(make: Any, scale: float) -> None:
    kwargs = make()
    kwargs["centers"] *= scale
    flat = kwargs["centers"].clone()
    flat[..., 1] = 0
    thin = kwargs["centers"] * torch.tensor([1.0, 0.0, 0.0])
    for centers in (kwargs["centers"], flat, thin):
        out = ops.virtual_project(**kwargs | {"centers": centers})
        assert all(x.isfinite().all() for x in out)
        assert out.cell.min() >= 0
        assert out.cell.max() < np.prod(cell_grid(kwargs["table"].shape[:-1], kwargs["cell"]))


def test_flat_along_a_line_is_its_middle() -> None:
    kwargs = lines() | {"views": torch.eye(3)}
    kwargs["centers"][..., 2] = 0.1 + 1e-8 * torch.rand(9)
    assert torch.equal(ops.virtual_project(**kwargs).position[:, 2], torch.full((2, 9, 1), 5.0))


def test_gradient_in_centers() -> None:
    for make in (lines, images):
        kwargs = Sample("", make(batch=1, s=4)).to(torch.float64).kwargs
        centers = kwargs.pop("centers").requires_grad_()
        assert torch.autograd.gradcheck(
            lambda c, kwargs=kwargs: ops.virtual_project(c, **kwargs)[::2], (centers,)
        )


def test_nan_does_not_crash() -> None:
    for make in (lines, images):
        kwargs = make()
        kwargs["centers"][0, 0, 0] = float("nan")
        out = ops.virtual_project(**kwargs)
        assert out.encoding[1].isfinite().all()
