"""All six official variants at a small size: every name finds its place, and the model can be saved."""

from __future__ import annotations

from pathlib import Path

import golden
import pytest
import torch

from any2point import Any2Point, Any2PointConfig, Source
from any2point.models.official import VARIANTS, differences, official_state, recognise
from any2point.models.official_names import Place, official_names
from any2point.models.official_variants import variant_options
from any2point.nn import Tokenizer
from any2point.ops import farthest_point_sample, group


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_official(variant: str, tmp_path: Path) -> None:
    state, positions = golden.small_state(variant), golden.small_table(variant)
    model = Any2Point.from_official(state, position_table=positions)
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_way_back(variant: str, tmp_path: Path) -> None:
    """Every tensor comes back bit for bit, also through a saved model; the counters with the head's value."""
    state, positions = golden.small_state(variant), golden.small_table(variant)
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(356 * 300)
    model = Any2Point.from_official(state, position_table=positions)
    model.save_pretrained(tmp_path, include_source=True)
    for ours in (model, Any2Point.from_pretrained(tmp_path)):
        assert differences(ours, variant) == []
        back = official_state(ours, variant)
        assert back.keys() == state.keys()
        for name, value in state.items():
            assert back[name].dtype == value.dtype
            assert torch.equal(back[name], value), name
            assert back[name].is_contiguous()


@pytest.mark.parametrize("variant", VARIANTS)
def test_trained_here(variant: str) -> None:
    """A model that starts from a pretrained transformer goes there and comes back as the same function."""
    family = variant.split("/")[0]
    source = Source.random(family, width=48, depth=2, heads=12)
    model = Any2Point(Any2PointConfig(**variant_options(variant, "official")), source).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.norm.weight.fill_(3.0)
    state = official_state(model, variant)
    points = golden.points(variant)[:2]
    again = Any2Point.from_official(state, position_table=source.position_table)
    assert torch.equal(again(points), model(points))
    assert differences(model, variant) == []
    assert torch.equal(
        state["encoder.norm.weight" if "scan" in variant else "norm.weight"], torch.full((48,), 3.0)
    )


def test_refused_ways_back() -> None:
    variant = "dinov2/scanobjectnn"
    state, positions = golden.small_state(variant), golden.small_table(variant)
    small = Any2Point.from_official(state, position_table=positions)
    with pytest.raises(ValueError, match=r"is not dinov2/scanobjectnn .*width 48 \(official: 768\)"):
        small.to_official()
    other = Any2Point.from_official(state, position_table=positions, coef_pro=0.5, neighbors=32)
    with pytest.raises(ValueError, match=r"neighbors 32 \(official: 64\); coef_pro 0.5 \(official: 0.7\)"):
        other.to_official(variant)
    quiet = Any2Point.from_official(state, position_table=positions, dropout=0.0, attention_dropout=0.0)
    assert differences(quiet, variant) == []
    assert "normalize 'scan' (official: 'mn40')" in differences(quiet, "dinov2/modelnet40")
    assert differences(quiet, "imagebind/modelnet40") == ["source dinov2 (official: imagebind)"]
    ours = Any2Point(Any2PointConfig(num_points=64, num_tokens=8, neighbors=4), small.source_info)
    with pytest.raises(ValueError, match=r"parity None \(official: 'official'\)"):
        ours.to_official()
    config = Any2PointConfig(num_points=64, num_tokens=8, neighbors=4)
    bert = Any2Point(config, Source.random("bert", width=48, depth=1, positions=(16,)))
    with pytest.raises(ValueError, match=r"expected one of clip-text/scanobjectnn, .*, got .* source bert"):
        bert.to_official()


def test_recognised() -> None:
    for variant in VARIANTS:
        state = golden.small_state(variant)
        assert recognise(state) == variant
        assert recognise(state, variant) == variant
        headless = {k: v for k, v in state.items() if not k.startswith(("prediction", "cls_head"))}
        family = variant.split("/")[0]
        message = f"`variant`: expected {family}/scanobjectnn or {family}/modelnet40, because .* neither"
        with pytest.raises(ValueError, match=message):
            recognise(headless)
        assert recognise(headless, variant) == variant
    with pytest.raises(ValueError, match=r"imagebind/modelnet40 does not fit .* blocks without LayerScale"):
        recognise(golden.small_state("imagebind/scanobjectnn"), "imagebind/modelnet40")
    with pytest.raises(ValueError, match=r"clip-text/scanobjectnn does not fit .* LayerScale \(DINOv2\)"):
        recognise(golden.small_state("dinov2/scanobjectnn"), "clip-text/scanobjectnn")
    with pytest.raises(ValueError, match=r"no blocks and neither .* \(1 tensors, such as fc.weight\)"):
        recognise({"fc.weight": torch.zeros(1)})


def test_refused() -> None:
    variant = "dinov2/scanobjectnn"
    state, positions = golden.small_state(variant), golden.small_table(variant)
    for name in ("encoder.norm3.2.weight", "prediction.head.4.0.bias", "encoder.blocks.1.attn.proj.bias"):
        rest = {key: value for key, value in state.items() if key != name}
        with pytest.raises(ValueError, match=rf"`state_dict`: nothing in it for {name} \(1 in all\)"):
            Any2Point.from_official(rest, variant, position_table=positions)
    for name, value, message in (
        ("prediction.head.0.1.bias", torch.zeros(9), r"expected shape \[256\] for prediction.head.0.1.bias"),
        ("encoder.blocks.0.attn.proj.bias", torch.zeros(9), r"expected shape \[48\] for 'blocks.0.attn.proj"),
        ("encoder.norm4.weight", torch.zeros(9), "encoder.norm4.weight has no place in dinov2/scan"),
        ("epoch", "best", "expected tensors, got str for epoch"),
    ):
        with pytest.raises(ValueError, match=message):
            Any2Point.from_official(state | {name: value}, variant, position_table=positions)
    with pytest.raises(TypeError, match="`state_dict`: expected a dictionary of tensors, got list"):
        Any2Point.from_official([], variant, position_table=positions)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`position_table`: expected"):
        Any2Point.from_official(state, variant, position_table=torch.zeros(1, 1370, 47))
    with pytest.raises(
        ValueError, match=r"`position_table`: expected 229 rows \(12 x 19\), got \[1, 1370, 48\]"
    ):
        Any2Point.from_official(
            golden.small_state("imagebind/modelnet40"), position_table=torch.zeros(1, 1370, 48)
        )
    with pytest.raises(ValueError, match="`variant`: expected one of clip-text/scanobjectnn"):
        Any2Point.from_official(state, "clip", position_table=positions)
    with pytest.raises(ValueError, match="`state_dict`: expected the blocks of a transformer"):
        Any2Point.from_official({}, variant, position_table=positions)


def test_places() -> None:
    scan = official_names("clip-text", "scanobjectnn", depth=12)
    assert scan["encoder.attn1.3.qkv.weight"] == Place("encoder.attention.qkv_weight", 3)
    place = scan["encoder.resblocks.11.out_transform_1d.2.0.running_var"]
    assert place == Place("encoder.adapters.11.view_norm.running_var", 2)
    assert scan["prediction.head.2.1.weight"] == Place("head.5.weight")
    modelnet = official_names("dinov2", "modelnet40", depth=12)
    place = modelnet["patch_embed.EncP.LGA_list.0.linear2.1.net2.0.weight"]
    assert place == Place("tokenizer.stages.0.1.up.weight", ones=2)
    for variant in VARIANTS:
        family, dataset = variant.split("/")
        names = {parameter.name for parameter in golden.parameters(variant)}
        assert official_names(family, dataset, depth=12).keys() == names


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
