"""All six official variants at a small size: every name finds its place, and the model can be saved."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import golden
import pytest
import torch
from torch import Tensor

from any2point import Any2Point
from any2point.models.official import VARIANTS
from any2point.nn import Tokenizer
from any2point.ops import farthest_point_sample, group

# 768 channels become 48, with everything that depends on them; two blocks are left.
SHRINK = {3072: 192, 2304: 144, 1536: 96, 768: 48, 384: 24, 192: 12, 96: 6}
ROWS = {"clip-text": 77, "dinov2": 1370, "imagebind": 229}


def small_state(variant: str) -> dict[str, Tensor]:
    state = {}
    for parameter in golden.parameters(variant):
        parts = parameter.name.split(".")
        block = next((int(b) for a, b in pairwise(parts) if a in ("blocks", "resblocks")), 0)
        if block < 2:
            shape = tuple(SHRINK.get(n, n) for n in parameter.shape)
            state[parameter.name] = golden.fill(parameter.name, shape, parameter.rule, hot=True)
    return state


def table(variant: str) -> Tensor:
    return torch.randn(1, ROWS[variant.split("/")[0]], 48).squeeze(0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_official(variant: str, tmp_path: Path) -> None:
    state, positions = small_state(variant), table(variant)
    model = Any2Point.from_official(state, variant, position_table=positions)
    points = golden.points(variant)[:2]
    want = model(points)
    assert want.isfinite().all()
    assert want.shape == (2, VARIANTS[variant]["num_classes"])
    for container in ("model", "base_model"):
        wrapped = {container: {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
        again = Any2Point.from_official(wrapped, variant, position_table=positions.numpy())
        assert torch.equal(again(points), want)

    pytest.importorskip("safetensors")
    model.save_pretrained(tmp_path, include_source=True)
    loaded = Any2Point.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded(points), want)


def test_refused() -> None:
    variant = "dinov2/scanobjectnn"
    state, positions = small_state(variant), table(variant)
    for name in ("encoder.norm3.2.weight", "prediction.head.4.0.bias", "encoder.blocks.1.attn.proj.bias"):
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=r"`state_dict`: nothing in it for|expected a tensor"):
            Any2Point.from_official(rest, variant, position_table=positions)
    with pytest.raises(ValueError, match="`state_dict`: expected 256 values"):
        Any2Point.from_official(
            state | {"prediction.head.0.1.bias": torch.zeros(9)}, variant, position_table=positions
        )
    with pytest.raises(ValueError, match="`position_table`: expected"):
        Any2Point.from_official(state, variant, position_table=torch.zeros(1, 1370, 47))
    with pytest.raises(ValueError, match="`variant`: expected one of clip-text/scanobjectnn"):
        Any2Point.from_official(state, "clip", position_table=positions)
    with pytest.raises(ValueError, match="`state_dict`: expected the blocks of a transformer"):
        Any2Point.from_official({}, variant, position_table=positions)


def test_tokens_among_ties() -> None:
    """On a grid the official order of ties differs from level to level; tokens must follow it."""
    axis = torch.arange(10.0) + 1
    points = torch.cartesian_prod(axis, axis, axis)[None]
    tokenizer = Tokenizer(6, (512, 256, 128), (8, 8, 8), start="first", tie="pointnet2")
    tokens = tokenizer(points)
    picked = points
    for size in (512, 256, 128):
        picked = group(picked, farthest_point_sample(picked, size, tie="pointnet2"))
    assert torch.equal(tokens.centers, picked)
    assert torch.equal(group(points, tokens.index), picked)
