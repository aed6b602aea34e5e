"""DINOv2 with and without registers: pre-norm, LayerScale; named as by the hub, by Hugging Face or by timm.

The position table is the patch grid (37 x 37 for a 518 pixel image and 14 pixel patches). Where positions go:
- hub and Hugging Face: the table has a row for the class token, and registers (`register_tokens`) have no
  position;
- timm with registers (`reg_token`): the table holds patches alone (`no_embed_class`), as the class token's
  position is already added to the class token: `cls_position` is then zero.
The giant model's MLP is a SwiGLU: fused (`w12`, `weights_in`, a doubled `fc1`) or as gate and value. Patch
embedding and mask token play no part.

Any other ViT with LayerScale under these names (DeiT III in timm) is the same network and is read here too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import HF_DINOV2, TIMM, find_names, open_reader, read_vit
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

_NAMES = (TIMM, *HF_DINOV2)
LAYOUT = Layout(norm="pre", activation="gelu", layer_scale=True, eps=1e-6)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    found = find_names(state, _NAMES)
    if found is None:
        return False
    names, prefix = found
    return any(f"{prefix}{names.block.format(0)}.{scale}" in state for scale, _ in names.scales)


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, _NAMES, "a DINOv2 encoder")
    return read_vit("dinov2", "vision", names, reader, config, depth=depth, heads=heads, origin=origin)


FAMILY = Family(
    name="dinov2",
    title="DINOv2, with and without registers",
    modality="vision",
    checkpoint="hub .pth or timm: `blocks.N.ls1.gamma`; Hugging Face: `encoder.layer.N.layer_scale1.lambda1`",
    width=768,
    depth=12,
    positions=(37, 37),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
