"""The frozen encoder: activations, bias of keys and values, half precision weights, hidden states."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.sources import Layout, Source
from any2point.sources.encoder import Attention, FrozenEncoder

C, HEADS = 32, 4


def make_source(seed: int = 0, **layout: object) -> Source:
    """Two blocks in which no bias is zero and no gain is one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = Layout(**layout)  # type: ignore[arg-type]
    shapes = FrozenEncoder(C, 2, HEADS, 48, chosen).state_dict()
    tensors = {name: 0.3 * torch.randn(v.shape, generator=generator) for name, v in shapes.items()}
    table = torch.randn(7, C, generator=generator)
    return Source("bert", "language", C, 2, HEADS, chosen, tensors, table)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", nn.GELU()),
        ("gelu_tanh", nn.GELU("tanh")),
        ("quick_gelu", lambda y: y * torch.sigmoid(1.702 * y)),
        ("relu", nn.ReLU()),
        ("swiglu", lambda y: F.silu(y[..., :48]) * y[..., 48:]),
    ],
)
def test_activations(activation: str, function: object) -> None:
    source = make_source(activation=activation)
    assert source.mlp_width == 48
    mlp, x = source.encoder().blocks[0].mlp, tokens(2, 3, C)
    torch.testing.assert_close(mlp(x), mlp.fc2(function(mlp.fc1(x))))  # type: ignore[operator]


def test_unknown_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`activation`: expected one of gelu, .*, got 'silu'"):
        Layout(activation="silu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`norm`: expected pre or post, got 'both'"):
        Layout(norm="both")  # type: ignore[arg-type]
    for eps in (0, -1e-6, float("nan"), float("inf"), "1e-6", None, True):
        with pytest.raises(ValueError, match=f"`eps`: expected a positive number, got {eps!r}"):
            Layout(eps=eps)  # type: ignore[arg-type]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", ["tokens", "batch"])
def test_bias_of_keys_and_values_is_that_of_torch(axis: str, causal: bool) -> None:
    ours = make_source(bias_kv=True).encoder().blocks[0].attn
    theirs = nn.MultiheadAttention(C, HEADS, add_bias_kv=True, batch_first=axis == "tokens")
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
        theirs.bias_k.copy_(ours.bias_k.view(1, 1, C))
        theirs.bias_v.copy_(ours.bias_v.view(1, 1, C))
    x = tokens(3, 5, C)
    length = 5 if axis == "tokens" else 3
    mask = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    want = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x, axis=axis, causal=causal), want, rtol=1e-5, atol=1e-5)
    plain = Attention(C, HEADS)
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("bias_")})
    assert (plain(x, axis=axis, causal=causal) - want).abs().max() > 1e-3


@pytest.mark.parametrize("layout", [{}, {"norm": "post", "input_norm": True}, {"bias_kv": True}])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_weights(layout: dict, autocast: bool) -> None:
    source = make_source(layer_scale=True, **layout)
    encoder, exact = source.encoder(torch.bfloat16), source.encoder()
    for name, parameter in encoder.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if ".attn." in name or ".mlp." in name else torch.float32)
    x = tokens(2, 5, C).requires_grad_()
    want = exact(x)
    adapter = nn.Linear(C, C)  # trained, in float32
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = encoder(x)
        assert encoder.blocks[0](x, adapter).dtype == torch.float32
    assert got.dtype == torch.float32
    error = (got - want).norm() / want.norm()
    assert 0 < error < 0.02
    got.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert encoder(x.detach().bfloat16()).dtype == torch.bfloat16


def test_encoder_shares_memory_and_checks_its_type() -> None:
    source = make_source()
    weight = source.encoder().blocks[0].attn.qkv.weight
    assert weight.data_ptr() == source.tensors["blocks.0.attn.qkv.weight"].data_ptr()
    with pytest.raises(ValueError, match="`dtype`: expected a floating point type"):
        source.encoder(torch.int8)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_one_graph_and_shapes_without_memory(dtype: torch.dtype | None) -> None:
    encoder, x = make_source(bias_kv=True).encoder(dtype), tokens(2, 5, C)
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), encoder(x))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(x), encoder(x))
    torch._dynamo.reset()
    assert encoder.to("meta")(x.to("meta")).shape == x.shape


def test_hidden_states() -> None:
    encoder = make_source(norm="post", input_norm=True).encoder()
    x = tokens(2, 5, C)
    states = encoder.hidden_states(x, causal=True)
    assert len(states) == 3
    torch.testing.assert_close(states[0], encoder.input_norm(x))
    torch.testing.assert_close(states[2], encoder.blocks[1](states[1], causal=True))
    assert torch.equal(states[-1], encoder(x, causal=True))


def test_registers_are_part_of_the_source() -> None:
    plain = make_source(bias_kv=True)
    source = dataclasses.replace(plain, registers=tokens(4, C), position_kind="sinusoidal")
    assert source.fingerprint != plain.fingerprint
    assert "registers" not in plain.state_dict()
    copy = Source.from_state_dict(json.loads(json.dumps(source.describe())), source.state_dict())
    assert torch.equal(copy.registers, source.registers)
    assert copy.position_kind == "sinusoidal"
    assert copy.layout.bias_kv
    assert copy.fingerprint == source.fingerprint
    with pytest.raises(ValueError, match=r"`registers`: expected \[R, 32\], got \[4, 8\]"):
        dataclasses.replace(plain, registers=tokens(4, 8))
    with pytest.raises(ValueError, match="`position_kind`: expected one of learned"):
        dataclasses.replace(plain, position_kind="relative")


def test_descriptions_written_before_registers_still_load() -> None:
    source = make_source()
    old = source.describe()
    del old["position_kind"], old["layout"]["bias_kv"]
    copy = Source.from_state_dict(old, source.state_dict())
    assert copy.registers is None
    assert copy.position_kind == "learned"
    assert copy.fingerprint == source.fingerprint
