"""A source against its family's own implementation: the same weights, the same input, every block."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.sources import Source


def save(folder: Path, state: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """A folder with a torch file and, if given, its config.json."""
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "weights.pth")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def perturb(model: nn.Module) -> nn.Module:
    """Random values for all that is trained, so that no zero and no one hides an error; evaluation mode."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:  # fixed position tables stay
                noise = torch.randn(value.shape, generator=generator)
                matrix = value.dim() in (2, 4)
                value.copy_(noise / math.sqrt(value[0].numel()) if matrix else value + 0.3 * noise)
    return model.eval()


@torch.no_grad()
def trace(run: Callable[[], object], blocks: Iterable[nn.Module], *others: nn.Module) -> list[Tensor]:
    """What enters the first block, what leaves every block, and what leaves the other modules."""
    entering: list[Tensor] = []
    leaving: dict[nn.Module, Tensor] = {}
    blocks = list(blocks)
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))]
    for module in (*blocks, *others):
        hooks.append(
            module.register_forward_hook(
                lambda module, _, output: leaving.update({module: output if _is(output) else output[0]})
            )
        )
    run()
    for hook in hooks:
        hook.remove()
    return [entering[0], *(leaving[module] for module in (*blocks, *others))]


def _is(output: object) -> bool:
    return isinstance(output, Tensor)


def sequence(source: Source, tokens: Tensor) -> Tensor:
    """Tokens `[B, T, C]` with their positions, after class token and registers."""
    x = tokens + source.position_table.flatten(0, -2)[: tokens.shape[1]]
    leading = []
    if source.cls_token is not None:
        leading.append(source.cls_token[None] + source.cls_position)
    if source.registers is not None:
        leading.append(source.registers)
    first = [part.expand(len(x), -1, -1) for part in leading]
    return torch.cat([*first, x], dim=1)


@torch.no_grad()
def assert_same(source: Source, x: Tensor, states: list[Tensor], final: Tensor | None = None) -> None:
    """Hidden states of every block from the same sequence, and the final norm, to 1e-5."""
    ours = source.encoder().hidden_states(x)
    assert len(ours) == len(states) == source.depth + 1
    for mine, theirs in zip(ours, states):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert ("norm.weight" in source.tensors) == (final is not None)
    if final is not None:
        weight, bias = source.tensors["norm.weight"], source.tensors["norm.bias"]
        normed = F.layer_norm(ours[-1], (source.width,), weight, bias, source.layout.eps)
        torch.testing.assert_close(normed, final, rtol=1e-5, atol=1e-5)


def assert_same_eps(source: Source, block: nn.Module) -> None:
    """Hidden states are too coarse for it."""
    norms = {layer.eps for layer in block.modules() if isinstance(layer, nn.LayerNorm)}
    assert norms == {source.layout.eps}


def assert_same_vit(
    source: Source,
    run: Callable[[], object],
    *,
    stem: nn.Module,
    blocks: Iterable[nn.Module],
    norm: nn.Module | None,
) -> None:
    """From the patches that `stem` makes on, a ViT and its source are the same."""
    blocks = list(blocks)
    assert_same_eps(source, blocks[0])
    others = (stem,) if norm is None else (stem, norm)
    states = trace(run, blocks, *others)
    final = None if norm is None else states.pop()
    patches = states.pop()
    assert_same(source, sequence(source, patches), states, final)


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors with parts of their names replaced, in the order given."""
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        result[key] = value.clone()
    return result


def fuse(state: Mapping[str, Tensor], parts: tuple[str, str, str], fused: str) -> dict[str, Tensor]:
    """Query, key and value, whose names end so, as one tensor of the name `fused`."""
    result: dict[str, Any] = {}
    for key, value in state.items():
        if key.endswith(parts):
            part = next(part for part in parts if key.endswith(part))
            result.setdefault(key.removesuffix(part) + fused, [None] * 3)[parts.index(part)] = value
        else:
            result[key] = value
    return {key: torch.cat(value) if isinstance(value, list) else value for key, value in result.items()}
