"""Vision sources against transformers and timm: every block, positions, class token, registers, last norm."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from own_models import assert_same_vit, perturb, renamed, save
from timm_models import load_timm
from torch import Tensor, nn

from any2point.sources import Source

transformers = pytest.importorskip("transformers")
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = {"intermediate_size": 48}


def images(height: int = 24, width: int = 24) -> Tensor:
    return torch.randn(2, 3, height, width)


def check_hf(source: Source, model: nn.Module, pixels: Tensor, **options: Any) -> None:
    layers = model.encoder.layer if hasattr(model, "encoder") else model.layers
    assert_same_vit(
        source,
        lambda: model(pixels, **options),
        stem=model.embeddings.patch_embeddings,
        blocks=layers,
        norm=model.layernorm,
    )


def check_timm(source: Source, model: nn.Module, pixels: Tensor) -> None:
    norm = model.norm if isinstance(model.norm, nn.LayerNorm) else None
    assert_same_vit(
        source,
        lambda: model.forward_features(pixels),
        stem=model.patch_embed,
        blocks=model.blocks,
        norm=norm,
    )


def timm_vit(**options: Any) -> nn.Module:
    load_timm()
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = VisionTransformer(**(sizes | options))
    return model if options.get("device") == "meta" else perturb(model)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_transformers(tmp_path: Path, registers: int, swiglu: bool) -> None:
    options = SIZE | {"image_size": 24, "patch_size": 8, "mlp_ratio": 2, "use_swiglu_ffn": swiglu}
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=registers, **options)
        model = perturb(transformers.Dinov2WithRegistersModel(config))
    else:
        model = perturb(transformers.Dinov2Model(transformers.Dinov2Config(**options)))
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.modality, source.heads) == ("dinov2", "vision", 4)
    assert source.layout.activation == ("swiglu" if swiglu else "gelu")
    table = model.embeddings.position_embeddings[0]
    assert torch.equal(source.position_table, table[1:].view(3, 3, 32))
    assert torch.equal(source.cls_position, table[0])
    assert (source.registers is not None) == bool(registers)
    if registers:  # they have no positions
        assert torch.equal(source.registers, model.embeddings.register_tokens[0])
    check_hf(source, model, images())
    with pytest.raises(ValueError, match="expected a ViT, but no tensors are named"):
        Source.from_checkpoint(tmp_path, "vit")

    in_memory = tmp_path / "state"  # the names of the modules, which are not those of the files
    same = Source.from_checkpoint(save(in_memory, model.state_dict()), heads=4)
    assert (same.name, same.fingerprint, same.layout) == (source.name, source.fingerprint, source.layout)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_timm_and_of_the_hub(tmp_path: Path, registers: int, swiglu: bool) -> None:
    load_timm()
    from timm.layers import SwiGLUPacked
    from timm.models.vision_transformer import checkpoint_filter_fn

    options: dict[str, Any] = {"init_values": 1e-5, "reg_tokens": registers, "num_classes": 0}
    options |= {"no_embed_class": bool(registers), "mlp_ratio": 2}
    if swiglu:
        options |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
    model = timm_vit(**options)
    source = Source.from_checkpoint(save(tmp_path, model.state_dict()), heads=4)
    assert source.name == "dinov2"
    assert source.layout.activation == ("swiglu" if swiglu else "gelu")
    if registers:
        assert torch.equal(source.position_table, model.pos_embed[0].view(3, 3, 32))
        assert not source.cls_position.any()  # timm has added it to the class token
    check_timm(source, model, images())

    # The hub's file, which timm reads as well: a row for the class token, none for the registers.
    hub = model.state_dict() | {"mask_token": torch.randn(1, 32)}
    hub = renamed(hub, {"reg_token": "register_tokens"})
    if swiglu:
        hub = renamed(hub, {"mlp.fc1": "mlp.w12", "mlp.fc2": "mlp.w3"})
    hub["pos_embed"] = torch.randn(1, 10, 32)
    model.load_state_dict(checkpoint_filter_fn(dict(hub), model))
    source = Source.from_checkpoint(save(tmp_path, {"teacher": renamed(hub, {"": ""})}), heads=4)
    assert source.name == "dinov2"
    assert torch.equal(source.position_table, hub["pos_embed"][0, 1:].view(3, 3, 32))
    assert torch.equal(source.cls_position, hub["pos_embed"][0, 0])
    assert "mask_token" in source.unused
    check_timm(source, model, images())


@pytest.mark.parametrize("shape", [(24, 24), (16, 40)])
def test_vit_of_transformers(tmp_path: Path, shape: tuple[int, int]) -> None:
    config = transformers.ViTConfig(**SIZE, **MLP, image_size=shape, patch_size=8)
    model = perturb(transformers.ViTForImageClassification(config))
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.heads, source.registers) == ("vit", 4, None)
    assert source.position_table.shape == (shape[0] // 8, shape[1] // 8, 32)
    check_hf(source, model.vit, images(*shape))
    told = Source.from_checkpoint(tmp_path, "dino")  # which Hugging Face has as a ViT
    assert (told.name, told.fingerprint) == ("dino", source.fingerprint)

    if shape == (24, 24):
        in_memory = tmp_path / "state"
        same = Source.from_checkpoint(save(in_memory, model.state_dict()), heads=4)
        assert (same.name, same.fingerprint) == (source.name, source.fingerprint)
        assert same.layout == source.layout


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_size": 4},
        {"qkv_bias": False},
        {"reg_tokens": 2},
        {"reg_tokens": 4, "no_embed_class": True},
        {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
        {"no_embed_class": True, "init_values": 1e-4},
        {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    ],
    ids=str,
)
def test_vit_of_timm(tmp_path: Path, options: dict[str, Any]) -> None:
    model = timm_vit(**options)
    layer_scale = "init_values" in options
    source = Source.from_checkpoint(save(tmp_path, model.state_dict()), heads=4)
    assert source.name == ("dinov2" if layer_scale else "vit")
    side = 24 // options.get("patch_size", 8)
    assert source.position_table.shape == (side, side, 32)
    assert source.has_cls == options.get("class_token", True)
    check_timm(source, model, images())


@pytest.mark.parametrize(
    "config",
    [
        {"pretrained_cfg": {"input_size": [3, 16, 40]}},
        {"pretrained_cfg": {"input_size": [3, 24, 24]}, "model_args": {"img_size": [16, 40]}},
    ],
)
def test_vit_of_timm_on_a_grid_that_is_not_square(tmp_path: Path, config: dict[str, Any]) -> None:
    model = timm_vit(img_size=(16, 40))
    source = Source.from_checkpoint(save(tmp_path, model.state_dict(), config), heads=4)
    assert source.position_table.shape == (2, 5, 32)
    check_timm(source, model, images(16, 40))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"expected 1 \+ n\*n or n\*n rows of positions, got 11"):
        Source.from_checkpoint(tmp_path, heads=4)


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (224, 14), (384, 16), (518, 14), ((192, 304), 16)])
def test_tables_of_published_sizes(tmp_path: Path, size: int | tuple[int, int], patch: int) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = height // patch, width // patch
    state = timm_vit().state_dict()
    state["pos_embed"] = torch.randn(1, 1 + rows * columns, 32)
    config = None if rows == columns else {"image_size": [height, width], "patch_size": patch}
    source = Source.from_checkpoint(save(tmp_path, state, config), heads=4)
    assert torch.equal(source.position_table, state["pos_embed"][0, 1:].view(rows, columns, 32))


def test_clip_of_timm_takes_its_activation_from_the_name(tmp_path: Path) -> None:
    load_timm()
    from timm.layers import get_act_layer

    norm = {"pre_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)}
    model = timm_vit(act_layer=get_act_layer("quick_gelu"), **norm)
    config = {"architecture": "vit_base_patch16_clip_quickgelu_224", "num_classes": 3}
    source = Source.from_checkpoint(save(tmp_path, model.state_dict(), config), heads=4)
    check_timm(source, model, images())


def test_deit_of_transformers(tmp_path: Path) -> None:
    config = transformers.DeiTConfig(**SIZE, **MLP, image_size=24, patch_size=8)
    model = perturb(transformers.DeiTForImageClassificationWithTeacher(config))
    model.save_pretrained(tmp_path)
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, len(source.registers)) == ("deit", 1)
    embeddings = model.deit.embeddings
    want = embeddings.distillation_token[0, 0] + embeddings.position_embeddings[0, 1]
    assert torch.equal(source.registers[0], want)
    check_hf(source, model.deit, images())


def test_deit_of_timm(tmp_path: Path) -> None:
    load_timm()
    from timm.models.deit import VisionTransformerDistilled

    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = perturb(VisionTransformerDistilled(**sizes))
    source = Source.from_checkpoint(save(tmp_path, {"model": model.state_dict()}), heads=4)
    assert (source.name, len(source.registers)) == ("deit", 1)
    check_timm(source, model, images())


def test_dino(tmp_path: Path) -> None:
    model = timm_vit(num_classes=0)
    other = timm_vit(num_classes=0)
    head = {"head.mlp.0.weight": torch.randn(8, 32), "head.last_layer.weight_g": torch.randn(8, 1)}
    teacher = {f"backbone.{key}": value for key, value in model.state_dict().items()} | head
    student = {f"module.backbone.{key}": value for key, value in other.state_dict().items()}
    state = {"student": student, "teacher": teacher, "epoch": 3, "args": Namespace(arch="vit_small")}
    source = Source.from_checkpoint(save(tmp_path, state), heads=4)
    assert (source.name, source.depth) == ("dino", 2)
    check_timm(source, model, images())
    wrapped = {f"module.{key}": value for key, value in teacher.items()}
    assert Source.from_checkpoint(save(tmp_path, wrapped), heads=4).fingerprint == source.fingerprint

    save(tmp_path, model.state_dict())  # the backbone alone is a ViT, unless told
    bare = Source.from_checkpoint(tmp_path, heads=4)
    told = Source.from_checkpoint(tmp_path, "dino", heads=4)
    assert (bare.name, told.name) == ("vit", "dino")
    assert bare.fingerprint == told.fingerprint == source.fingerprint


@pytest.mark.parametrize("decoder", [True, False])
def test_mae_of_transformers(tmp_path: Path, decoder: bool) -> None:
    small = {f"decoder_{name}": value for name, value in (SIZE | MLP).items()}
    config = transformers.ViTMAEConfig(
        **SIZE, **MLP, **small, image_size=24, patch_size=8, mask_ratio=0.0, attn_implementation="eager"
    )
    model = transformers.ViTMAEForPreTraining(config) if decoder else transformers.ViTMAEModel(config)
    vit = model.vit if decoder else model
    vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    vit.embeddings.initialize_weights()  # the fixed table
    perturb(model).save_pretrained(tmp_path)
    for settings in (True, False):
        if not settings:
            (tmp_path / "config.json").unlink()
        source = Source.from_checkpoint(tmp_path, heads=4)
        assert (source.name, source.position_kind) == ("mae", "sinusoidal")
    assert not source.cls_position.any()
    assert torch.equal(source.position_table, vit.embeddings.position_embeddings[0, 1:].view(3, 3, 32))
    random = Source.random("mae", width=32, depth=1, heads=4, positions=(3, 3))
    torch.testing.assert_close(random.position_table, source.position_table, rtol=0, atol=1e-6)
    assert not random.cls_position.any()
    check_hf(source, vit, images(), noise=torch.arange(9.0).expand(2, -1))  # patches in their order


def test_mae_of_the_official_repository(tmp_path: Path) -> None:
    model = timm_vit(num_classes=0)
    table = Source.random("mae", width=32, depth=1, heads=4, positions=(3, 3)).position_table
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([torch.zeros(1, 32), table.flatten(0, 1)])[None])
    encoder = model.state_dict()
    source = Source.from_checkpoint(save(tmp_path, {"model": encoder}), heads=4)
    assert (source.name, source.position_kind) == ("mae", "sinusoidal")
    check_timm(source, model, images())
    decoder = {"mask_token": torch.randn(1, 1, 16), "decoder_embed.weight": torch.randn(16, 32)}
    decoder |= {"decoder_pos_embed": torch.randn(1, 10, 16), "decoder_blocks.0.attn.qkv.weight": table[0]}
    whole = Source.from_checkpoint(save(tmp_path, {"model": encoder | decoder}), heads=4)
    assert (whole.name, whole.fingerprint) == ("mae", source.fingerprint)
    assert {"mask_token", "decoder_embed.weight"} <= set(whole.unused)

    trained = encoder | {"pos_embed": torch.randn(1, 10, 32)}  # after fine-tuning, a ViT like any other
    assert Source.from_checkpoint(save(tmp_path, trained), heads=4).name == "vit"
    told = Source.from_checkpoint(tmp_path, "mae", heads=4)
    assert (told.name, told.position_kind) == ("mae", "learned")


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (1024, 16), (1280, 16), (1664, 16)])
def test_heads_without_config(tmp_path: Path, width: int, heads: int) -> None:
    shapes = timm_vit(embed_dim=width, depth=1, num_heads=heads, device="meta").state_dict()
    state = {name: torch.zeros(1).expand(value.shape) for name, value in shapes.items()}
    assert Source.from_checkpoint(save(tmp_path, state)).heads == heads


def test_blocks_of_another_architecture_are_refused(tmp_path: Path) -> None:
    model = timm_vit(qk_norm=True)
    with pytest.raises(ValueError, match=r"no tensor such as 'blocks\.0\.attn\.k_norm"):
        Source.from_checkpoint(save(tmp_path, model.state_dict()), heads=4)
    state = timm_vit().state_dict()
    del state["blocks.0.attn.qkv.bias"]  # present in the other block
    with pytest.raises(ValueError, match=r"no tensor such as 'blocks\.1\.attn\.qkv\.bias'"):
        Source.from_checkpoint(save(tmp_path, state), heads=4)
    with pytest.raises(ValueError, match="expected CLIP's image tower, but no tensors are named"):
        Source.from_checkpoint(tmp_path, "clip-vision")


def test_a_table_that_contradicts_config(tmp_path: Path) -> None:
    state = timm_vit().state_dict()
    config = {"pretrained_cfg": {"input_size": [3, 32, 32]}}
    resampled = Source.from_checkpoint(save(tmp_path, state, config), heads=4)
    assert resampled.position_table.shape == (3, 3, 32)  # a square table tells for itself
    state["pos_embed"] = torch.randn(1, 12, 32)
    with pytest.raises(ValueError, match=r"n\*n or 1 \+ 4\*4 or 4\*4 rows of positions, got 12"):
        Source.from_checkpoint(save(tmp_path, state, config), heads=4)
    config = {"image_size": [32], "patch_size": 8}
    with pytest.raises(ValueError, match=r"expected one or two positive numbers as size of the image .* got"):
        Source.from_checkpoint(save(tmp_path, state, config), heads=4)
