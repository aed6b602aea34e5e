"""guided_aggregate: the battery, an independent computation cell by cell, statistics, quirks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from op_contract import OpContract, Sample
from torch import Tensor

from any2point import ops, reference
from any2point.ops import BatchNorm, CellAttention
from any2point.reference.guided_aggregate import _drop_path


def make(
    batch: int = 2, s: int = 9, width: int = 8, views: int = 2, cells: int = 5, hidden: int = 4
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch * s)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def make_norm(*shape: int) -> BatchNorm:
        return BatchNorm(1 + 0.3 * normal(*shape), normal(*shape), normal(*shape), 1 + normal(*shape).abs())

    cluster = torch.stack([torch.randint(4, (s,), generator=generator) + 4 * b for b in range(batch)])
    return {
        "features": normal(batch, s, width),
        "cell": torch.randint(cells, (batch, views, s), generator=generator),
        "cluster": cluster.unique(return_inverse=True)[1],
        "attention": CellAttention(
            1 + 0.3 * normal(views, width),
            normal(views, width),
            normal(views, 3 * hidden, width),
            normal(views, 3 * hidden),
            normal(views, width, hidden),
            normal(views, width),
        ),
        "view_norm": make_norm(views, width),
        "space_norm": make_norm(width),
        "num_cells": cells,
        "num_heads": 2,
        "coefficient": 0.7,
    }


pytestmark = pytest.mark.usefixtures("one_thread")


class TestGuidedAggregate(OpContract):
    op = staticmethod(ops.guided_aggregate)
    reference = staticmethod(lambda **kwargs: reference.guided_aggregate(**({"scale": 0.5} | kwargs)))
    differentiable = ("features",)
    registered = False

    def samples(self, device: str) -> Iterator[Sample]:
        yield Sample("mean", Sample("", make()).to(device).kwargs)
        yield Sample(
            "maximum and mean", Sample("", make(batch=1, views=1) | {"pooling": "max+mean"}).to(device).kwargs
        )
        plain = {"cluster": None, "space_norm": None}
        yield Sample("maximum of views", Sample("", make() | plain | {"ensemble": "max"}).to(device).kwargs)
        yield Sample("cells of one token", Sample("", make(s=3, cells=40)).to(device).kwargs)
        one = make(s=4)
        one["cell"][:], one["cluster"][:] = 0, 0
        yield Sample("one cell", Sample("", one).to(device).kwargs)

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        small = make(s=4, width=3, views=2)
        for pooling in ("mean", "max+mean"):
            for ensemble in ("adaptive", "mean", "max"):
                options = {"pooling": pooling, "ensemble": ensemble}
                yield Sample(f"{pooling}, {ensemble}", small | options).to(device).to(torch.float64)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield {"features": torch.rand(2, 9)}, ValueError, r"features: expected shape \[B, S, C\]"
        yield (
            {"cell": torch.zeros(2, 2, 8, dtype=torch.int64)},
            ValueError,
            r"cell: expected shape \[2, V, 9\]",
        )
        yield {"cell": torch.zeros(2, 2, 9)}, TypeError, "cell: expected int64"
        yield {"cluster": torch.zeros(9, dtype=torch.int64)}, ValueError, r"cluster: expected shape \[2, 9\]"
        yield {"cluster": torch.full((2, 9), 18)}, ValueError, r"cluster: expected values in -1\.\.17"
        yield (
            {"attention": make(views=3)["attention"]},
            ValueError,
            r"attention: expected proj_weight \[2, 8, M\]",
        )
        yield {"num_heads": 3}, ValueError, "num_heads: expected a divisor of the inner width 4"
        yield {"view_norm": make(views=3)["view_norm"]}, ValueError, r"view_norm: expected tensors \[2, 8\]"
        yield {"space_norm": make(width=6)["space_norm"]}, ValueError, r"space_norm: expected tensors \[8\]"
        yield {"pooling": "max"}, ValueError, "pooling: expected 'mean' or 'max\\+mean'"
        yield {"ensemble": "vote"}, ValueError, "ensemble: expected 'adaptive', 'mean' or 'max', got 'vote'"
        yield {"cluster": None}, TypeError, "cluster: expected an int64 tensor, got NoneType"
        yield (
            {"space_norm": None},
            ValueError,
            "space_norm: expected tensors for ensemble 'adaptive', got None",
        )
        yield {"drop_path": 1.0}, ValueError, "drop_path: expected a probability below 1"


def independent(kwargs: dict[str, Any], *, training: bool = False, empty: bool = False) -> Tensor:
    """One cell at a time, in float64, with torch's own layers."""
    kwargs = Sample("", kwargs).to(torch.float64).kwargs
    x, cell, cluster, weights = (kwargs[k] for k in ("features", "cell", "cluster", "attention"))
    batch, count, width = x.shape
    pooling = kwargs.get("pooling", "mean")

    def normalize(rows: Tensor, norm: tuple[Tensor, ...]) -> Tensor:
        weight, bias, mean, var = norm
        return F.gelu(F.batch_norm(rows, mean.clone(), var.clone(), weight, bias, training))

    def spread(groups: list[tuple[Any, Tensor]], rows: Tensor) -> Tensor:
        out = torch.zeros(batch, count, width, dtype=x.dtype)
        for (where, _), row in zip(groups, rows):
            out[where] = row
        return out

    groups = []
    for number in cluster.unique():
        where = cluster == number
        groups.append((where, x[where].amax(0) + x[where].mean(0)))
    space = spread(groups, normalize(torch.stack([row for _, row in groups]), kwargs["space_norm"]))

    guided, agreement = [], []
    for view in range(cell.shape[1]):
        groups = []
        for b in range(batch):
            for number in cell[b, view].unique():
                inside = cell[b, view] == number
                tokens = x[b, inside]
                qkv = F.layer_norm(tokens, (width,), weights.norm_weight[view], weights.norm_bias[view])
                qkv = F.linear(qkv, weights.qkv_weight[view], weights.qkv_bias[view])
                query, key, value = qkv.view(len(tokens), 3, kwargs["num_heads"], -1).permute(1, 2, 0, 3)
                score = (query @ key.transpose(1, 2)) * weights.proj_weight.shape[-1] ** -0.5
                heads = (score.softmax(-1) @ value).transpose(0, 1).flatten(1)
                tokens = tokens + F.linear(heads, weights.proj_weight[view], weights.proj_bias[view])
                pooled = tokens.mean(0) + (tokens.amax(0) if pooling == "max+mean" else 0)
                where = torch.zeros(batch, count, dtype=torch.bool)
                where[b] = inside
                groups.append((where, pooled))
        rows = torch.stack([row for _, row in groups])
        if empty:
            zeros = torch.zeros(batch * kwargs["num_cells"] - len(rows), width, dtype=x.dtype)
            rows = torch.cat([rows, zeros])
        rows = normalize(rows, [tensor[view] for tensor in kwargs["view_norm"]])
        guided.append(spread(groups, rows))
        agreement.append((F.cosine_similarity(guided[-1], space, dim=-1) + 1) / 2)
    if kwargs.get("ensemble", "adaptive") != "adaptive":
        views = torch.stack(guided)
        return x + kwargs["coefficient"] * (views.mean(0) if kwargs["ensemble"] == "mean" else views.amax(0))
    weight = torch.stack(agreement)[..., None]
    blend = (weight * torch.stack(guided)).sum(0) / weight.sum(0)
    return x + kwargs["coefficient"] * blend


@pytest.mark.parametrize("ensemble", ["adaptive", "mean", "max"])
@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("empty", [False, True])
def test_independent_computation(pooling: str, training: bool, empty: bool, ensemble: str) -> None:
    kwargs = make() | {"pooling": pooling, "ensemble": ensemble}
    want = independent(kwargs, training=training, empty=empty)
    double = Sample("", kwargs).to(torch.float64).kwargs
    got = ops.guided_aggregate(**double, training=training, count_empty=empty)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    got = ops.guided_aggregate(**kwargs, training=training, count_empty=empty)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("empty", [False, True])
def test_running_statistics(empty: bool) -> None:
    """They move like those of torch's batch normalisation over the rows that count."""
    kwargs = Sample("", make(views=1)).to(torch.float64).kwargs
    kwargs["attention"].proj_weight.zero_()
    kwargs["attention"].proj_bias.zero_()
    x, cell = kwargs["features"], kwargs["cell"][:, 0]
    rows = [x[b, cell[b] == c].mean(0) for b in range(2) for c in range(5) if (cell[b] == c).any()]
    if empty:
        rows += [torch.zeros_like(rows[0])] * (10 - len(rows))
    mean, var = (tensor[0].clone() for tensor in kwargs["view_norm"][2:])
    F.batch_norm(torch.stack(rows), mean, var, training=True)
    ops.guided_aggregate(**kwargs, training=True, count_empty=empty)
    torch.testing.assert_close(kwargs["view_norm"].running_mean[0], mean)
    torch.testing.assert_close(kwargs["view_norm"].running_var[0], var)


@pytest.mark.parametrize("training", [False, True])
def test_gradient_in_weights(training: bool) -> None:
    kwargs = Sample("", make(s=4, width=3, views=2, hidden=2)).to(torch.float64).kwargs
    attention, view_norm, space_norm = (kwargs.pop(k) for k in ("attention", "view_norm", "space_norm"))
    leaves = [*attention, *view_norm[:2], *space_norm[:2]]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def function(*values: Tensor) -> Tensor:
        statistics = [tensor.clone() for tensor in (*view_norm[2:], *space_norm[2:])]
        return ops.guided_aggregate(
            **kwargs,
            attention=CellAttention(*values[:6]),
            view_norm=BatchNorm(*values[6:8], *statistics[:2]),
            space_norm=BatchNorm(*values[8:10], *statistics[2:]),
            training=training,
        )

    assert torch.autograd.gradcheck(function, leaves)


def test_clouds_and_numbering_do_not_mix() -> None:
    kwargs = make()
    both = ops.guided_aggregate(**kwargs)
    first = {k: v[:1] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    torch.testing.assert_close(ops.guided_aggregate(**first), both[:1])
    renamed = kwargs | {"cell": 4 - kwargs["cell"]}
    torch.testing.assert_close(ops.guided_aggregate(**renamed), both)


def test_one_cloud_of_one_cell_trains() -> None:
    """Statistics over a single row have no variance; the result is finite all the same."""
    kwargs = make(batch=1, s=4)
    kwargs["cell"][:], kwargs["cluster"][:] = 0, 0
    kwargs["features"] = kwargs["features"][:, :1].repeat(1, 4, 1)
    assert ops.guided_aggregate(**kwargs, training=True).isfinite().all()
    assert kwargs["view_norm"].running_var.isfinite().all()


@pytest.mark.parametrize("rows", [False, True])
def test_drop_path(rows: bool) -> None:
    """Dropped per cloud (or per token, officially), and rescaled; nothing is dropped in evaluation."""
    kwargs = make(batch=64, s=3, views=1)
    assert torch.equal(ops.guided_aggregate(**kwargs, drop_path=0.5), ops.guided_aggregate(**kwargs))
    dropped = _drop_path(torch.ones(64, 3, 8), 0.25, rows=rows)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    same = (dropped == dropped[:, :1]).all()
    assert same != rows
    assert ops.guided_aggregate(**kwargs, drop_path=0.5, drop_path_rows=rows, training=True).isfinite().all()
