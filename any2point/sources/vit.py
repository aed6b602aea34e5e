"""ViT of any patch size, named as by timm or by Hugging Face: pre-norm, GELU, a learned grid of positions.

The grid is square unless config.json tells the size of the image. Read here as well, being the same network:
- DINO without its projection head (the published backbones, timm's and Hugging Face's copies);
- DeiT without distillation token (Hugging Face calls it "vit" itself);
- timm's ViTs with registers, without class token, or with a norm before the first block (CLIP; these have
  epsilon 1e-5, and QuickGELU if the architecture's name in config.json says so).
A model that averages its tokens (`fc_norm` instead of `norm`) has no final norm for tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import HF_VIT, TIMM, find_vit, open_reader, read_vit
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

NAMES = (TIMM, *HF_VIT)
LAYOUT = Layout(norm="pre", activation="gelu", eps=1e-6)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_vit(state, NAMES) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, NAMES, "a ViT")
    if "norm_pre.weight" in reader:
        names = dataclasses.replace(names, eps=1e-5)
    quick = "quickgelu" in str(config.get("architecture"))
    return read_vit(
        "vit",
        "vision",
        names,
        reader,
        config,
        depth=depth,
        heads=heads,
        origin=origin,
        activation="quick_gelu" if quick else "gelu",
    )


FAMILY = Family(
    name="vit",
    title="ViT, and DeiT or DINO where only their weights differ",
    modality="vision",
    checkpoint="timm: `blocks.N.attn.qkv`, `pos_embed`; Hugging Face: `encoder.layer.N.layernorm_before`",
    width=768,
    depth=12,
    positions=(14, 14),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
