"""Hooks on a model's parts are called on a GPU as on a CPU, where kernels would pass the parts by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import clouds, make

from any2point import Any2Point
from any2point.sources.glue import is_hooked

REGISTER = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")
PARTS = (
    "norm",
    "encoder",
    "encoder.adapters.1.adapter",
    "encoder.adapters.1.adapter.up",
    "encoder.source.blocks.0.norm1",
    "encoder.source.blocks.0.norm2",
    "encoder.source.blocks.0.attn",
    "encoder.source.blocks.0.mlp.fc1",
    "tokenizer.embed",
    "tokenizer.embed_norm",
)


def calls(model: Any2Point, register: Callable[[Any], Any]) -> list[str]:
    """The kinds of modules whose hook was called in a training step, in order."""
    called: list[str] = []

    def hook(module: torch.nn.Module, *_: Any) -> None:
        called.append(type(module).__name__)

    handle = register(hook)
    points = clouds().to(next(model.parameters()).device)
    model.train()(points).sum().backward()
    handle.remove()
    return called


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_seen(kind: str) -> None:
    plain, hooked = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert not is_hooked(plain, hooked)
    handle = getattr(hooked, kind)(lambda *_: None)
    assert is_hooked(plain, hooked)
    handle.remove()
    assert not is_hooked(plain, hooked)
    register = getattr(torch.nn.modules.module, kind.replace("register_", "register_module_"))
    handle = register(lambda *_: None)
    assert is_hooked(plain)
    handle.remove()


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_are_called(part: str, kind: str) -> None:
    model = make("dinov2")
    want = calls(model, getattr(model.get_submodule(part), kind))
    model.cuda()
    assert calls(model, getattr(model.get_submodule(part), kind)) == want
    assert want


@pytest.mark.gpu
def test_global_hooks_are_called() -> None:
    model, register = make("dinov2"), torch.nn.modules.module.register_module_forward_hook
    want = calls(model, register)
    assert "LayerNorm" in want
    assert calls(model.cuda(), register) == want
