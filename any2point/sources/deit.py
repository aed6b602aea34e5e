"""DeiT with its distillation token, named as by timm (`dist_token`) or by Hugging Face.

A ViT whose table begins with two rows, for the class token and the distillation token; the latter, with its
position added, is the source's one register. Recognised by that token. DeiT without it is a plain ViT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import find_vit, open_reader, read_vit
from any2point.sources.source import Family, Source
from any2point.sources.vit import LAYOUT, NAMES


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    found = find_vit(state, NAMES)
    if found is None:
        return False
    names, prefix = found
    return f"{prefix}{names.registers[0]}" in state  # the distillation token


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, NAMES, "a DeiT")
    return read_vit("deit", "vision", names, reader, config, depth=depth, heads=heads, origin=origin)


FAMILY = Family(
    name="deit",
    title="DeiT with distillation token",
    modality="vision",
    checkpoint="as a ViT, with `dist_token` (timm) or `embeddings.distillation_token` (Hugging Face)",
    width=768,
    depth=12,
    positions=(14, 14),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
    registers=1,
)
