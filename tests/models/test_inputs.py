"""What goes in beside coordinates and comes out beside logits: features, lengths, registers, attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import FAMILIES, close, clouds, make, make_source

from any2point import Source
from any2point.nn.tokenizer import repeat_centers

pytestmark = pytest.mark.usefixtures("one_thread")


TOKENIZERS = ("lga", "pointnet")


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("filling", [0.0, 7.0, 1e30, torch.nan, torch.inf])
def test_lengths(family: str, tokenizer: str, filling: float) -> None:
    """Each cloud of a padded batch gives what it gives alone, whatever the padding holds."""
    model, points = make(family, tokenizer=tokenizer, input_features=2), clouds(3, 130)
    features = torch.rand(3, 130, 2)
    lengths = torch.tensor([130, 96, 101])
    padded, padded_features = points.clone(), features.clone()
    for b, n in enumerate(lengths):
        padded[b, n:], padded_features[b, n:] = filling, filling
    got = model.encode(padded, padded_features, lengths)
    for b, n in enumerate(lengths):
        alone = model.encode(points[b : b + 1, :n], features[b : b + 1, :n])
        assert torch.equal(alone.centers, got.centers[b : b + 1])
        close(alone.tokens, got.tokens[b : b + 1], 2e-6)
        close(alone.feature, got.feature[b : b + 1], 2e-6)
    close(model(padded, padded_features, lengths.int()), model.head(got.feature))


def test_lengths_in_training() -> None:
    """Statistics, too, are those of the points that are there."""
    points, lengths = clouds(3, 130), torch.tensor([110, 110, 110])
    results = []
    for x, n in ((points[:, :110], None), (points, lengths)):
        model = make("bert", dropout=0.0, adapter_dropout=0.0).train()
        F.cross_entropy(model(x, lengths=n), torch.arange(3)).backward()
        results.append((dict(model.named_buffers()), {n: p.grad for n, p in model.named_parameters()}))
    for got, want in zip(results[1], results[0]):
        for name, value in want.items():
            if value is not None:
                torch.testing.assert_close(
                    got[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m
                )


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_clouds_with_few_points(tokenizer: str) -> None:
    """Tokens repeat, as they do for a cloud whose points are there several times; none is NaN."""
    model, points = make("dinov2", tokenizer=tokenizer), clouds(4)
    lengths = torch.tensor([96, 10, 1, 0])
    encoding = model.encode(points, lengths=lengths)
    assert all(x.isfinite().all() for x in encoding[:4])
    assert encoding.centers[1].unique(dim=0).shape[0] == 10
    assert {tuple(row) for row in encoding.centers[1].tolist()} == {
        tuple(row) for row in points[1, :10].tolist()
    }
    assert torch.equal(encoding.centers[2], points[2, :1].expand(16, 3))
    assert torch.equal(encoding.centers[3], torch.zeros(16, 3))
    close(model(points, lengths=lengths)[:1], model(points[:1]))
    order = torch.cat([torch.randperm(10), torch.arange(10, 96)])
    close(model(points[1:2, order], lengths=lengths[1:2]), model(points, lengths=lengths)[1:2])
    model.train()
    assert model(points, lengths=lengths).isfinite().all()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_repeat_centers() -> None:
    index = torch.tensor([[4, 2, 7, 0, 1], [4, 2, -1, -1, -1], [-1, -1, -1, -1, -1]])
    want = torch.tensor([[4, 2, 7, 0, 1], [4, 2, 4, 2, 4], [-1, -1, -1, -1, -1]])
    assert torch.equal(repeat_centers(index), want)


@torch.no_grad()
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_features(tokenizer: str) -> None:
    model, points = make(input_features=3, tokenizer=tokenizer), clouds()
    features = torch.randn(3, 96, 3)
    want = model(points, features)
    assert (model(points, features + 1) - want).abs().max() > 1e-3
    close(model(points, features.double().float()), want)
    order = torch.randperm(96)
    close(model(points[:, order], features[:, order]), want)
    close(model(points + 3, features), want, 1e-4)
    # Features of points that are not there play no part; points whose features are not finite are not there.
    holed, gone = points.clone(), features.clone()
    holed[:, ::12] = torch.nan
    gone[:, ::12] = 1e30
    hidden = features.clone()
    hidden[:, ::12, 1] = torch.inf
    close(model(holed, features), model(holed, gone))
    close(model(holed, features), model(points, hidden))
    kept = torch.arange(96) % 12 != 0
    close(model(holed, features), model(points[:, kept], features[:, kept]))


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        (
            {},
            {"features": torch.rand(3, 96, 1)},
            ValueError,
            r"`features`: expected None \(`input_features` is 0",
        ),
        ({"input_features": 2}, {}, ValueError, r"`features`: expected a tensor \[3, 96, 2\] .* got None"),
        ({"input_features": 2}, {"features": torch.rand(3, 96, 3)}, ValueError, r"got shape \[3, 96, 3\]"),
        ({"input_features": 2}, {"features": torch.rand(3, 95, 2)}, ValueError, r"expected \[3, 96, 2\]"),
        (
            {"input_features": 2},
            {"features": torch.ones(3, 96, 2).int()},
            TypeError,
            "`features`: expected a fl",
        ),
        ({}, {"lengths": torch.tensor([3.0] * 3)}, TypeError, "lengths: expected int64"),
        ({}, {"lengths": torch.tensor([96, 96])}, ValueError, r"lengths: expected shape \[B\] = \[3\]"),
        ({}, {"lengths": torch.tensor([96, 97, 1])}, ValueError, r"lengths: expected values in 0..N = 96"),
    ],
)
def test_refused(options: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)(clouds(), **arguments)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adds", ["once", "every"])
def test_attention_of_the_class_token(family: str, adds: str) -> None:
    """What a query of the class token finds, against the product of the whole matrices."""
    model, points = make(family, position_adds=adds), clouds()
    plain = model.encode(points)
    assert plain.attention is None
    encoding = model.encode(points, attention=True)
    assert torch.equal(encoding.feature, plain.feature)
    assert encoding.attention is not None
    assert encoding.attention.shape == (3, 2, 4, 16)

    inputs: list[torch.Tensor] = []
    for block in model.encoder.source.blocks:
        block.attn.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    model(points)
    for layer, (block, x) in enumerate(zip(model.encoder.source.blocks, inputs)):
        q, k, _ = block.attn.qkv(x).view(3, 17, 3, 4, 12).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 12**0.5).softmax(-1)[:, :, 0]
        torch.testing.assert_close(encoding.attention[:, layer], weights[..., 1:])
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4))


def test_attention_is_refused_where_there_is_none() -> None:
    for options in ({"attention_axis": "batch"}, {"causal": True}):
        with pytest.raises(
            ValueError, match="`attention`: expected a class token that attends to its tokens"
        ):
            make(**options).encode(clouds(), attention=True)


def with_registers(count: int = 3) -> Source:
    return dataclasses.replace(make_source("dinov2"), registers=torch.randn(count, 48))


@torch.no_grad()
def test_registers() -> None:
    """They stand behind the class token, the frozen blocks and the bottleneck see them, nothing else does."""
    source, points = with_registers(), clouds()
    model = make(source=source)
    x, position, *_ = model.embed(points)
    assert x.shape == position.shape == (3, 1 + 3 + 16, 48)
    assert source.registers is not None
    torch.testing.assert_close(x[:, 1:4], source.registers.expand(3, 3, 48))
    assert not position[:, 1:4].any()
    seen: dict[str, torch.Size] = {}
    guided = model.encoder.adapters[0]
    guided.register_forward_hook(lambda _module, inputs, _out: seen.update(guided=inputs[0].shape))
    guided.adapter.register_forward_hook(lambda _module, inputs, _out: seen.update(adapter=inputs[0].shape))
    encoding = model.encode(points, attention=True)
    assert (seen["guided"], seen["adapter"]) == ((3, 16, 48), (3, 20, 48))
    assert encoding.tokens.shape == (3, 16, 48)
    assert encoding.attention is not None
    assert encoding.attention.shape == (3, 2, 4, 16)
    close(encoding.feature, torch.cat([encoding.tokens.amax(1), encoding.cls], 1))
    assert (model(points) - make("dinov2")(points)).abs().max() > 1e-3
    close(model(points[1:2]), model(points)[1:2])
    assert "registers" in model.frozen_names
    assert model.part_of("registers") == "source"
    assert "registers" not in dict(model.named_parameters())
    full = make(source=source, tuning="full")
    assert full.registers.requires_grad
    close(full(points), model(points))


@torch.no_grad()
def test_official_attention_over_the_batch_with_registers() -> None:
    assert make(source=with_registers(1), attention_axis="batch")(clouds()).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_source(family: str) -> None:
    model, points = make(family, source_dtype="bfloat16"), clouds()
    types = {p.dtype for n, p in model.named_parameters() if n.startswith("encoder.source") and p.dim() == 2}
    assert types == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.trainable_parameters())
    got, want = model(points), make(family)(points)
    assert got.dtype == torch.float32
    close(got, want, 0.05)
    assert not torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(model(points).float(), want, 0.1)
    F.cross_entropy(model.train()(points), torch.arange(3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trainable_parameters())
