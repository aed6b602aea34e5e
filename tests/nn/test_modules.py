"""Modules: the tokenizer stage by stage, views, the order of additions in the encoder."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from any2point import ops
from any2point.nn import (
    AdaptedEncoder,
    Adapter,
    CellAttention,
    ClassificationHead,
    GuidedAdapter,
    Tokenizer,
    VirtualProjection,
    euler_rotations,
    given_lines,
    spread_lines,
    spread_rotations,
    stage_sizes,
)
from any2point.nn.views import official_rotations
from any2point.sources import Source


def test_stage_sizes() -> None:
    assert stage_sizes(1024, 128) == (512, 256, 128)
    assert stage_sizes(512, 64) == (256, 128, 64)
    assert stage_sizes(64, 64) == (64, 64, 64)
    assert stage_sizes(2048, 128) == (813, 323, 128)


@pytest.mark.parametrize("start", ["farthest", "first"])
def test_tokenizer_equals_its_stages_one_by_one(start: str) -> None:
    tokenizer = Tokenizer(6, (32, 16, 8), (5, 4, 3), last_hidden=7, start=start).eval()
    points = torch.randn(2, 60, 3)
    tokens = tokenizer(points)
    first: torch.Tensor | int = 0
    if start == "farthest":
        first = (points - points.mean(1, keepdim=True)).norm(dim=-1).argmax(1)
    xyz, x = points, tokenizer.embed(points).div((1 + 1e-5) ** 0.5).relu()
    for stage, (size, k) in enumerate(zip((32, 16, 8), (5, 4, 3))):
        center = ops.farthest_point_sample(xyz, size, start=first)
        first = 0
        centers = ops.group(xyz, center)
        neighbor = ops.knn(centers, xyz, k).index
        units = [unit.tensors() for unit in tokenizer.stages[stage]]
        x = ops.local_aggregate(xyz, x, center, neighbor, units)
        xyz = centers
    assert tokens.features.shape == (2, 8, 48)
    torch.testing.assert_close(tokens.features, x)
    assert torch.equal(tokens.centers, xyz)
    assert torch.equal(ops.group(points, tokens.index), xyz)


def test_tokenizer_has_the_published_size() -> None:
    count = sum(p.numel() for p in Tokenizer(96, (512, 256, 128), (81, 81, 81)).parameters())
    assert count == 276_672


def test_lines_are_distinct_and_spread() -> None:
    for views in (1, 2, 3, 4, 6, 10, 20):
        lines = spread_lines(views)
        torch.testing.assert_close(lines.norm(dim=1), torch.ones(views))
        cosine = (lines @ lines.T).abs() - torch.eye(views)
        assert cosine.max() < math.cos(1.2 / math.sqrt(views)), views
    six = spread_lines(6) @ spread_lines(6).T
    torch.testing.assert_close(
        six.abs()[~torch.eye(6, dtype=torch.bool)], torch.full((30,), 1 / math.sqrt(5))
    )


@pytest.mark.parametrize("views", [1, 4, 6, 9])
def test_views_are_rotations(views: int) -> None:
    rotations = spread_rotations(views)
    assert rotations.shape == (views, 3, 3)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(views, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(views))


def test_views_that_cannot_be() -> None:
    for views in (0, -1, 2.5, True, "3"):
        for spread in (spread_lines, spread_rotations):
            with pytest.raises(ValueError, match=f"`views`: expected a positive integer, got {views!r}"):
                spread(views)  # type: ignore[arg-type]
    for rows in ([], 3, "abc", [[1, 2]], [["a", 0, 0]], [[1, 2, math.nan]], [[0, 0, 0], None]):
        with pytest.raises(
            ValueError, match="`lines`: expected directions of three numbers, not all zero, got"
        ):
            given_lines(rows)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`rotations`: expected three angles in degrees, got"):
            euler_rotations(rows)  # type: ignore[arg-type]


def test_official_rotations() -> None:
    """(Rx Ry Rz)^T from the published Euler angles, in degrees."""
    angles = [(0, 0, 90), (90, 0, 90), (180, 0, 90), (270, 0, 90), (0, -90, 90), (0, 90, 90)]
    for rotation, (x, y, z) in zip(official_rotations(), angles):
        matrix = torch.eye(3, dtype=torch.float64)
        for axis, angle in enumerate((x, y, z)):
            cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            a, b = (axis + 1) % 3, (axis + 2) % 3
            turn = torch.eye(3, dtype=torch.float64)
            turn[a, a], turn[a, b], turn[b, a], turn[b, b] = cosine, -sine, sine, cosine
            matrix = matrix @ turn
        torch.testing.assert_close(rotation.double(), matrix.T, atol=1e-12, rtol=0)


def test_adapter() -> None:
    adapter = Adapter(6, 3, scale=0.5, dropout=0.5).eval()
    x = torch.randn(2, 4, 6)
    hidden = adapter.down(x)
    torch.testing.assert_close(adapter(x), 0.5 * adapter.up(hidden * torch.sigmoid(1.702 * hidden)))
    adapter.train()
    assert not torch.equal(adapter(x), adapter(x))


@pytest.mark.parametrize("family", ["clip-text", "bert"])
@pytest.mark.parametrize(("adds", "times"), [("once", 1), ("every", 3), ("both", 4)])
def test_position_encodings_are_added_as_often_as_said(family: str, adds: str, times: int) -> None:
    """With all branches silent, a pre-norm encoder returns its input plus the position encodings it added."""
    source = Source.random(family, width=12, depth=3, heads=2)
    adapters = [
        GuidedAdapter(
            12, 2, 2, scale=1.0, dropout=0.0, coefficient=0.0, pooling="mean", num_cells=4,
            count_empty=False, norm_eps=1e-6,
        )
        for _ in range(3)
    ]  # fmt: skip
    encoder = AdaptedEncoder(
        source.encoder(), adapters, CellAttention(12, 4, 2, 2), position_adds=adds
    ).eval()
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.zero_()
            module.bias.data.zero_()
    x, position = torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    cell, cluster = torch.zeros(2, 2, 5, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64)
    out = encoder(x, position, cell, cluster)
    if family == "clip-text":
        torch.testing.assert_close(out, x + times * position)
    else:  # post-norm: a LayerNorm after the sum, and two in every block
        want = x + position if adds != "every" else x
        for step in range(7):
            want = want + position if adds != "once" and step in (1, 3, 5) else want
            want = torch.nn.functional.layer_norm(want, (12,))
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize("part", ["stacked", "embed", "clouds", "pool", "head"])
def test_interpreted(part: str) -> None:
    script = Path(__file__).with_name(f"{part}_interpreted.py")
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ
        | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2]), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_head() -> None:
    head = ClassificationHead(8, 3, hidden=5)
    assert head(torch.randn(4, 8)).shape == (4, 3)
    assert sum(p.numel() for p in ClassificationHead(1536, 15).parameters()) == 463_631
    assert sum(p.numel() for p in ClassificationHead(1536, 40, bias=True).parameters()) == 470_568


def test_projection_module() -> None:
    module = VirtualProjection(torch.randn(9, 4), spread_lines(3), cell=2.0, size=(18,))
    assert module.num_cells == 9
    assert not list(module.parameters())
    assert set(module.state_dict()) == {"table", "views"}
    out = module(torch.randn(2, 5, 3))
    assert out.encoding.shape == (2, 5, 4)
    assert out.position.max() == 17
