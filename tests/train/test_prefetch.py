"""Batches made ahead: the same ones, and the same steps from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from test_engine import run, weights
from torch import Tensor

from any2point.data import prefetch
from any2point.nn import Neighborhoods


def test_on_a_cpu_items_are_made_when_asked_for() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    for number in prefetch(items(), "cpu"):
        assert made[-1] == number
    assert made == [0, 1, 2]


@pytest.mark.parametrize(
    "options", [{}, {"input_features": 2}, {"tokenizer": "pointnet"}, {"fps_tie": "pointnet2"}]
)
def test_neighborhoods_can_come_from_before(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(**options).eval()
    points = tiny.dataset(3).points
    features = torch.randn(3, 96, 2) if options.get("input_features") else None
    lengths = torch.tensor([96, 60, 5])
    expected = model(points, features, lengths)
    known = model.neighborhoods(points, features, lengths)
    again = Neighborhoods.of(known.flat())
    assert all(torch.equal(a, b) for a, b in zip(again.flat(), known.flat()))
    assert len(known.center) == len(known.neighbor) == len(model.config.sizes)

    def refuse(points: Tensor) -> Neighborhoods:
        raise AssertionError("computed again")

    monkeypatch.setattr(model.tokenizer, "neighborhoods", refuse)
    assert torch.equal(model(points, features, lengths, neighborhoods=again), expected)


def test_a_run_given_neighborhoods_equals_one_that_computes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    _, expected = run(epochs=2)
    monkeypatch.setattr("any2point.train.engine._ahead", lambda model, device, config: True)
    _, result = run(epochs=2)
    assert [e["loss"] for e in result.history] == [e["loss"] for e in expected.history]


@pytest.mark.gpu
def test_items_are_complete_and_stay() -> None:
    """Many batches in flight, each long in the making: none is read too early, none is overwritten."""

    device = "cuda"

    def items() -> Iterator[list[Tensor]]:
        for number in range(40):
            value = torch.randn(1000, 1000, device=device)
            for _ in range(20):
                value = (value @ value).clamp(-1, 1)
            yield [value.mul_(0).add_(number), torch.full((1 << 20,), number, device=device)]

    for number, (first, second) in enumerate(prefetch(items(), device)):
        busy = torch.randn(1000, 1000, device=device)
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        assert torch.equal(first, torch.full_like(first, number))
        assert torch.equal(second, torch.full_like(second, number))


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
def test_prefetching_changes_no_bit(captured: bool) -> None:
    options = {"device": "cuda", "precision": "fp32", "epochs": 3, "cuda_graph": captured}
    (model, result), (plain, expected) = run(**options), run(**options, prefetch=False)
    assert [e["loss"] for e in result.history] == [e["loss"] for e in expected.history]
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(model).items())
