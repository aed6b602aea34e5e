"""Logits and gradients are hardly farther from exact ones than those of the model composed of plain PyTorch.

bf16: at most twice as far from float32; TF32: at most one and a half times as far from float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import golden
import pytest
import torch
from op_contract import assert_within_twice
from tf32_errors import OURS, TORCH, Model, Table, batch_of, measure
from torch import Tensor

import any2point.models.any2point
import any2point.nn.adapter
import any2point.nn.projection
import any2point.nn.tokenizer
from any2point import Any2Point, Any2PointConfig, ops, reference
from any2point.bench.peers import torch_segment_pool
from any2point.bench.timing import products
from any2point.sources import Source
from any2point.train.runtime import autocast

PLACES = (
    any2point.nn.tokenizer,
    any2point.nn.projection,
    any2point.nn.adapter,
    any2point.models.any2point,
)
# The ops whose results are rounded; the others give indices, the same in every implementation.
ROUNDED = ("group", "guided_aggregate", "local_aggregate", "virtual_project")
QUIET = {"attention_dropout": 0.0, "drop_path": 0.0, "adapter_dropout": 0.0, "dropout": 0.0}


def reference_of(name: str) -> Callable[..., Any]:
    """The reference, with the arguments of the public function."""
    plain = getattr(reference, name)
    if name == "local_aggregate":  # the type of operands and what is kept are for kernels
        return lambda *args, operand_dtype=None, recompute=False, **options: plain(*args, **options)
    if name != "guided_aggregate":
        return plain

    def guided(
        x: Tensor,
        cell: Tensor,
        cluster: Tensor | None,
        attention: Any,
        *rest: Any,
        plan: Any = None,
        **options: Any,
    ) -> Tensor:
        options |= {"scale": attention.proj_weight.shape[-1] ** -0.5, "segment_pool": torch_segment_pool}
        return plain(x, cell, cluster, attention, *rest, **options)

    return guided


@contextmanager
def plain_pytorch() -> Iterator[set[str]]:
    """The model's ops replaced by their references; gives the names of those that were."""
    replaced = set()
    with pytest.MonkeyPatch.context() as patch:
        for place in PLACES:
            for name in set(ROUNDED) & set(vars(place)):
                assert getattr(place, name) is getattr(ops, name)
                patch.setattr(place, name, reference_of(name))
                replaced.add(name)
        yield replaced


def results(model: Any2Point, points: Tensor, precision: str) -> dict[str, Tensor]:
    """Logits in evaluation, and logits and gradients of one training step from the same state."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    labels = torch.arange(len(points), device=points.device) * 3 + 2
    with autocast(precision, points.device):
        with torch.no_grad():
            found = {"logits": model.eval()(points).double()}
        logits = model.train()(points).double()
    model.zero_grad()
    with products(precision):
        torch.nn.functional.cross_entropy(logits, labels).backward()
    found["training logits"] = logits.detach()
    # One vector for all trained tensors: those whose gradient is rounding alone then weigh what they should.
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    found["gradient"] = torch.cat(gradients)
    model.load_state_dict(state)
    return found


def check(model: Any2Point, *batches: Tensor) -> None:
    """Errors over all batches: a maximum or a ReLU that goes the other way in one of them weighs a lot."""
    exact, got, plain = [], [], []
    for points in batches:
        exact.append(results(model, points, "fp32"))
        got.append(results(model, points, "bf16"))
        with plain_pytorch() as replaced:
            assert replaced == set(ROUNDED)
            plain.append(results(model, points, "bf16"))
    for name in exact[0]:
        mine, other, want = (torch.stack([run[name] for run in runs]) for runs in (got, plain, exact))
        assert_within_twice(mine, other, want, name)
        assert not torch.equal(mine, want), f"{name}: nothing was computed in bf16"


@pytest.mark.parametrize("family", ["clip-text", "dinov2", "bert"])
def test_small_models(family: str, device: str) -> None:
    config = Any2PointConfig(
        num_classes=15, num_points=256, num_tokens=32, neighbors=16, tokenizer_hidden=16, **QUIET
    )
    model = Any2Point(config, Source.random(family, width=192, depth=3)).to(device)
    points = torch.randn(4, 4, 256, 3, generator=torch.Generator().manual_seed(1)).to(device)
    check(model, *points)


OFFICIAL = ("clip-text/scanobjectnn", "dinov2/scanobjectnn", "imagebind/modelnet40")


def official(variant: str) -> Any2Point:
    state, table = golden.state_dict(variant, hot=True), golden.position_table(variant, hot=True)
    return Any2Point.from_official(state, variant, position_table=table, **QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OFFICIAL)
def test_official_models(variant: str, device: str) -> None:
    check(official(variant).to(device), golden.points(variant).to(device))


@pytest.mark.gpu
@pytest.mark.parametrize("variant", OFFICIAL)
def test_official_models_in_tf32(variant: str) -> None:
    model, table = Model(variant), Table()
    for seed in range(3):
        measure(model, *batch_of(seed, 16), table)
    print(*table.lines(), sep="\n")
    for name in ("evaluation logits", "training logits", "gradients"):
        assert 1e-5 < table.error(name, OURS) <= 1.5 * table.error(name, TORCH), table.line(name, OURS)
