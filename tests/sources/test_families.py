"""The table of families as a whole: every row makes a model that learns and can be saved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from any2point import Any2Point, Any2PointConfig
from any2point.sources import FAMILIES, Source

pytest.importorskip("safetensors.torch")
SMALL: dict[str, Any] = {"num_points": 48, "num_tokens": 8, "neighbors": 6, "views": 2, "num_classes": 3}


def tiny(family: str) -> Source:
    positions = {1: (9,), 2: (3, 4)}[len(FAMILIES[family].positions)]
    return Source.random(family, width=32, depth=2, heads=4, positions=positions)


def clouds() -> Tensor:
    return torch.randn(3, 48, 3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_makes_a_model(tmp_path: Path, family: str) -> None:
    source = tiny(family)
    model = Any2Point(Any2PointConfig(**SMALL), source)
    points = clouds()
    logits = model.train()(points)
    assert logits.shape == (3, 3)
    F.cross_entropy(logits, torch.arange(3)).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and grad.isfinite().all() for grad in trained.values())
    assert sum(bool(grad.abs().sum() > 0) for grad in trained.values()) > len(trained) / 2
    frozen = [p for name, p in model.named_parameters() if name.startswith("encoder.source.")]
    assert frozen
    assert not any(p.requires_grad for p in frozen)

    want = model.eval()(points)
    assert want.isfinite().all()
    for folder, included in (("alone", False), ("whole", True)):
        model.save_pretrained(tmp_path / folder, include_source=included)
        loaded = Any2Point.from_pretrained(tmp_path / folder)
        assert torch.equal(loaded(points), want)
        assert loaded.source_info.describe() == source.describe()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_row_describes_its_sources(family: str) -> None:
    entry = FAMILIES[family]
    source = tiny(family)
    assert entry.name == source.name == family
    assert entry.modality == source.modality
    assert entry.layout == source.layout
    assert entry.position_kind == source.position_kind
    assert entry.has_cls == source.has_cls == (source.cls_position is not None)
    assert entry.registers == (0 if source.registers is None else len(source.registers))
    assert entry.title
    assert entry.checkpoint
    assert (entry.position_kind == "learned") == (entry.table is None)
    assert "stand" in entry.title or entry.position_kind != "stand-in"
    assert entry.width % 64 == 0


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("clip-text", (77,)),
        ("bert", (512,)),
        ("whisper", (1500,)),
        ("ssast", (512,)),  # frames: a sequence in a family of grids
        ("vit", (14, 14)),
        ("dinov2", (16, 16)),
        ("dinov2", (37, 37)),
        ("imagebind", (12, 19)),
        ("ssast", (8, 64)),
        ("ast", (12, 101)),
        ("vit", (3, 50)),
    ],
)
def test_resolution_of_the_projection_follows_the_table(family: str, positions: tuple[int, ...]) -> None:
    columns = positions if len(positions) == len(FAMILIES[family].positions) else (1, *positions)
    source = Source.random(family, width=32, depth=1, heads=4, positions=columns)
    source = dataclasses.replace(source, position_table=source.position_table.view(*positions, 32))
    model = Any2Point(Any2PointConfig(**SMALL), source).eval()
    assert model.config.position_size == positions
    points = clouds()
    logits = model(points)
    assert logits.isfinite().all()
    other = dataclasses.replace(source, position_table=source.position_table.flip(0))
    model.projection.table.copy_(Any2Point(Any2PointConfig(**SMALL), other).projection.table)
    assert not torch.equal(model(points), logits)


def test_keys_and_values_that_imagebind_adds_are_used_unless_official() -> None:
    source = tiny("imagebind")

    def make(**options: Any) -> Any2Point:
        torch.manual_seed(0)
        return Any2Point(Any2PointConfig(**(SMALL | {"views": 6} | options)), source).eval()

    assert make().encoder.source.blocks[0].attn.bias_k is not None
    assert make(parity="official").encoder.source.blocks[0].attn.bias_k is None
    points = clouds()
    assert (make(bias_kv=False)(points) - make()(points)).abs().max() > 1e-6


@pytest.mark.parametrize("bias_kv", [True, False])
def test_a_fully_tuned_imagebind_comes_back(tmp_path: Path, bias_kv: bool) -> None:
    config = Any2PointConfig(**SMALL, tuning="full", bias_kv=bias_kv)
    model = Any2Point(config, tiny("imagebind")).eval()
    model.save_pretrained(tmp_path)
    points = clouds()
    assert torch.equal(Any2Point.from_pretrained(tmp_path)(points), model(points))
