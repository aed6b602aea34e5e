"""Text tower of CLIP (OpenAI and open_clip layout): pre-norm, QuickGELU, a learned table of 77 positions.

Used are the blocks, the final LayerNorm (`ln_final`) and `positional_embedding [77, C]`, the position table.
The tower has no class token; its token embedding, text projection, logit scale and the whole image tower
play no part. Half precision weights are widened to float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

_PROBE = "transformer.resblocks.0.attn.in_proj_weight"
LAYOUT = Layout(norm="pre", activation="quick_gelu", eps=1e-5)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    prefix = find_prefix(state, _PROBE, exclude="visual.")
    return prefix is not None and f"{prefix}ln_final.weight" in state  # not an image tower by itself


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    prefix = find_prefix(state, _PROBE, exclude="visual.")
    if prefix is None:
        raise ValueError(f"`path`: expected CLIP's text tower, but no tensor is named ...{_PROBE}")
    reader = Reader(state, prefix)
    depth = choose_depth(count_blocks(reader.state, "transformer.resblocks.{}.attn.in_proj_weight"), depth)
    table = reader.take("positional_embedding")
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        old, new = f"transformer.resblocks.{i}", f"blocks.{i}"
        for leaf in ("weight", "bias"):
            tensors[f"{new}.attn.qkv.{leaf}"] = reader.take(f"{old}.attn.in_proj_{leaf}")
        tensors |= reader.pair(f"{old}.attn.out_proj", f"{new}.attn.proj")
        tensors |= reader.pair(f"{old}.ln_1", f"{new}.norm1") | reader.pair(f"{old}.ln_2", f"{new}.norm2")
        tensors |= reader.pair(f"{old}.mlp.c_fc", f"{new}.mlp.fc1")
        tensors |= reader.pair(f"{old}.mlp.c_proj", f"{new}.mlp.fc2")
    tensors |= reader.pair("ln_final", "norm")
    width = table.shape[-1]
    return Source(
        name="clip-text",
        modality="language",
        width=width,
        depth=depth,
        heads=max(1, width // 64) if heads is None else heads,
        layout=LAYOUT,
        tensors=tensors,
        position_table=table,
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="clip-text",
    title="CLIP text towers",
    modality="language",
    checkpoint="OpenAI ViT-*.pt or open_clip: `transformer.resblocks.N`, `positional_embedding`",
    width=768,
    depth=12,
    positions=(77,),
    layout=LAYOUT,
    has_cls=False,
    matches=_matches,
    convert=_convert,
)
