"""Audio sources against transformers, timm and, for ImageBind, its trunk built from torch's own layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from own_models import assert_same, assert_same_eps, assert_same_vit, perturb, renamed, save, sequence, trace
from timm_models import load_timm
from torch import Tensor, nn

from any2point.sources import Source
from any2point.sources._layouts import sinusoid

transformers = pytest.importorskip("transformers")
C = 32
SIZE = {"hidden_size": C, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


class Block(nn.Module):
    """A block of ImageBind's audio trunk, tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, 4, bias=True, add_bias_kv=True)
        self.norm_1 = nn.LayerNorm(C, 1e-6)
        self.norm_2 = nn.LayerNorm(C, 1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, 4 * C), "fc2": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm_2(x))))


class Audio(nn.Module):
    """ImageBind's path of audio up to the final norm, with the names of its checkpoint."""

    def __init__(self, patches: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, C))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, C))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(C, 1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed
        return self.norm(self.blocks(x.transpose(0, 1)).transpose(0, 1))

    def checkpoint(self) -> dict[str, Tensor]:
        stem = "modality_preprocessors.audio."
        names = {
            "cls_token": f"{stem}cls_token",
            "pos_embed": f"{stem}pos_embedding_helper.pos_embed",
            "blocks.": "modality_trunks.audio.blocks.",
        }
        state = {f"modality_heads.audio.0.{leaf}": getattr(self.norm, leaf) for leaf in ("weight", "bias")}
        state |= {
            f"{stem}rgbt_stem.proj.weight": torch.randn(C, 1, 16, 16),
            "modality_heads.audio.2.weight": torch.randn(8, C),
        }
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("norm.")}
        return state | renamed(own, names)


@pytest.mark.parametrize("columns", [19, 5])
def test_imagebind(tmp_path: Path, columns: int) -> None:
    model = perturb(Audio(12 * columns))
    audio = model.checkpoint()
    other = renamed(audio, {"audio": "thermal"})
    other["modality_trunks.vision.blocks.0.attn.in_proj_weight"] = torch.randn(3, 3)
    source = Source.from_checkpoint(save(tmp_path, audio | other), heads=4)
    assert (source.name, source.modality, source.depth) == ("imagebind", "audio", 2)
    assert source.layout.bias_kv
    assert torch.equal(source.position_table, model.pos_embed[0, 1:].view(12, columns, C))
    assert torch.equal(source.cls_position, model.pos_embed[0, 0])
    assert_same_eps(source, model.blocks[0])
    tokens = torch.randn(2, 12 * columns, C)
    states = trace(lambda: model(tokens), model.blocks, model.norm)
    final = states.pop()
    assert_same(source, sequence(source, tokens), [x.transpose(0, 1) for x in states], final)

    alone = Source.from_checkpoint(save(tmp_path, audio), heads=4)
    assert (alone.name, alone.fingerprint) == ("imagebind", source.fingerprint)


def test_imagebind_needs_the_added_keys_and_values(tmp_path: Path) -> None:
    state = perturb(Audio(12 * 5)).checkpoint()
    with_bias = Source.from_checkpoint(save(tmp_path, state), heads=4)
    x = torch.randn(1, 4, C)
    for leaf in ("bias_k", "bias_v"):
        changed = dict(state)
        changed[f"modality_trunks.audio.blocks.1.attn.{leaf}"] = torch.zeros(1, 1, C)
        other = Source.from_checkpoint(save(tmp_path, changed), heads=4)
        assert (other.encoder()(x) - with_bias.encoder()(x)).abs().max() > 1e-3


@pytest.mark.parametrize("head", [False, True])
def test_ast_of_transformers(tmp_path: Path, head: bool) -> None:
    audio = {"patch_size": 8, "num_mel_bins": 32, "max_length": 64, "frequency_stride": 5, "time_stride": 6}
    config = transformers.ASTConfig(**SIZE, **audio)
    model = transformers.ASTForAudioClassification(config) if head else transformers.ASTModel(config)
    perturb(model).save_pretrained(tmp_path)
    inner = model.audio_spectrogram_transformer if head else model
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.modality, len(source.registers)) == ("ast", "audio", 1)
    assert source.position_table.shape == (5, 10, C)
    spectrogram = torch.randn(2, 64, 32)
    assert_same_vit(
        source,
        lambda: inner(spectrogram),
        stem=inner.embeddings.patch_embeddings,
        blocks=inner.layers,
        norm=inner.layernorm,
    )


def test_ast_without_config_has_rows_of_frequencies(tmp_path: Path) -> None:
    config = transformers.ASTConfig(**(SIZE | {"num_hidden_layers": 1}))
    model = transformers.ASTModel(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    source = Source.from_checkpoint(tmp_path, heads=4)
    assert source.name == "ast"
    assert torch.equal(source.position_table, model.embeddings.position_embeddings[0, 2:].view(12, 101, C))
    state = {key: value for key, value in model.state_dict().items() if "position" not in key}
    state["embeddings.position_embeddings"] = torch.randn(1, 2 + 8 * 64, C)  # patches side by side
    (tmp_path / "model.safetensors").unlink()
    assert Source.from_checkpoint(save(tmp_path, state), heads=4).position_table.shape == (8, 64, C)


def test_a_spectrogram_of_other_bands_is_refused(tmp_path: Path) -> None:
    state = perturb(Audio(5 * 5)).checkpoint()  # a square, but not of 12 rows
    with pytest.raises(ValueError, match="expected 12 rows of frequencies in the position table, got 25"):
        Source.from_checkpoint(save(tmp_path, state), heads=4)
    config = transformers.ASTConfig(**(SIZE | {"num_hidden_layers": 1}))
    transformers.ASTModel(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_length": 512}))
    with pytest.raises(ValueError, match=r"or 2 \+ 12\*50 rows of positions, got 1214"):
        Source.from_checkpoint(tmp_path)


class Patches(nn.Module):
    """Patches of a spectrogram of one channel `[B, 1, F, T]`, frequency rows first."""

    def __init__(self, shape: tuple[int, int], stride: tuple[int, int]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, C, shape, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def spectrogram_deit(patches: Patches, count: int, distilled: bool = True) -> nn.Module:
    """timm's DeiT as AST and SSAST change it: one channel and a table of another size."""
    load_timm()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    build = VisionTransformerDistilled if distilled else VisionTransformer
    model = build(img_size=32, patch_size=16, embed_dim=C, depth=2, num_heads=4, num_classes=3)
    model.patch_embed = patches
    model.pos_embed = nn.Parameter(torch.zeros(1, (2 if distilled else 1) + count, C))
    return perturb(model)


def check_deit(source: Source, model: nn.Module, spectrogram: Tensor) -> None:
    assert_same_vit(
        source,
        lambda: model.forward_features(spectrogram),
        stem=model.patch_embed,
        blocks=model.blocks,
        norm=model.norm,
    )


def test_ast_of_the_official_code(tmp_path: Path) -> None:
    model = spectrogram_deit(Patches((16, 16), (10, 10)), 12 * 3)
    state = {f"module.v.{key}": value for key, value in model.state_dict().items()}
    state["module.mlp_head.0.weight"] = torch.ones(C)
    source = Source.from_checkpoint(save(tmp_path, state), heads=4)
    assert (source.name, source.position_table.shape) == ("ast", (12, 3, C))
    check_deit(source, model, torch.randn(2, 1, 128, 44))
    told = Source.from_checkpoint(tmp_path, "ssast", heads=4)
    assert (told.name, told.fingerprint) == ("ssast", source.fingerprint)


@pytest.mark.parametrize("distilled", [True, False])
@pytest.mark.parametrize(
    ("shape", "size", "grid"),
    [((16, 16), (128, 64), (8, 4)), ((128, 2), (128, 16), (8,)), ((8, 16), (24, 80), (3, 5))],
)
def test_ssast(
    tmp_path: Path, shape: tuple[int, int], size: tuple[int, int], grid: tuple[int, ...], distilled: bool
) -> None:
    count = size[0] // shape[0] * (size[1] // shape[1])
    model = spectrogram_deit(Patches(shape, shape), count, distilled)
    state = {f"module.v.{key}": value for key, value in model.state_dict().items()}
    state |= {
        "module.p_input_fdim": torch.tensor(size[0]),
        "module.p_input_tdim": torch.tensor(size[1]),
        "module.mask_embed": torch.randn(1, 1, C),
        "module.cpredlayer.0.weight": torch.randn(C, C),
    }
    source = Source.from_checkpoint(save(tmp_path, state), heads=4)
    assert (source.name, source.modality) == ("ssast", "audio")
    assert source.position_table.shape == (*grid, C)
    assert (source.registers is not None) == distilled
    check_deit(source, model, torch.randn(2, 1, *size))


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        d_model=C,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        vocab_size=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        max_source_positions=20,
    )
    return perturb(transformers.WhisperForConditionalGeneration(config))


def check_whisper(source: Source, encoder: nn.Module) -> None:
    assert_same_eps(source, encoder.layers[0])
    mel = torch.randn(2, 80, 40)
    with torch.no_grad():
        tokens = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).transpose(1, 2)
    states = trace(lambda: encoder(mel), encoder.layers, encoder.layer_norm)
    final = states.pop()
    assert_same(source, sequence(source, tokens), states, final)


def test_whisper_of_transformers(tmp_path: Path) -> None:
    model = whisper()
    encoder = model.model.encoder
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.modality, source.heads) == ("whisper", "audio", 4)
    assert (source.position_kind, source.has_cls) == ("sinusoidal", False)
    assert torch.equal(source.position_table, encoder.embed_positions.weight)
    assert not source.tensors["blocks.0.attn.qkv.bias"][C : 2 * C].any()  # of the keys
    check_whisper(source, encoder)

    alone = tmp_path / "encoder"
    state = {key: value for key, value in encoder.state_dict().items() if "embed_positions" not in key}
    config = {"encoder_attention_heads": 4, "max_source_positions": 20}
    computed = Source.from_checkpoint(save(alone, state, config))
    torch.testing.assert_close(computed.position_table, source.position_table, rtol=0, atol=1e-5)
    check_whisper(computed, encoder)


def test_whisper_of_openai(tmp_path: Path) -> None:
    model = whisper()
    encoder = model.model.encoder
    names = {
        "layers.": "blocks.",
        "self_attn.q_proj": "attn.query",
        "self_attn.k_proj": "attn.key",
        "self_attn.v_proj": "attn.value",
        "self_attn.out_proj": "attn.out",
        "self_attn_layer_norm": "attn_ln",
        "final_layer_norm": "mlp_ln",
        "fc1": "mlp.0",
        "fc2": "mlp.2",
        "layer_norm": "ln_post",
        "embed_positions.weight": "positional_embedding",
    }
    state = {f"encoder.{key}": value for key, value in renamed(encoder.state_dict(), names).items()}
    state["decoder.token_embedding.weight"] = torch.randn(20, C)
    saved = {"dims": {"n_audio_head": 4, "n_audio_state": C}, "model_state_dict": state}
    source = Source.from_checkpoint(save(tmp_path, saved), heads=4)
    assert source.name == "whisper"
    check_whisper(source, encoder)


def test_the_sinusoid_is_whispers() -> None:
    from transformers.models.whisper.modeling_whisper import sinusoids

    torch.testing.assert_close(sinusoid(1500, 64), sinusoids(1500, 64), rtol=0, atol=2e-4)


@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("family", ["wav2vec2", "hubert"])
def test_wav2vec2_and_hubert(tmp_path: Path, family: str, stable: bool) -> None:
    name = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert"}[family]
    speech = {"conv_dim": (16, 16), "conv_kernel": (4, 2), "conv_stride": (4, 2)}
    speech |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "vocab_size": 9}
    form = {"do_stable_layer_norm": stable, "feat_extract_norm": "layer" if stable else "group"}
    config = getattr(transformers, f"{name}Config")(**SIZE, **speech, **form, attn_implementation="eager")
    whole = perturb(getattr(transformers, f"{name}ForCTC")(config))
    model = getattr(whole, family)
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.modality) == (family, "audio")
    assert (source.position_kind, source.has_cls) == ("stand-in", False)
    assert source.layout.norm == ("pre" if stable else "post")
    assert torch.equal(source.position_table, sinusoid(1500, C))
    assert_same_eps(source, model.encoder.layers[0])
    wave = torch.randn(2, 200)
    summed: list[Tensor] = []  # features + their convolution: what the norm of the base form takes
    hook = model.encoder.layer_norm.register_forward_pre_hook(lambda _, inputs: summed.append(inputs[0]))
    states = trace(lambda: model(wave), model.encoder.layers, model.encoder.layer_norm)
    hook.remove()
    normed = states.pop()
    if stable:
        assert_same(source, states[0], states, normed)
    else:
        assert_same(source, summed[0], states)

    (tmp_path / "config.json").unlink()  # the form shows in the feature extractor, the family does not
    bare = Source.from_checkpoint(tmp_path, heads=4)
    assert (bare.name, bare.fingerprint, bare.layout) == ("wav2vec2", source.fingerprint, source.layout)
    with pytest.raises(ValueError, match="`heads`: expected a number in heads= or as num_attention_heads"):
        Source.from_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    prefixed = Source.from_checkpoint(save(tmp_path, whole.state_dict()), heads=4)
    assert (prefixed.name, prefixed.fingerprint) == (family, source.fingerprint)


def test_wavlm_is_refused(tmp_path: Path) -> None:
    speech = {"conv_dim": (16,), "conv_kernel": (4,), "conv_stride": (4,), "num_feat_extract_layers": 1}
    speech |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    transformers.WavLMModel(transformers.WavLMConfig(**SIZE, **speech)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="blocks of this family have no tensor such as 'layers"):
        Source.from_checkpoint(tmp_path)
