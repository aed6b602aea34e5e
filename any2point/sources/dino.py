"""DINO as its training code saves it: the teacher's ViT under `backbone.` beside its projection head.

The network is timm's ViT, so that the published backbones alone cannot be told from a ViT: those are read as
"vit", or under this name with `family="dino"`. Recognised is the checkpoint with the head (`head.mlp`,
`head.last_layer`), of which the teacher is taken; prefixes `module.` and `backbone.` do not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import find_vit, open_reader, read_vit
from any2point.sources.source import Family, Source
from any2point.sources.vit import LAYOUT, NAMES


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    head = any(key.startswith(("head.mlp.", "head.last_layer.")) for key in state)
    return head and find_vit(state, NAMES) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, NAMES, "a DINO backbone")
    return read_vit("dino", "vision", names, reader, config, depth=depth, heads=heads, origin=origin)


FAMILY = Family(
    name="dino",
    title="DINO",
    modality="vision",
    checkpoint="training checkpoint (`teacher` with `backbone.` and `head.mlp`); a bare backbone is a ViT",
    width=384,
    depth=12,
    positions=(14, 14),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
