"""Image towers of CLIP against transformers: every block, in the names of Hugging Face and of OpenAI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from own_models import assert_same, assert_same_eps, fuse, perturb, renamed, save, sequence, trace
from torch import Tensor, nn

from any2point.sources import Source

transformers = pytest.importorskip("transformers")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CLIP = SIZE | {"image_size": 24, "patch_size": 8, "layer_norm_eps": 1e-5}


@torch.no_grad()
def check_clip(source: Source, model: nn.Module) -> None:
    tower = getattr(model, "vision_model", model)
    pixels = torch.randn(2, 3, 24, 24)
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    states = trace(lambda: tower(pixels), tower.encoder.layers)
    final = tower.post_layernorm(states[-1])  # which transformers applies to the class token alone
    assert_same_eps(source, tower.encoder.layers[0])
    assert_same(source, sequence(source, patches), states, final)


def openai_names(model: nn.Module) -> dict[str, Tensor]:
    """The state of a Hugging Face image tower under the names of OpenAI."""
    state = {key.removeprefix("vision_model."): value for key, value in model.state_dict().items()}
    for leaf in ("weight", "bias"):
        parts = (f"q_proj.{leaf}", f"k_proj.{leaf}", f"v_proj.{leaf}")
        state = fuse(state, parts, f"in_proj_{leaf}")
    names = {
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers": "transformer.resblocks",
        "self_attn": "attn",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    return renamed(state, names) | {"proj": torch.randn(32, 16)}


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_vision(tmp_path: Path, activation: str) -> None:
    model = perturb(
        transformers.CLIPVisionModel(transformers.CLIPVisionConfig(hidden_act=activation, **CLIP))
    )
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.layout.activation) == ("clip-vision", activation)
    assert source.layout.input_norm
    check_clip(source, model)

    for prefix in ("visual.", ""):
        folder = tmp_path / f"openai{len(prefix)}"
        state = {prefix + key: value for key, value in openai_names(model).items()}
        vision = {"image_size": 24, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
        open_clip = {"vision_cfg": vision, "text_cfg": {"width": 16}, "quick_gelu": False}
        config = {"model_cfg": open_clip} if activation == "gelu" else None
        same = Source.from_checkpoint(save(folder, state, config), heads=None if config else 4)
        assert (same.name, same.fingerprint) == ("clip-vision", source.fingerprint)
        assert same.layout == source.layout
        assert "proj" in same.unused


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clip_vision_of_a_torchscript_archive(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = perturb(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**CLIP)))
    state = {f"visual.{key}": value.half() for key, value in openai_names(model).items()}
    root = Holder()
    for key, value in state.items():
        *path, leaf = key.split(".")
        module: nn.Module = root
        for name in path:
            if not hasattr(module, name):
                module.add_module(name, Holder())
            module = getattr(module, name)
        module.register_parameter(leaf, nn.Parameter(value))
    torch.jit.script(root).save(tmp_path / "ViT-B-16.pt")
    archive = Source.from_checkpoint(tmp_path / "ViT-B-16.pt", heads=4)
    plain = Source.from_checkpoint(save(tmp_path, state) / "weights.pth", heads=4)
    assert (archive.name, archive.fingerprint) == ("clip-vision", plain.fingerprint)


def test_clip_vision_of_a_checkpoint_with_both_towers(tmp_path: Path) -> None:
    text = SIZE | {"vocab_size": 50, "max_position_embeddings": 7, "hidden_act": "gelu"}
    config = transformers.CLIPConfig(vision_config=CLIP, text_config=text)
    model = perturb(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path, "clip-vision")
    assert (source.name, source.heads, source.layout.activation) == ("clip-vision", 4, "quick_gelu")
    check_clip(source, model)
