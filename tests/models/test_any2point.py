"""The model: invariants of the default semantics, degenerate clouds, training, parameters."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from small import FAMILIES, SMALL, close, clouds, make, make_source
from torch import Tensor

from any2point import Any2Point, Any2PointConfig, Source
from any2point.models import TokenizerProbe

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any2Point:
    return make(request.param)


class TestInvariants:
    @torch.no_grad()
    def test_batch_mates_do_not_matter(self, model: Any2Point) -> None:
        points = clouds()
        together = model(points)
        for i in range(3):
            close(model(points[i : i + 1]), together[i : i + 1])
        assert (together[0] - together[1]).abs().max() > 1e-3

    @torch.no_grad()
    def test_batch_mates_do_not_matter_with_mn40(self) -> None:
        for family in FAMILIES:
            model, points = make(family, normalize="mn40"), clouds()
            close(model(points[1:2]), model(points)[1:2])

    @torch.no_grad()
    def test_order_of_points_does_not_matter(self, model: Any2Point) -> None:
        points = clouds()
        order = torch.randperm(points.shape[1])
        close(model(points[:, order]), model(points))

    @torch.no_grad()
    def test_translation_does_not_matter(self, model: Any2Point) -> None:
        points = clouds()
        close(model(points + torch.tensor([2.0, -3.0, 0.5])), model(points), 1e-4)

    @torch.no_grad()
    def test_evaluation_is_deterministic(self, model: Any2Point) -> None:
        points = clouds()
        assert torch.equal(model(points), model(points))

    @torch.no_grad()
    def test_other_numbers_of_points(self, model: Any2Point) -> None:
        assert model(clouds(1, 300)).shape == (1, 5)
        with pytest.raises(ValueError, match=r"`points`: expected at least 53 points per cloud .* got 40"):
            model(clouds(1, 40))


def degenerate() -> dict[str, Tensor]:
    points = clouds(2)
    flat, line = points.clone(), points.clone()
    flat[..., 2] = 0.3
    line[..., 1:] = 0
    lattice = (points * 2).round() / 2
    twice = points.clone()
    twice[:, 48:] = twice[:, :48]
    far = points.clone()
    far[:, 0] = 1e4
    return {
        "flat": flat,
        "line": line,
        "one point": torch.full_like(points, 0.7),
        "origin": torch.zeros_like(points),
        "lattice": lattice,
        "duplicates": twice,
        "outlier": far,
        "tiny": points * 1e-20,
        "denormal": points * 1e-42,
        "large": points * 1e6,
        "huge": points * 1e20,
        "largest": points.clamp(-1, 1) * 3.4e38,
    }


@pytest.mark.parametrize("normalize", ["scan", "mn40"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_finite_cloud_gives_nan(family: str, normalize: str) -> None:
    model = make(family, normalize=normalize)
    for name, points in degenerate().items():
        with torch.no_grad():
            assert model(points).isfinite().all(), name
    model.train()
    for name in ("flat", "line", "one point", "duplicates"):
        model.zero_grad()
        loss = model(degenerate()[name]).square().mean()
        loss.backward()
        assert loss.isfinite(), name
        gradients = [p.grad for p in model.trainable_parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients), name
        assert all(buffer.isfinite().all() for buffer in model.buffers()), name


def test_cells_of_a_single_token() -> None:
    model = make("bert", cell=0.01)
    model.train()
    assert model(clouds()).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_points_that_are_not_finite_are_left_out(family: str, training: bool) -> None:
    points = clouds()
    padded = torch.cat([points, torch.full((3, 30, 3), torch.nan)], dim=1)
    padded[:, 100, 0] = torch.inf
    padded = padded[:, torch.randperm(126)]
    results = []
    for x in (points, padded):
        model = make(family, dropout=0.0, adapter_dropout=0.0).train(training)
        results.append(model(x))
        model.eval()
        results.append(model(points))
    close(results[0], results[2], 1e-3)
    close(results[1], results[3], 1e-3)


def test_clouds_without_enough_finite_points_do_not_crash() -> None:
    points = clouds()
    points[0] = torch.nan
    points[1, 20:] = torch.nan
    out = make()(points)
    close(out[2:], make()(clouds())[2:])


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        (torch.rand(96, 3), ValueError, r"`points`: expected shape \[B, N, 3\]"),
        (torch.rand(1, 3, 96), ValueError, r"`points`: expected shape \[B, N, 3\]"),
        (torch.rand(0, 96, 3), ValueError, "B > 0"),
        (torch.zeros(1, 96, 3, dtype=torch.int64), TypeError, "`points`: expected a floating point tensor"),
        (torch.rand(1, 96, 3).to_sparse(), TypeError, r"`points`: expected a dense tensor \[B, N, 3\]"),
        ([[0.0, 0.0, 0.0]], TypeError, r"`points`: expected a floating point tensor \[B, N, 3\], got list"),
    ],
)
def test_bad_points(points: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()(points)


def test_encode(model: Any2Point) -> None:
    points = clouds()
    encoding = model.encode(points)
    assert encoding.tokens.shape == (3, 16, 48)
    assert encoding.feature.shape == (3, 96)
    close(encoding.feature, torch.cat([encoding.tokens.amax(1), encoding.cls], 1))
    for b in range(3):  # centres are distinct points of the cloud
        distance = torch.cdist(encoding.centers[b], points[b])
        assert (distance.min(1).values == 0).all()
        assert distance.argmin(1).unique().numel() == 16
    assert torch.equal(model(points), model.head(encoding.feature))


QUIRKS: dict[str, Any] = {
    "attention_axis": "batch",
    "wrap": True,
    "position_adds": "every",
    "count_empty": True,
    "fps_tie": "pointnet2",
    "fps_start": "first",
    "guard": False,
    "center": False,
    "causal": True,
    "norm_eps": 1e-2,
    "final_norm_eps": 1e-2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_quirk_by_itself(family: str) -> None:
    """Each option works without the others, and does something."""
    special = (
        {"scramble": True, "camera": 3.0} if family == "dinov2" else {"permuted_lines": True, "views": 6}
    )
    everywhere, near = clouds(4), clouds(4) / 20  # officially, points near the origin are skipped
    for name, value in (QUIRKS | special).items():
        if name == "views":
            continue
        options = {"views": 6} if name == "permuted_lines" else {}
        if name == "guard":
            options["normalize"] = "mn40"
        plain, quirky = make(family, **options), make(family, **options, **{name: value})
        points = near if name == "fps_tie" else everywhere
        results = []
        for model in (plain, quirky):
            model.train(name == "count_empty")
            torch.manual_seed(0)
            results.append(model(points))
        want, got = results
        assert got.isfinite().all(), name
        assert (got - want).abs().max() > 1e-6, name


def test_attention_over_the_batch_mixes_clouds() -> None:
    model, points = make(attention_axis="batch"), clouds()
    assert (model(points)[:1] - model(points[:1])).abs().max() > 1e-3


def test_dropped_paths_and_attention_only_in_training() -> None:
    model, points = make("dinov2", drop_path=0.5, attention_dropout=0.5), clouds(8)
    assert torch.equal(model(points), model(points))
    assert model.encoder.path_rates == [0.0, 0.5]
    model.train()
    assert model(points).isfinite().all()


def test_freezing() -> None:
    model = make()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert all(name.startswith("encoder.source.") for name in frozen)
    table = model.projection.table.clone()
    model.train()
    assert not any(module.training for module in model.encoder.source.modules())
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-2)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(clouds(4)), torch.arange(4)).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
            assert torch.equal(parameter, frozen[name]), name
    assert torch.equal(model.projection.table, table)
    same = {name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])}
    # A bias before a batch normalisation has no gradient at all.
    assert all(re.fullmatch(r"tokenizer\.stages\.\d\.\d\.(down|up)\.bias", name) for name in same), same


def test_a_source_can_serve_two_models() -> None:
    source = make_source()
    fingerprint = source.fingerprint
    one, two = (Any2Point(Any2PointConfig(**SMALL), source) for _ in range(2))
    assert (
        one.encoder.source.blocks[0].mlp.fc1.weight.data_ptr()
        == source.tensors["blocks.0.mlp.fc1.weight"].data_ptr()
    )
    with torch.no_grad():
        one.norm.weight.add_(1)
        one.cls_token.add_(1)
        one.projection.table.add_(1)
    assert source.fingerprint == fingerprint
    assert torch.equal(two.projection.table, source.position_table)


def test_it_learns() -> None:
    """Two kinds of clouds are told apart after a few steps."""
    torch.manual_seed(0)
    model = Any2Point(Any2PointConfig(**(SMALL | {"num_classes": 2, "dropout": 0.0})), make_source())
    points = torch.randn(16, 96, 3)
    points[8:, :, 2] *= 0.1
    labels = torch.arange(16) // 8
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=2e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_parameter_groups() -> None:
    model = make()
    decayed, plain = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(model.trainable_parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert {"cls_token", "cls_position", "head.0.weight", "tokenizer.embed.weight"} <= decayed_names
    assert "encoder.attention.qkv_weight" in decayed_names
    assert "encoder.adapters.0.adapter.down.weight" in decayed_names
    assert not any("norm" in name or name.endswith("bias") for name in decayed_names)
    assert "head.1.weight" in {names[id(p)] for p in plain["params"]}
    rest = make(cls_decay=False)
    assert len(rest.parameter_groups()[1]["params"]) == len(plain["params"]) + 1


def test_summary() -> None:
    model = make()
    summary = model.summary()
    assert summary.trained == sum(p.numel() for p in model.trainable_parameters())
    assert summary.frozen == sum(p.numel() for p in model.parameters()) - summary.trained
    assert summary.trained - summary.trained_without_head == sum(p.numel() for p in model.head.parameters())
    table = str(summary)
    assert f"{summary.trained_without_head:,}" in table
    assert {"tokenizer", "adapters", "attention in cells", "head", "source"} <= {r[0] for r in summary.rows}


def test_low_precision() -> None:
    model, points = make("bert"), clouds()
    want = model(points)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(points)
    close(got.float(), want, 0.1)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(points).float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.trainable_parameters())
    model.eval()
    close(model(points.bfloat16()), model(points.bfloat16().float()), 1e-6)
    assert make().double()(points.double()).dtype == torch.float64
    half = make().bfloat16()(points)
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_minilm_layout() -> None:
    """Six post-norm layers of width 384 with 12 heads, and a tokenizer of base width 48."""
    source = Source.random("bert", width=384, depth=6, heads=12)
    config = Any2PointConfig(num_points=128, num_tokens=32, neighbors=8, tokenizer_width=48)
    model = Any2Point(config, source).eval()
    points = torch.rand(2, 128, 3)
    with torch.no_grad():
        out = model(points)
    assert out.shape == (2, 15)
    assert out.isfinite().all()
    torch.testing.assert_close(model.cls_token.flatten(), source.cls_token)


def test_probe() -> None:
    probe = TokenizerProbe(Any2PointConfig(**SMALL), 48, ["a", "b", "c", "d", "e"])
    points = clouds()
    assert probe(points).shape == (3, 5)
    probe.eval()
    close(probe(points + 2), probe(points), 1e-4)
    assert probe.summary().trained_without_head == sum(p.numel() for p in probe.tokenizer.parameters())
    assert len(probe.parameter_groups()) == 2
    tokenizer = make().tokenizer
    assert sum(p.numel() for p in tokenizer.parameters()) == probe.summary().trained_without_head


def test_class_names() -> None:
    with pytest.raises(ValueError, match="`class_names`: expected 5 names, got 2"):
        Any2Point(Any2PointConfig(**SMALL), make_source(), ["a", "b"])
    for names in ("abcde", [1, 2, 3, 4, 5], 5):
        with pytest.raises(TypeError, match="`class_names`: expected a list of names, got"):
            Any2Point(Any2PointConfig(**SMALL), make_source(), names)  # type: ignore[arg-type]


def test_arguments_of_other_types() -> None:
    with pytest.raises(TypeError, match="`source`: expected Source, got str"):
        Any2Point(Any2PointConfig(**SMALL), "ViT-L-14.pt")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`config`: expected Any2PointConfig, got dict"):
        Any2Point(SMALL, make_source())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`width`: expected a multiple of 8, got 50"):
        TokenizerProbe(Any2PointConfig(**SMALL), 50)


def test_one_cloud_has_no_statistics() -> None:
    with pytest.raises(ValueError, match=r"`points`: expected at least 2 clouds to train on, .* got 1"):
        make().train()(clouds(1))
    assert make(tuning="probe").train()(clouds(1)).isfinite().all()
