"""The official code's variants and its parameter names."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from any2point.models.config import Any2PointConfig
from any2point.sources import Source
from any2point.sources._layouts import split_table
from any2point.sources.checkpoint import count_blocks
from any2point.sources.source import get_family

if TYPE_CHECKING:
    from any2point.models.any2point import Any2Point

_SCAN = {"num_classes": 15, "normalize": "scan", "feature_order": "max_cls"}
_MODELNET = {
    "num_classes": 40,
    "normalize": "mn40",
    "feature_order": "cls_max",
    "head_bias": True,
    "cls_decay": False,
    "norm_eps": 1e-5,
    "final_norm_eps": 1e-5,
}
_CLIP = {"attention_axis": "batch", "cell": 2.0, "adapter_dim": 16, "scale_factor": 0.3}
_DINO = {"position_adds": "every", "cell": 26.0, "position_size": (518, 518), "adapter_dim": 8}
# The official code reads ImageBind's 12 x 19 patches as 19 rows of 12, in an image 192 wide and 304 high.
_BIND = {"position_adds": "once", "cell": 16.0, "position_size": (304, 192), "table_grid": (19, 12)}
_DEEP = {"neighbors": 81, "coef_pro": 0.1, "scale_factor": 1.0, "pooling": "max+mean", "drop_path": 0.1}

# Settings of the published training scripts, by source and data set.
VARIANTS: dict[str, dict[str, Any]] = {
    "clip-text/scanobjectnn": _SCAN
    | _CLIP
    | {"neighbors": 81, "line_direction": (-1.0, 0.0, 1.0), "position_adds": "both", "voxel_size": 0.08}
    | {"coef_pro": 0.3, "norm_eps": 1e-5, "final_norm_eps": 1e-6},
    "dinov2/scanobjectnn": _SCAN
    | _DINO
    | {"camera": 1.8, "coef_pro": 0.7, "attention_dropout": 0.1, "norm_eps": 1e-6, "final_norm_eps": 1e-6},
    "imagebind/scanobjectnn": _SCAN
    | _BIND
    | {"camera": 1.4, "coef_pro": 0.5, "adapter_dim": 12, "attention_dropout": 0.1}
    | {"norm_eps": 1e-6, "final_norm_eps": 1e-6},
    "clip-text/modelnet40": _MODELNET
    | _CLIP
    | {"line_direction": (1.0, -1.0, 0.0), "position_adds": "once", "coef_pro": 0.5},
    "dinov2/modelnet40": _MODELNET | _DINO | _DEEP | {"camera": 1.4},
    "imagebind/modelnet40": _MODELNET | _BIND | _DEEP | {"camera": 1.4, "adapter_dim": 8},
}

# Where the blocks' tensors stand under which official name.
_SOURCE = [
    (r"(?:res)?blocks\.(\d+)\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"(?:res)?blocks\.(\d+)\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"(?:res)?blocks\.(\d+)\.ln_([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"(?:res)?blocks\.(\d+)\.mlp\.c_fc\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"(?:res)?blocks\.(\d+)\.mlp\.c_proj\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"blocks\.(\d+)\.(ls[12])\.gamma", r"blocks.\1.\2"),
    (r"blocks\.(\d+)\.((?:norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(?:weight|bias))", r"blocks.\1.\2"),
]
_LEAF = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BLOCK = r"(?:res)?blocks\.(\d+)\."
# Trained tensors. A named group `row` is the view whose row of a stacked tensor this is.
_TRAINED = [
    (r"cls_token", "cls_token"),
    (r"cls_pos", "cls_position"),
    (r"patch_embed\.EncP\.raw_point_embed\.net\.0\.weight", "tokenizer.embed.weight"),
    (r"patch_embed\.EncP\.raw_point_embed\.net\.1\." + _LEAF, r"tokenizer.embed_norm.\1"),
    (
        r"patch_embed\.EncP\.LGA_list\.(\d)\.linear2\.(\d)\.net1\.0\." + _LEAF,
        r"tokenizer.stages.\1.\2.down.\3",
    ),
    (
        r"patch_embed\.EncP\.LGA_list\.(\d)\.linear2\.(\d)\.net1\.1\." + _LEAF,
        r"tokenizer.stages.\1.\2.down_norm.\3",
    ),
    (r"patch_embed\.EncP\.LGA_list\.(\d)\.linear2\.(\d)\.net2\.0\." + _LEAF, r"tokenizer.stages.\1.\2.up.\3"),
    (
        r"patch_embed\.EncP\.LGA_list\.(\d)\.linear2\.(\d)\.net2\.1\." + _LEAF,
        r"tokenizer.stages.\1.\2.up_norm.\3",
    ),
    (_BLOCK + r"adapter\.ln1\." + _LEAF, r"encoder.adapters.\1.adapter.down.\2"),
    (_BLOCK + r"adapter\.ln2\." + _LEAF, r"encoder.adapters.\1.adapter.up.\2"),
    (_BLOCK + r"out_transform_3d\.0\." + _LEAF, r"encoder.adapters.\1.space_norm.\2"),
    (_BLOCK + r"out_transform_[12]d\.(?P<row>\d)\.0\." + _LEAF, r"encoder.adapters.\1.view_norm.\3"),
    (r"attn1\.(?P<row>\d)\.(qkv|proj)\." + _LEAF, r"encoder.attention.\2_\3"),
    (r"norm3\.(?P<row>\d)\." + _LEAF, r"encoder.attention.norm_\2"),
    (r"norm\." + _LEAF, r"norm.\1"),
    (r"prediction\.head\.0\.([01])\." + _LEAF, r"head.\1.\2"),
    (r"prediction\.head\.2\.0\." + _LEAF, r"head.4.\1"),
    (r"prediction\.head\.2\.1\." + _LEAF, r"head.5.\1"),
    (r"prediction\.head\.4\.0\." + _LEAF, r"head.8.\1"),
    (r"cls_head_finetune\.(\d)\." + _LEAF, r"head.\1.\2"),
]


def translate(name: str) -> tuple[str, int | None] | None:
    """Our name of an official trained tensor or buffer, and its row if ours stacks the views; None if unused.

    Example:
        >>> translate("encoder.attn1.3.qkv.weight")
        ('encoder.attention.qkv_weight', 3)
    """
    name = name.removeprefix("module.").removeprefix("encoder.")
    for pattern, ours in _TRAINED:
        match = re.fullmatch(pattern, name)
        if match:
            row = match.groupdict().get("row")
            target = match.expand(ours)
            # The normalisations that ours stores as plain tensors do not count batches.
            if target.endswith("num_batches_tracked") and not target.startswith("head."):
                return None
            return target, None if row is None else int(row)
    return None


def _unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for name in ("model", "base_model"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    tensors = {k.removeprefix("module."): torch.as_tensor(v) for k, v in state.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def official_source(state: Mapping[str, Tensor], family: str, position_table: Any, heads: int) -> Source:
    """The frozen transformer inside an official state dict."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, ours in _SOURCE:
            match = re.fullmatch(pattern, key.removeprefix("encoder."))
            if match:
                tensors[match.expand(ours)] = value
    depth = count_blocks(tensors, "blocks.{}.attn.qkv.weight")
    if depth == 0:
        raise ValueError("`state_dict`: expected the blocks of a transformer, got none")
    table = torch.as_tensor(position_table).float()
    entry = get_family(family)
    if len(entry.positions) == 2:
        height, across = entry.positions
        table = split_table(table, grid=(height, across))[0]
    # The official code drops the keys and values that ImageBind's attention adds.
    layout = dataclasses.replace(entry.layout, bias_kv=False)
    width = tensors["blocks.0.attn.qkv.weight"].shape[1]
    return Source(family, entry.modality, width, depth, heads, layout, tensors, table)


def load_official(
    cls: type[Any2Point],
    state_dict: Mapping[str, Any],
    variant: str,
    position_table: Any,
    options: Mapping[str, Any],
) -> Any2Point:
    """See `Any2Point.from_official`."""
    if variant not in VARIANTS:
        raise ValueError(f"`variant`: expected one of {', '.join(VARIANTS)}, got {variant!r}")
    state = _unwrap(state_dict)
    config = Any2PointConfig(**({"parity": "official"} | VARIANTS[variant] | dict(options)))
    source = official_source(state, variant.split("/")[0], position_table, heads=12)
    model = cls(config, source)

    target = model.state_dict()
    needed = {name for name in target if name not in model.frozen_names}
    filled: dict[str, int] = {}
    for key, value in state.items():
        place = translate(key)
        if place is None:
            continue
        name, row = place
        if name not in target:
            raise ValueError(f"`state_dict`: {key} has no place in the variant {variant}")
        slot = target[name] if row is None else target[name][row]
        if value.numel() != slot.numel():
            got = f"{list(value.shape)} for {key}"
            raise ValueError(f"`state_dict`: expected {slot.numel()} values, got {got}")
        slot.copy_(value.reshape(slot.shape))
        filled[name] = filled.get(name, 0) + slot.numel()
    missing = sorted(name for name in needed if filled.get(name, 0) != target[name].numel())
    if missing:
        raise ValueError(f"`state_dict`: nothing in it for {', '.join(missing[:4])} ({len(missing)} in all)")
    return model.eval()
