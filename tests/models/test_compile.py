"""torch.compile without breaks: evaluation, a training step, a batch of any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import FAMILIES, close, clouds, make, tiny
from torch import Tensor

from any2point import Any2Point

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(model: Any2Point, *sizes: int) -> Iterator[tuple[Tensor, ...]]:
    for batch in sizes:
        count = model.config.num_points
        arguments: tuple[Tensor, ...] = (clouds(batch)[:, :count].contiguous(),)
        if model.config.input_features:
            arguments += (torch.rand(batch, count, model.config.input_features),)
            arguments += (torch.tensor([24, 11, 22, 23, 20][:batch]),)
        for tensor in arguments:
            torch._dynamo.mark_dynamic(tensor, 0)
        yield arguments


def compare(model: Any2Point, other: Any2Point, backend: str) -> None:
    """Logits in evaluation; logits, gradients and statistics of training steps; for batches of any size."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(other, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for arguments in batches(model, 2, 5):
            close(compiled(*arguments), model(*arguments))
    torch._dynamo.reset()
    model.train()
    other.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for arguments in batches(model, 4, 5):
            results = []
            for network in (model, compiled):
                model.zero_grad()
                other.zero_grad()
                logits = network(*arguments)
                torch.nn.functional.cross_entropy(logits, torch.arange(len(logits))).backward()
                results.append(logits)
                trained = model if network is model else other
                results += [p.grad for p in trained.trainable_parameters()]
            half = len(results) // 2
            for got, want in zip(results[half:], results[:half]):
                torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    for (name, got), (_, want) in zip(other.named_buffers(), model.named_buffers()):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "features and lengths": {"input_features": 2, "tokenizer": "pointnet"},
    "other options": {"ensemble": "max", "insertion": "attention_output", "positions": "learned"},
    "full": {"tuning": "full", "position_adds": "both", "pooling": "max+mean"},
    "checkpointing": {"checkpointing": True},
}
QUIET = {"dropout": 0.0, "adapter_dropout": 0.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_in_one_graph(family: str) -> None:
    torch._dynamo.reset()
    model = make(family)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(clouds()), model(clouds()))


@pytest.mark.parametrize(
    "name", ["default", *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS if n != "default")]
)
def test_compiles_with_any_batch(name: str) -> None:
    family = "dinov2" if name in ("default", "full") else "clip-text"
    compare(*(tiny(family, **QUIET, **VARIANTS[name]) for _ in range(2)), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiles_with_inductor() -> None:
    compare(*(tiny("clip-text", **QUIET) for _ in range(2)), backend="inductor")


def test_encode_compiles_with_attention() -> None:
    torch._dynamo.reset()
    model = tiny("dinov2")
    encode: Any = torch.compile(model.encode, fullgraph=True, backend="eager")
    with torch.no_grad():
        got, want = encode(clouds(), attention=True), model.encode(clouds(), attention=True)
    for a, b in zip(got, want):
        close(a, b)
