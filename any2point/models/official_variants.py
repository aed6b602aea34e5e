"""The six published variants: what the paper's training scripts set, and what only the official code does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

FAMILIES = ("clip-text", "dinov2", "imagebind")

_SCAN = {"num_classes": 15, "normalize": "scan", "feature_order": "max_cls", "scale_factor": 0.3}
_MODELNET = {"num_classes": 40, "normalize": "mn40", "feature_order": "cls_max", "head_bias": True}
_DEEP = {"neighbors": 81, "coef_pro": 0.1, "scale_factor": 1.0, "pooling": "max+mean", "drop_path": 0.1}
# A cell of 16 pixels is one patch of ImageBind's 12 x 19.
_BIND = {"cell": 1.0}

# Settings that hold in either mode, by source and data set. What is not here is the package's default: 1024
# points, 128 tokens, 6 views, cells of 2 in 77 positions or 26 in 518 pixels, dropout of 0.1 and 0.5.
SETTINGS: dict[str, dict[str, Any]] = {
    "clip-text/scanobjectnn": _SCAN
    | {"neighbors": 81, "coef_pro": 0.3, "adapter_dim": 16, "voxel_size": 0.08},
    "dinov2/scanobjectnn": _SCAN
    | {"neighbors": 64, "coef_pro": 0.7, "adapter_dim": 8, "attention_dropout": 0.1},
    "imagebind/scanobjectnn": _SCAN
    | _BIND
    | {"neighbors": 64, "coef_pro": 0.5, "adapter_dim": 12, "attention_dropout": 0.1},
    "clip-text/modelnet40": _MODELNET
    | {"neighbors": 64, "coef_pro": 0.5, "adapter_dim": 16, "scale_factor": 0.3},
    "dinov2/modelnet40": _MODELNET | _DEEP | {"adapter_dim": 8},
    "imagebind/modelnet40": _MODELNET | _BIND | _DEEP | {"adapter_dim": 8},
}

# What `parity="official"` adds for each: coordinates, how often positions are added, epsilons.
_CLIP_QUIRKS = {"attention_axis": "batch", "cell": 2.0}
_DINO_QUIRKS = {"position_adds": "every", "cell": 26.0, "position_size": (518, 518)}
# The official code reads ImageBind's 12 x 19 patches as 19 rows of 12, in an image 192 wide and 304 high.
_BIND_QUIRKS = {"position_adds": "once", "cell": 16.0, "position_size": (304, 192), "table_grid": (19, 12)}
_MODELNET_QUIRKS = {"cls_decay": False, "norm_eps": 1e-5, "final_norm_eps": 1e-5}
_QUIRKS: dict[str, dict[str, Any]] = {
    "clip-text/scanobjectnn": _CLIP_QUIRKS
    | {"line_direction": (-1.0, 0.0, 1.0), "position_adds": "both", "norm_eps": 1e-5, "final_norm_eps": 1e-6},
    "dinov2/scanobjectnn": _DINO_QUIRKS | {"camera": 1.8, "norm_eps": 1e-6, "final_norm_eps": 1e-6},
    "imagebind/scanobjectnn": _BIND_QUIRKS | {"camera": 1.4, "norm_eps": 1e-6, "final_norm_eps": 1e-6},
    "clip-text/modelnet40": _MODELNET_QUIRKS
    | _CLIP_QUIRKS
    | {"line_direction": (1.0, -1.0, 0.0), "position_adds": "once"},
    "dinov2/modelnet40": _MODELNET_QUIRKS | _DINO_QUIRKS | {"camera": 1.4},
    "imagebind/modelnet40": _MODELNET_QUIRKS | _BIND_QUIRKS | {"camera": 1.4},
}

# Everything that the official code fixes, apart from what `parity="official"` alone implies.
VARIANTS: dict[str, dict[str, Any]] = {name: SETTINGS[name] | _QUIRKS[name] for name in SETTINGS}


def check_variant(name: str) -> str:
    """The name, or a ValueError that lists the variants."""
    if name not in VARIANTS:
        raise ValueError(f"`variant`: expected one of {', '.join(VARIANTS)}, got {name!r}")
    return name


def variant_options(variant: str, parity: str | None) -> dict[str, Any]:
    """Fields of `Any2PointConfig` that a variant sets in a mode: None or "official"."""
    check_variant(variant)
    return {"parity": parity} | VARIANTS[variant] if parity == "official" else dict(SETTINGS[variant])


def recognise(state: Mapping[str, Tensor], variant: str | None = None) -> str:
    """The variant that an official state dict belongs to, by its names.

    Args:
        state: tensors under official names, without "module.".
        variant: what the caller takes it for, which has to fit.

    Returns:
        The variant: the transformer's family by its blocks, the data set by its head.

    Raises:
        ValueError: the names do not tell and `variant` is None, or they contradict it.
    """
    if variant is not None:
        check_variant(variant)
    family, dataset = _family(state), _dataset(state)
    seen = f"{_saw(family, dataset)} ({len(state)} tensors, such as {', '.join(sorted(state)[:3])})"
    if family is None:
        raise ValueError(f"`state_dict`: expected the blocks of a transformer and a head, got {seen}")
    if variant is None:
        if dataset is None:
            fits = " or ".join(name for name in VARIANTS if name.startswith(family))
            raise ValueError(f"`variant`: expected {fits}, because the state dict has {seen}")
        return f"{family}/{dataset}"
    given = variant.split("/")
    if family != given[0] or dataset not in (None, given[1]):
        raise ValueError(f"`variant`: {variant} does not fit the state dict, which has {seen}")
    return variant


def _family(state: Mapping[str, Tensor]) -> str | None:
    names = {name.removeprefix("encoder.") for name in state}
    if any(re.match(r"resblocks\.\d+\.attn\.in_proj_", name) for name in names):
        return "clip-text"
    if any(re.match(r"blocks\.\d+\.ls1\.gamma", name) for name in names):
        return "dinov2"
    if any(re.match(r"blocks\.\d+\.attn\.qkv\.", name) for name in names):
        return "imagebind"
    return None


def _dataset(state: Mapping[str, Tensor]) -> str | None:
    if any(name.startswith("prediction.head.") for name in state):
        return "scanobjectnn"
    if any(name.startswith("cls_head_finetune.") for name in state):
        return "modelnet40"
    return None


_BLOCKS = {
    "clip-text": "resblocks with attn.in_proj (CLIP text)",
    "dinov2": "blocks with LayerScale (DINOv2)",
    "imagebind": "blocks without LayerScale (ImageBind)",
    None: "no blocks",
}
_HEADS = {
    "scanobjectnn": "a prediction.head (ScanObjectNN)",
    "modelnet40": "a cls_head_finetune (ModelNet40)",
    None: "neither prediction.head nor cls_head_finetune",
}


def _saw(family: str | None, dataset: str | None) -> str:
    return f"{_BLOCKS[family]} and {_HEADS[dataset]}"
