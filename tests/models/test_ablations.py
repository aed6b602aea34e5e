"""Every ablation: what it computes, what it trains, what it refuses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import pytest
import torch
from small import FAMILIES, SMALL, close, clouds, make, make_source

from any2point import Any2Point, Any2PointConfig, Source
from any2point.models import TokenizerProbe
from any2point.nn import LearnedPositions
from any2point.reference.local_aggregate import encode_offsets

ABLATIONS: dict[str, dict[str, Any]] = {
    "no positions": {"positions": "none"},
    "learned positions": {"positions": "learned"},
    "sinusoidal positions": {"positions": "sinusoidal"},
    "bottleneck": {"adapter": "bottleneck"},
    "aggregate": {"adapter": "aggregate"},
    "no adapter": {"adapter": "none"},
    "one block": {"adapter_blocks": (1,)},
    "parallel": {"insertion": "mlp_parallel"},
    "early": {"insertion": "attention_output"},
    "mean of views": {"ensemble": "mean"},
    "maximum of views": {"ensemble": "max"},
    "maximum in cells": {"pooling": "max+mean"},
    "other cells": {"cell": 3.0},
    "other voxels": {"voxel_size": 0.9},
    "one view": {"views": 1},
    "pointnet": {"tokenizer": "pointnet"},
    "one stage": {"tokenizer_units": (1,)},
    "four stages": {"tokenizer_units": (1, 1, 1, 1), "num_tokens": 10},
    "every point a token": {"num_tokens": 96},
    "full tuning": {"tuning": "full"},
    "linear probe": {"tuning": "probe"},
}
# Names in `any2point.models.Summary` of what each trains beside, or leaves out of, the default.
DEFAULT = {"tokenizer", "class token", "adapters", "view norms", "voxel norms", "attention in cells"}
DEFAULT |= {"final norm", "head"}
GUIDED = {"view norms", "voxel norms", "attention in cells"}
PARTS = {
    "learned positions": DEFAULT | {"positions"},
    "bottleneck": DEFAULT - GUIDED,
    "aggregate": DEFAULT - {"adapters"},
    "no adapter": DEFAULT - GUIDED - {"adapters"},
    "mean of views": DEFAULT - {"voxel norms"},
    "maximum of views": DEFAULT - {"voxel norms"},
    "full tuning": DEFAULT | {"source", "position table"},
    "linear probe": {"tokenizer", "head"},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", ["clip-text", "dinov2"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation(name: str, family: str) -> None:
    """It differs from the default, keeps its invariants, and trains what it says and all of it."""
    options, points = ABLATIONS[name], clouds()
    model = make(family, **options)
    with torch.no_grad():
        logits = model(points)
        if name != "full tuning":
            assert (logits - make(family)(points)).abs().max() > 1e-5
        close(model(points[1:2]), logits[1:2])
        close(model(points[:, torch.randperm(96)]), logits)
        close(model(points + 2), logits, 1e-4)
        for strange in (points * 0 + 0.3, points * torch.tensor([0, 1, 0]), points * 1e6, points * 1e20):
            assert model(strange).isfinite().all()

    summary = model.summary()
    assert set(summary.trained_parts) == PARTS.get(name, DEFAULT)
    assert str(summary).splitlines()[-1] == "trained: " + ", ".join(summary.trained_parts)
    assert summary.trained == sum(p.numel() for p in model.trainable_parameters())

    torch.nn.functional.cross_entropy(model.train()(points), torch.arange(3)).backward()
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, parameter_name
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ABLATIONS)
def test_serialised(name: str) -> None:
    config = Any2PointConfig(**(SMALL | ABLATIONS[name])).resolve(make_source())
    assert Any2PointConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.resolve(make_source()) == config


def test_every_field_is_documented() -> None:
    for field in dataclasses.fields(Any2PointConfig):
        assert re.search(rf"^        {field.name}: ", Any2PointConfig.__doc__ or "", re.M), field.name


def test_names_of_saved_tensors_do_not_change() -> None:
    """Models that were saved can be read. If names have to change, `hub.load` must take the old ones too."""
    rows = sorted(f"{name} {list(value.shape)}" for name, value in make().state_dict().items())
    assert len(rows) == 127
    assert hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16] == "f3e76765792257f4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"positions": "rotary"}, "`positions`: expected one of"),
        ({"adapter": "lora"}, "`adapter`: expected one of"),
        ({"insertion": "front"}, "`insertion`: expected one of"),
        ({"ensemble": "vote"}, "`ensemble`: expected one of"),
        ({"tokenizer": "knn"}, "`tokenizer`: expected one of"),
        ({"tuning": "lora"}, "`tuning`: expected one of"),
        ({"source_dtype": "float16"}, "`source_dtype`: expected one of"),
        ({"input_features": -1}, "`input_features`: expected an integer of 0 or more, got -1"),
        ({"lines": [[0, 0, 0]], "views": 1}, "`lines`: expected directions of three numbers, not all zero"),
        ({"rotations": [[0, 90]], "views": 1}, "`rotations`: expected three angles in degrees"),
        ({"rotations": [[0, 90, 0]]}, r"`rotations`: expected 6 directions \(`views`\), got 1"),
        ({"tuning": "probe", "adapter": "both"}, "`adapter`: expected none for `tuning` probe, got both"),
        ({"tuning": "probe", "positions": "learned"}, "`positions`: .* for `tuning` probe, got learned"),
        (
            {"tuning": "full", "source_dtype": "bfloat16"},
            "`source_dtype`: expected float32 for `tuning` full",
        ),
        ({"adapter": "bottleneck", "ensemble": "mean"}, "`ensemble`: expected adaptive with `adapter` bottl"),
        ({"tuning": "probe", "pooling": "max+mean"}, "`pooling`: expected mean with `adapter` none"),
        ({"adapter": "none", "adapter_blocks": [0]}, "`adapter_blocks`: expected None with `adapter` none"),
        ({"adapter": "none", "insertion": "attention_output"}, "`insertion`: .* with `adapter` none"),
        ({"adapter": "aggregate", "insertion": "mlp_parallel"}, "`insertion`: .* with `adapter` aggregate"),
        ({"tokenizer": "pointnet", "stage_sizes": [128]}, "`stage_sizes`: expected None for `tokenizer`"),
        ({"tokenizer": "pointnet", "neighbors": [9, 9]}, "`neighbors`: expected one number or 1"),
        ({"causal": True, "attention_axis": "batch"}, "`causal`: expected False with `attention_axis` batch"),
        ({"lines": [[1, 0, 0]], "views": 1, "permuted_lines": True}, "`lines`: expected None with `permuted"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Any2PointConfig(**values)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        (
            "bert",
            {"rotations": [[0, 0, 0]]},
            "`rotations`: expected None for bert, .* a sequence, got .*; see `lines`",
        ),
        (
            "dinov2",
            {"lines": [[1, 0, 0]]},
            "`lines`: expected None for dinov2, .* image, got .*; see `rotations`",
        ),
        ("bert", {"adapter_blocks": [2]}, r"`adapter_blocks`: expected distinct numbers below 2, got \(2,\)"),
        ("bert", {"adapter_blocks": [0, 0]}, "`adapter_blocks`: expected distinct numbers"),
        ("bert", {"adapter_blocks": []}, "`adapter_blocks`: expected distinct numbers"),
        ("clip-text", {"causal": True, "parity": "official", "views": 6}, "`causal`: expected False"),
    ],
)
def test_refused_for_a_source(family: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Any2PointConfig(**({"views": 1} | values)).resolve(make_source(family))


def test_given_lines_and_rotations() -> None:
    points = clouds()
    axes = ((2.0, 0, 0), (0, -3.0, 0), (0, 0, 0.1))
    with torch.no_grad():
        close(make(lines=axes)(points), make(lines=((1, 0, 0), (0, -1, 0), (0, 0, 1)))(points))
        assert torch.equal(make(lines=((1, 0, 0), (0, 1, 0), (0, 0, 1)))(points), make()(points))
        assert (make(lines=axes)(points) - make()(points)).abs().max() > 1e-3
        angles = ((0, 0, 90), (90, 0, 90), (180, 0, 90), (270, 0, 90), (0, -90, 90), (0, 90, 90))
        close(make("dinov2", views=6, rotations=angles)(points), make("dinov2", views=6)(points))
        other = make("dinov2", views=2, rotations=((0, 0, 0), (30, 40, 50)))(points)
    assert other.isfinite().all()


def test_given_views_go_before_the_official_ones() -> None:
    config = Any2PointConfig(parity="official", lines=((1, 0, 0), (0, 1, 0)), views=2).resolve(make_source())
    assert not config.permuted_lines
    angles = ((10.0, 0.0, 0.0),)
    image = Any2PointConfig(parity="official", rotations=angles, views=1).resolve(make_source("dinov2"))
    assert (image.rotations, image.views) == (angles, 1)


def test_positions() -> None:
    points, source = clouds(), make_source()
    with torch.no_grad():
        models = {name: make(positions=name) for name in ("virtual", "none", "learned", "sinusoidal")}
        position = {name: model.embed(points)[1] for name, model in models.items()}
        centers = models["none"].tokenizer(models["none"].prepare(points)[0]).centers
    for name, model in models.items():
        torch.testing.assert_close(position[name][:, :1], model.cls_position.expand(3, 1, -1))
    assert torch.equal(position["none"][:, 1:], torch.zeros(3, 16, 48))
    want = models["learned"].positions(centers)
    torch.testing.assert_close(position["learned"][:, 1:], want.detach())
    assert isinstance(models["learned"].positions, LearnedPositions)
    sines = position["sinusoidal"][:, 1:]
    strength = source.position_table.square().mean().sqrt()
    torch.testing.assert_close(sines.square().mean().sqrt(), strength, rtol=1e-4, atol=0)
    torch.testing.assert_close(sines, 2**0.5 * strength * encode_offsets(centers, 48))


def test_adapter_blocks() -> None:
    """A block without adapter is the source's own block."""
    points = clouds()
    for family in FAMILIES:
        with torch.no_grad():
            model = make(family, adapter_blocks=(1,))
            x, position, cell, cluster, _ = model.embed(points)
            x = model.encoder.source.embed(x + position)
            assert not list(model.encoder.adapters[0].parameters())
            got = model.encoder.block(0, x, position, cell, cluster)
            torch.testing.assert_close(got, model.encoder.source.blocks[0](x))
            every = make(family, adapter_blocks=(1, 0))
            close(every(points), make(family)(points))


def test_no_adapter_is_the_plain_source() -> None:
    for family in FAMILIES:
        model, points = make(family, adapter="none", positions="none"), clouds()
        with torch.no_grad():
            x, position, *_ = model.embed(points)
            want = model.norm(model.encoder.source(x + position))
            torch.testing.assert_close(model.encode(points).tokens, want[:, 1:])


@pytest.mark.parametrize("family", ["clip-text", "bert"])
def test_insertion(family: str) -> None:
    """The block written out, for each place of the adapter."""
    points = clouds()
    for insertion in ("mlp_output", "mlp_parallel", "attention_output"):
        model = make(family, insertion=insertion)
        encoder = model.encoder
        block, guided = encoder.source.blocks[0], encoder.adapters[0]
        before, after = (
            (lambda n, x: x, lambda n, x: n(x)) if block.post_norm else (lambda n, x: n(x), lambda n, x: x)
        )
        with torch.no_grad():
            x, position, cell, cluster, _ = model.embed(points)
            x = encoder.source.embed(x + position)
            got = encoder.block(0, x, position, cell, cluster)

            y = block.attn(before(block.norm1, x))
            x = x + y + (guided.adapter(y) if insertion == "attention_output" else 0)
            x = after(block.norm1, x)
            x = encoder._guide(0, x, cell, cluster) if insertion == "attention_output" else x
            taken = before(block.norm2, x)
            y = block.mlp(taken)
            extra = {"mlp_output": y, "mlp_parallel": taken}.get(insertion)
            x = x + y + (0 if extra is None else guided.adapter(extra))
            x = after(block.norm2, x)
            x = x if insertion == "attention_output" else encoder._guide(0, x, cell, cluster)
        torch.testing.assert_close(got, x)


def test_pointnet_tokenizer() -> None:
    """One group at a time, with torch's own layers."""
    model, points = make(tokenizer="pointnet", input_features=2), clouds()
    features = torch.randn(3, 96, 2)
    tokenizer = model.tokenizer
    with torch.no_grad():
        x = model.prepare(points, features)[0]
        tokens = tokenizer(x, features)
        for b, t in ((0, 0), (2, 9)):
            near = (x[b] - tokens.centers[b, t]).square().sum(-1).topk(8, largest=False).indices
            row = torch.cat([x[b, near] - tokens.centers[b, t], features[b, near]], 1)

            def norm(rows: Any, layer: Any) -> Any:
                statistics = layer.running_mean, layer.running_var, layer.weight, layer.bias
                return torch.nn.functional.batch_norm(rows, *statistics)

            row = tokenizer.local(norm(tokenizer.point(row), tokenizer.point_norm).relu())
            row = torch.cat([row.amax(0).expand(8, -1), row], 1)
            row = tokenizer.token(norm(tokenizer.both(row), tokenizer.both_norm).relu())
            torch.testing.assert_close(tokens.features[b, t], row.amax(0))
    count = sum(p.numel() for p in make(tokenizer="pointnet").tokenizer.parameters())
    w = 128
    assert count == 3 * w + w + 2 * w + w * 2 * w + 2 * w + 4 * w * 4 * w + 4 * w + 8 * w + 4 * w * 48 + 48
    with pytest.raises(ValueError, match="`points`: expected at least 16 points per cloud"):
        model(clouds(1, 15), features[:1, :15])


def test_tokenizer_probe_takes_them_too() -> None:
    options = SMALL | {"tokenizer": "pointnet", "input_features": 1}
    probe = TokenizerProbe(Any2PointConfig(**options), 48).eval()
    points, features = clouds(), torch.rand(3, 96, 1)
    lengths = torch.tensor([96, 60, 70])
    want = probe(points[1:2, :60], features[1:2, :60])
    close(probe(points, features, lengths)[1:2], want)


def test_probe_is_linear() -> None:
    model = make("dinov2", tuning="probe")
    assert model.config.adapter == "none"
    assert isinstance(model.head, torch.nn.Linear)
    assert not list(model.encoder.adapters.parameters())
    names = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"tokenizer", "head"}


def test_views_of_any_number() -> None:
    for family in ("bert", "dinov2"):
        for views in (1, 2, 5, 9):
            with torch.no_grad():
                model = make(family, views=views)
                assert model(clouds()).isfinite().all()
                assert model.projection(clouds()).position.shape[:2] == (3, views)


def test_any_table() -> None:
    """Tables and images of any resolution and aspect."""
    for positions, size in (((3, 8), None), ((8, 3), (60, 300)), ((1, 1), None), ((37, 37), (518, 518))):
        source = Source.random("dinov2", width=48, depth=1, heads=4, positions=positions)
        config = Any2PointConfig(**(SMALL | {"position_size": size}))
        model = Any2Point(config, source).eval()
        with torch.no_grad():
            position = model.projection(clouds()).position
            assert model(clouds()).isfinite().all()
        height, width = size or positions
        assert position[..., 0].max() <= width - 1
        assert position[..., 1].max() <= height - 1
        assert position[..., 0].max() >= 0.6 * (width - 1)
