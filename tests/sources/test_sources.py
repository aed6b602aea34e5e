"""Sources: recognition, layouts, round trips, broken files; the encoder against torch's own layers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.sources import FAMILIES, Layout, Source
from any2point.sources.encoder import FrozenEncoder, drop_path

safetensors = pytest.importorskip("safetensors.torch")

C, DEPTH = 16, 2


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def linear(name: str, inside: int, outside: int) -> dict[str, Tensor]:
    return {f"{name}.weight": normal(outside, inside), f"{name}.bias": normal(outside)}


def norm(name: str) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * normal(C), f"{name}.bias": normal(C)}


def clip_state() -> dict[str, Tensor]:
    state = {
        "positional_embedding": normal(7, C),
        "token_embedding.weight": normal(30, C),
        "text_projection": normal(C, C),
        "logit_scale": torch.tensor(4.6),
        "visual.transformer.resblocks.0.attn.in_proj_weight": normal(3, 3),
        "visual.positional_embedding": normal(3, 3),
    }
    for i in range(DEPTH):
        block = f"transformer.resblocks.{i}"
        state |= {
            f"{block}.attn.in_proj_weight": normal(3 * C, C),
            f"{block}.attn.in_proj_bias": normal(3 * C),
        }
        state |= linear(f"{block}.attn.out_proj", C, C) | norm(f"{block}.ln_1") | norm(f"{block}.ln_2")
        state |= linear(f"{block}.mlp.c_fc", C, 4 * C) | linear(f"{block}.mlp.c_proj", 4 * C, C)
    return state | norm("ln_final")


def bert_state(prefix: str = "") -> dict[str, Tensor]:
    state = {
        "embeddings.position_embeddings.weight": normal(12, C),
        "embeddings.token_type_embeddings.weight": normal(2, C),
        "embeddings.word_embeddings.weight": normal(130, C),
        "embeddings.position_ids": torch.arange(12)[None],
    }
    state |= norm("embeddings.LayerNorm")
    for i in range(DEPTH):
        layer = f"encoder.layer.{i}"
        for part in ("query", "key", "value"):
            state |= linear(f"{layer}.attention.self.{part}", C, C)
        state |= linear(f"{layer}.attention.output.dense", C, C) | norm(f"{layer}.attention.output.LayerNorm")
        state |= linear(f"{layer}.intermediate.dense", C, 4 * C) | linear(f"{layer}.output.dense", 4 * C, C)
        state |= norm(f"{layer}.output.LayerNorm")
    return {prefix + name: value for name, value in (state | linear("pooler.dense", C, C)).items()}


def dino_state() -> dict[str, Tensor]:
    state = {
        "pos_embed": normal(1, 10, C),
        "cls_token": normal(1, 1, C),
        "mask_token": normal(1, C),
        "patch_embed.proj.weight": normal(C, 3, 14, 14),
    }
    for i in range(DEPTH):
        block = f"blocks.{i}"
        state |= norm(f"{block}.norm1") | norm(f"{block}.norm2")
        state |= linear(f"{block}.attn.qkv", C, 3 * C) | linear(f"{block}.attn.proj", C, C)
        state |= linear(f"{block}.mlp.fc1", C, 4 * C) | linear(f"{block}.mlp.fc2", 4 * C, C)
        state |= {f"{block}.ls1.gamma": normal(C), f"{block}.ls2.gamma": normal(C)}
    return state | norm("norm")


def dino_hf_state(hub: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network under the names of Hugging Face."""
    state = {
        "embeddings.position_embeddings": hub["pos_embed"],
        "embeddings.cls_token": hub["cls_token"],
        "layernorm.weight": hub["norm.weight"],
        "layernorm.bias": hub["norm.bias"],
    }
    for i in range(DEPTH):
        old, new = f"blocks.{i}", f"encoder.layer.{i}"
        for leaf in ("weight", "bias"):
            parts = hub[f"{old}.attn.qkv.{leaf}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts):
                state[f"{new}.attention.attention.{name}.{leaf}"] = part.contiguous()
            state[f"{new}.attention.output.dense.{leaf}"] = hub[f"{old}.attn.proj.{leaf}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{layer}.{leaf}"] = hub[f"{old}.{layer}.{leaf}"]
        for number in (1, 2):
            state[f"{new}.layer_scale{number}.lambda1"] = hub[f"{old}.ls{number}.gamma"]
    return state


def write(path: Path, state: dict[str, Tensor], config: dict | None = None) -> Path:
    safetensors.save_file(state, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def run(source: Source, x: Tensor) -> Tensor:
    with torch.no_grad():
        return source.encoder()(x)


def test_clip_text(tmp_path: Path) -> None:
    state = clip_state()
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "clip.pt")
    source = Source.from_checkpoint(tmp_path / "clip.pt", heads=4)
    assert (source.name, source.modality, source.width, source.depth) == ("clip-text", "language", C, DEPTH)
    assert source.position_table.dtype == torch.float32
    assert torch.equal(source.position_table, state["positional_embedding"].half().float())
    assert not source.has_cls
    assert {"text_projection", "logit_scale", "visual.positional_embedding"} <= set(source.unused)

    x = want = normal(3, 5, C)
    for i in range(DEPTH):  # torch's own attention, as in the original
        block = f"transformer.resblocks.{i}"
        weights = {
            k.removeprefix(f"{block}."): v.half().float() for k, v in state.items() if k.startswith(block)
        }
        attention = nn.MultiheadAttention(C, 4, batch_first=True)
        attention.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith("attn.")})
        with torch.no_grad():
            y = F.layer_norm(want, (C,), weights["ln_1.weight"], weights["ln_1.bias"])
            want = want + attention(y, y, y)[0]
            y = F.layer_norm(want, (C,), weights["ln_2.weight"], weights["ln_2.bias"])
            y = F.linear(y, weights["mlp.c_fc.weight"], weights["mlp.c_fc.bias"])
            y = y * torch.sigmoid(1.702 * y)
            want = want + F.linear(y, weights["mlp.c_proj.weight"], weights["mlp.c_proj.bias"])
    torch.testing.assert_close(run(source, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_bert(tmp_path: Path, prefix: str) -> None:
    state = bert_state(prefix)
    config = {"num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    source = Source.from_checkpoint(write(tmp_path, state, config))
    assert (source.name, source.width, source.depth, source.heads) == ("bert", C, DEPTH, 2)
    take = {name.removeprefix(prefix): value for name, value in state.items()}
    position = take["embeddings.position_embeddings.weight"]
    table = position + take["embeddings.token_type_embeddings.weight"][0]
    assert torch.equal(source.position_table, table)
    assert torch.equal(source.cls_token, take["embeddings.word_embeddings.weight"][101])
    assert torch.equal(source.cls_position, table[0])

    # token + position through torch's post-norm layers
    tokens = normal(3, 5, C)
    weight, bias = take["embeddings.LayerNorm.weight"], take["embeddings.LayerNorm.bias"]
    want = F.layer_norm(tokens + table[:5], (C,), weight, bias, 1e-12)
    for i in range(DEPTH):
        layer = nn.TransformerEncoderLayer(
            C, 2, 4 * C, activation="gelu", layer_norm_eps=1e-12, batch_first=True, dropout=0.0
        ).eval()
        at = f"encoder.layer.{i}"
        parts = [f"{at}.attention.self.{part}" for part in ("query", "key", "value")]
        names = {
            "self_attn.in_proj_weight": torch.cat([take[f"{part}.weight"] for part in parts]),
            "self_attn.in_proj_bias": torch.cat([take[f"{part}.bias"] for part in parts]),
        }
        for ours, theirs in {
            "attention.output.dense": "self_attn.out_proj",
            "attention.output.LayerNorm": "norm1",
            "intermediate.dense": "linear1",
            "output.dense": "linear2",
            "output.LayerNorm": "norm2",
        }.items():
            names |= {f"{theirs}.{leaf}": take[f"{at}.{ours}.{leaf}"] for leaf in ("weight", "bias")}
        layer.load_state_dict(names)
        with torch.no_grad():
            want = layer(want)
    torch.testing.assert_close(run(source, tokens + table[:5]), want, rtol=1e-4, atol=1e-4)


def test_dinov2_of_both_namings(tmp_path: Path) -> None:
    state = dino_state()
    for folder in ("hub", "hf"):
        (tmp_path / folder).mkdir()
    torch.save({"teacher": {f"backbone.{k}": v for k, v in state.items()}}, tmp_path / "hub" / "dino.pth")
    hub = Source.from_checkpoint(tmp_path / "hub", heads=4)
    config = {"num_attention_heads": 4}
    hf = Source.from_checkpoint(write(tmp_path / "hf", dino_hf_state(state), config))
    assert hub.fingerprint == hf.fingerprint
    assert (hf.name, hf.modality, hf.depth, hf.heads) == ("dinov2", "vision", DEPTH, 4)
    assert torch.equal(hub.position_table, state["pos_embed"][0, 1:].view(3, 3, C))
    assert torch.equal(hub.cls_position, state["pos_embed"][0, 0])
    assert hub.has_cls
    assert "mask_token" in hub.unused

    x = want = normal(2, 5, C)
    for i in range(DEPTH):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(want, (C,), w["norm1.weight"], w["norm1.bias"], 1e-6)
        q, k, v = (
            F.linear(y, w["attn.qkv.weight"], w["attn.qkv.bias"]).view(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
        )
        y = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, C)
        want = want + w["ls1.gamma"] * F.linear(y, w["attn.proj.weight"], w["attn.proj.bias"])
        y = F.layer_norm(want, (C,), w["norm2.weight"], w["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, w["mlp.fc1.weight"], w["mlp.fc1.bias"]))
        want = want + w["ls2.gamma"] * F.linear(y, w["mlp.fc2.weight"], w["mlp.fc2.bias"])
    torch.testing.assert_close(run(hub, x), want, rtol=1e-4, atol=1e-4)


def test_fewer_blocks(tmp_path: Path) -> None:
    source = Source.from_checkpoint(write(tmp_path, dino_state()), depth=1)
    assert source.depth == 1
    again = Source.from_origin(source.describe())
    assert again.fingerprint == source.fingerprint
    with pytest.raises(ValueError, match="`depth`: expected 1 to 2 blocks, got 3"):
        Source.from_checkpoint(tmp_path, depth=3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_random(family: str) -> None:
    source = Source.random(family, width=32, depth=2, heads=4, seed=3)
    again = Source.from_origin(source.describe())
    other = Source.random(family, width=32, depth=2, heads=4, seed=4)
    assert source.fingerprint == again.fingerprint != other.fingerprint
    copy = Source.from_state_dict(json.loads(json.dumps(source.describe())), source.state_dict())
    assert copy.fingerprint == source.fingerprint
    assert copy.layout == source.layout
    x = normal(2, 5, 32)
    assert run(source, x).isfinite().all()
    with pytest.raises(ValueError, match="`positions`: expected"):
        Source.random(family, width=32, depth=1, positions=(2, 2, 2))


def test_full_size_random_sources_have_the_published_shapes() -> None:
    shapes = {name: (f.width, f.depth, f.positions) for name, f in FAMILIES.items()}
    assert shapes["clip-text"] == (768, 12, (77,))
    assert shapes["dinov2"] == (768, 12, (37, 37))


def test_broken_files_give_one_clear_line(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    write(good, dino_state())
    data = (good / "model.safetensors").read_bytes()
    torch.save(dino_state(), tmp_path / "good.pth")
    saved = (tmp_path / "good.pth").read_bytes()
    broken = {
        "empty.safetensors": b"",
        "short.safetensors": data[:100],
        "truncated.safetensors": data[:-1000],
        "truncated.pth": saved[: len(saved) // 2],
        "foreign.pth": b"PK not really a zip file",
        "foreign.bin": bytes(range(256)) * 8,
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"`path`.*{name}") as error:
            Source.from_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)

    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")  # needs code to be executed
    with pytest.raises(ValueError, match=r"cannot read .*module\.pt"):
        Source.from_checkpoint(tmp_path / "module.pt")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("script/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"expected one data\.pkl, got 0"):
        Source.from_checkpoint(tmp_path / "script.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected a dictionary of tensors"):
        Source.from_checkpoint(tmp_path / "list.pt")
    torch.save({"a": {"b": 1}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no tensors in"):
        Source.from_checkpoint(tmp_path / "none.pt")
    torch.save({"layer.weight": normal(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"no known family \(clip-text.*such as layer.weight"):
        Source.from_checkpoint(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no file or folder"):
        Source.from_checkpoint(tmp_path / "nowhere")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="expected one checkpoint file in"):
        Source.from_checkpoint(tmp_path / "nothing")


def test_incomplete_and_contradictory_checkpoints(tmp_path: Path) -> None:
    state = dino_state()
    del state["blocks.1.mlp.fc2.bias"]
    with pytest.raises(ValueError, match=r"tensor 'blocks\.1\.mlp\.fc2\.bias' is missing"):
        Source.from_checkpoint(write(tmp_path, state))
    state = dino_state()
    state["blocks.1.mlp.fc2.weight"] = normal(C, 3)
    with pytest.raises(ValueError, match=r"expected shape \[16, 64\] for 'blocks.1.mlp.fc2.weight'"):
        Source.from_checkpoint(write(tmp_path, state))
    state = dino_state()
    state["pos_embed"] = normal(1, 8, C)
    with pytest.raises(ValueError, match=r"expected 1 \+ n\*n or n\*n rows of positions, got 8"):
        Source.from_checkpoint(write(tmp_path, state))
    with pytest.raises(ValueError, match="`heads`: expected a number in heads= or as num_attention_heads"):
        Source.from_checkpoint(write(tmp_path, bert_state()))
    with pytest.raises(ValueError, match="`heads`: expected a divisor"):
        Source.from_checkpoint(write(tmp_path, bert_state()), heads=5)
    with pytest.raises(ValueError, match=r"expected hidden_act in config\.json to be one of gelu"):
        Source.from_checkpoint(
            write(tmp_path, bert_state(), {"num_attention_heads": 2, "hidden_act": "selu"})
        )
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*config\.json"):
        Source.from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="`family`: expected one of clip-text"):
        Source.random("gpt")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="expected CLIP's text tower"):
        Source.from_checkpoint(write(tmp_path, dino_state()), "clip-text")


def test_encoder_is_frozen_but_lets_gradients_through() -> None:
    encoder = Source.random("bert", width=16, depth=2, heads=2).encoder()
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    x = normal(1, 3, 16).requires_grad_()
    encoder(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_attention_axes_and_causal_mask() -> None:
    encoder = FrozenEncoder(16, 1, 2, 32, Layout())
    block, x = encoder.blocks[0], normal(3, 5, 16)
    batch = block(x, axis="batch")
    tokens = block(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(batch, tokens)
    later = torch.cat([x[:, :-1], normal(3, 1, 16)], dim=1)
    causal = block(x, causal=True)
    torch.testing.assert_close(block(later, causal=True)[:, :-1], causal[:, :-1])
    assert (block(later)[:, :-1] - block(x)[:, :-1]).abs().max() > 1e-6


def test_drop_path_is_per_sample_and_unbiased() -> None:
    dropped = drop_path(torch.ones(2000, 3, 2), 0.25)
    assert (dropped == dropped[:, :1, :1]).all()
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
