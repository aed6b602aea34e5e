"""MAE's encoder, named as by the official repository (timm's names) or by Hugging Face (ViTMAE).

A ViT whose positions are fixed: sines and cosines of the column and of the row, and zeros for the class
token. The decoder plays no part. The published encoders hold nothing but a ViT's tensors, so that MAE is
recognised by any of: a decoder, `model_type` "vit_mae" in config.json, or a table that is that sinusoid. A
fine-tuned MAE, whose positions were trained, is a plain ViT; under this name its positions are "learned".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from any2point.sources._layouts import find_vit, open_reader, read_vit, sinusoid_grid, split_table
from any2point.sources.source import Family, Source
from any2point.sources.vit import LAYOUT, NAMES


def _is_fixed(table: Tensor) -> bool:
    """Whether a table `[H, W, C]` is MAE's, to the rounding of half precision."""
    grid = table.dim() == 3 and table.shape[-1] % 4 == 0
    return grid and torch.allclose(table, sinusoid_grid(*table.shape), atol=2e-3)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    found = find_vit(state, NAMES)
    if found is None:
        return False
    names, prefix = found
    decoder = (f"{prefix}decoder_embed.weight", "decoder.decoder_embed.weight")
    if config.get("model_type") == "vit_mae" or any(name in state for name in decoder):
        return True
    try:
        return _is_fixed(split_table(state[prefix + names.table].float())[0])
    except ValueError:  # no class token, or not square: not MAE's
        return False


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, NAMES, "an MAE encoder")
    source = read_vit("mae", "vision", names, reader, config, depth=depth, heads=heads, origin=origin)
    kind = "sinusoidal" if _is_fixed(source.position_table) else "learned"
    return dataclasses.replace(source, position_kind=kind)


FAMILY = Family(
    name="mae",
    title="MAE",
    modality="vision",
    checkpoint="official .pth (timm's names) or Hugging Face ViTMAE, with or without decoder",
    width=768,
    depth=12,
    positions=(14, 14),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
    position_kind="sinusoidal",
    table=sinusoid_grid,
)
