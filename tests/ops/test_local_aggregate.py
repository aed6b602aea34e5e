"""local_aggregate: the battery, an independent computation in NumPy, statistics, degenerate groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from op_contract import OpContract, Sample

from any2point import ops, reference
from any2point.ops import BatchNorm, ResidualUnit


def make_norm(width: int, generator: torch.Generator) -> BatchNorm:
    random = torch.rand(4, width, generator=generator)
    return BatchNorm(random[0] + 0.5, random[1] - 0.5, random[2] - 0.5, random[3] + 0.5)


def make_unit(width: int, hidden: int, generator: torch.Generator, *, bias: bool = True) -> ResidualUnit:
    return ResidualUnit(
        torch.randn(hidden, width, generator=generator) / width**0.5,
        torch.randn(hidden, generator=generator) if bias else None,
        make_norm(hidden, generator),
        torch.randn(width, hidden, generator=generator) / hidden**0.5,
        torch.randn(width, generator=generator) if bias else None,
        make_norm(width, generator),
    )


def make(
    batch: int = 2, n: int = 21, s: int = 7, k: int = 5, width: int = 6, units: int = 1
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    points = torch.rand(batch, n, 3, generator=generator)
    center = torch.stack([torch.randperm(n, generator=generator)[:s] for _ in range(batch)])
    centers = points.gather(1, center[..., None].expand(-1, -1, 3))
    return {
        "points": points,
        "features": torch.randn(batch, n, width, generator=generator),
        "center": center,
        "neighbor": ops.knn(centers, points, k).index,
        "units": [make_unit(2 * width, 4, generator, bias=i == 0) for i in range(units)],
    }


def on(device: str, kwargs: dict[str, Any]) -> Sample:
    return Sample("", kwargs).to(device)


pytestmark = pytest.mark.usefixtures("one_thread")


class TestLocalAggregate(OpContract):
    op = staticmethod(ops.local_aggregate)
    reference = staticmethod(reference.local_aggregate)
    differentiable = ("features",)
    registered = False

    def samples(self, device: str) -> Iterator[Sample]:
        odd = make()
        missing = make(n=13, width=5)
        missing["neighbor"][:, ::2, -2:] = -1
        yield Sample("odd sizes", on(device, odd).kwargs)
        yield Sample("missing neighbours, width not in sixes", on(device, missing).kwargs)
        yield Sample("standard deviation", on(device, make(batch=1) | {"normalize": "mn40"}).kwargs)
        yield Sample("one neighbour, no units", on(device, make(k=1) | {"units": []}).kwargs)

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        yield on(device, make(n=7, s=3, k=3, width=3)).to(torch.float64)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield {"points": torch.rand(2, 21, 2)}, ValueError, r"points: expected shape \[B, N, 3\], got"
        yield {"points": torch.zeros(2, 21, 3, dtype=torch.int64)}, TypeError, "points: expected float16"
        yield {"features": torch.rand(2, 20, 6)}, ValueError, r"features: expected shape \[2, 21, C\]"
        yield {"center": torch.zeros(2, 7)}, TypeError, "center: expected int64"
        yield {"neighbor": torch.zeros(2, 6, 5, dtype=torch.int64)}, ValueError, r"neighbor: .*\[2, 7, K\]"
        yield {"neighbor": torch.zeros(2, 7, 0, dtype=torch.int64)}, ValueError, "K > 0"
        yield {"neighbor": torch.full((2, 7, 5), 21)}, ValueError, "expected values in -1..20, got 21"
        yield {"normalize": "unit"}, ValueError, "normalize: expected 'scan' or 'mn40'"
        yield {"operand_dtype": torch.bfloat16}, ValueError, r"operand_dtype: expected None or torch\.float16"
        yield {"units": make(width=5)["units"]}, ValueError, r"units: expected weights \[H, 12\]"


def independent(kwargs: dict[str, Any], normalize: str = "scan") -> np.ndarray:
    """One group at a time, in float64 NumPy, in evaluation mode."""
    points, features = kwargs["points"].double().numpy(), kwargs["features"].double().numpy()
    out = []
    for b, s in np.ndindex(kwargs["center"].shape):
        near = kwargs["neighbor"][b, s].numpy()
        offset = points[b, near] - points[b, kwargs["center"][b, s]]
        if normalize == "scan":
            offset = offset / np.abs(offset).max(0)
        else:
            every = points[b][kwargs["neighbor"][b].numpy()] - points[b][kwargs["center"][b].numpy()][:, None]
            offset = offset / (every.std(ddof=1) + 1e-5)
        centre = features[b, kwargs["center"][b, s]]
        x = np.concatenate([features[b, near], np.broadcast_to(centre, features[b, near].shape)], 1)
        count = x.shape[1] // 6
        for axis in range(3):
            for i in range(count):
                angle = 100 * offset[:, axis] / 1000 ** (i / count)
                x[:, axis * 2 * count + i] += np.sin(angle)
                x[:, axis * 2 * count + count + i] += np.cos(angle)
        for unit in kwargs["units"]:
            h = np.maximum(norm(x @ array(unit.in_weight).T + array(unit.in_bias), unit.in_norm), 0)
            x = np.maximum(x + norm(h @ array(unit.out_weight).T + array(unit.out_bias), unit.out_norm), 0)
        out.append(x.max(0))
    return np.stack(out).reshape(*kwargs["center"].shape, -1)


def array(value: torch.Tensor | None) -> np.ndarray | float:
    return 0.0 if value is None else value.double().numpy()


def norm(x: np.ndarray, parameters: BatchNorm) -> np.ndarray:
    weight, bias, mean, var = map(array, parameters)
    return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize("normalize", ["scan", "mn40"])
def test_independent_computation(normalize: str) -> None:
    kwargs = make(units=2)
    if normalize == "scan":  # no offset may be zero along a whole axis
        assert kwargs["neighbor"].shape[-1] > 1
    want = independent(kwargs, normalize)
    double = Sample("", kwargs).to(torch.float64).kwargs
    got = ops.local_aggregate(**double, normalize=normalize)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-9, atol=1e-9)
    # float32 rounds arguments of up to 100 in the sinusoid
    np.testing.assert_allclose(ops.local_aggregate(**kwargs, normalize=normalize), want, rtol=1e-4, atol=1e-4)


def test_gradient_in_points_and_weights() -> None:
    kwargs = Sample("", make(batch=1, n=9, s=2, k=3, width=3)).to(torch.float64).kwargs
    unit = kwargs["units"][0]
    leaves = [kwargs["points"], unit.in_weight, unit.in_bias, unit.out_weight, unit.out_bias]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(points, in_weight, in_bias, out_weight, out_bias):  # type: ignore[no-untyped-def]
        changed = ResidualUnit(in_weight, in_bias, unit.in_norm, out_weight, out_bias, unit.out_norm)
        return ops.local_aggregate(**(kwargs | {"points": points, "units": [changed]}), beta=1.0)

    assert torch.autograd.gradcheck(function, leaves)


def test_training_statistics() -> None:
    kwargs = make()
    unit = kwargs["units"][0]
    before = [tensor.clone() for tensor in unit.out_norm]
    bare = ops.local_aggregate(**kwargs, training=True)
    assert bare.isfinite().all()
    assert not torch.equal(unit.out_norm.running_mean, before[2])
    # The rows of the last normalisation have mean 0 and variance 1, so its running ones moved towards theirs.
    again = ops.local_aggregate(**kwargs, training=True)
    torch.testing.assert_close(again, bare)


def test_flat_and_identical_groups() -> None:
    for normalize in ("scan", "mn40"):
        kwargs = make() | {"normalize": normalize}
        kwargs["points"][..., 2] = 0.25
        assert ops.local_aggregate(**kwargs).isfinite().all()
        kwargs["points"][:] = 1.5
        assert ops.local_aggregate(**kwargs).isfinite().all()


def test_official_normalisation() -> None:
    kwargs = make()
    kwargs["points"][0, :, 2] = 0.25
    out = ops.local_aggregate(**kwargs, guard=False)
    assert out[0].isnan().any()
    assert out[1].isfinite().all()

    kwargs = make() | {"normalize": "mn40"}
    first = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    together, alone = ops.local_aggregate(**kwargs), ops.local_aggregate(**first)
    torch.testing.assert_close(together[:1], alone)
    together, alone = (ops.local_aggregate(**x, guard=False) for x in (kwargs, first))
    assert (together[:1] - alone).abs().max() > 1e-3


def test_order_of_neighbours_does_not_matter() -> None:
    kwargs = make(k=8)
    shuffled = kwargs | {"neighbor": kwargs["neighbor"].flip(-1)}
    torch.testing.assert_close(ops.local_aggregate(**kwargs), ops.local_aggregate(**shuffled))
