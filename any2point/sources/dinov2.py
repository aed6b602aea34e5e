"""DINOv2 vision transformers, named as in the original repository or on Hugging Face: pre-norm, LayerScale.

The position table is the square patch grid (37 x 37 for a 518 pixel image and 14 pixel patches); the row of
the class token is split off and starts the class token's position, as the checkpoint's class token starts the
class token. The patch embedding, mask token and register tokens play no part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

_HUB = "blocks.0.ls1.gamma"
_HF = "encoder.layer.0.layer_scale1.lambda1"
LAYOUT = Layout(norm="pre", activation="gelu", layer_scale=True, eps=1e-6)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_prefix(state, _HUB) is not None or find_prefix(state, _HF) is not None


def split_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """`[1, 1 + H W, C]` -> the square grid `[H, W, C]` and the class token's row `[C]`."""
    table = table.reshape(-1, table.shape[-1])
    side = math.isqrt(table.shape[0] - 1)
    if side < 1 or side * side != table.shape[0] - 1:
        raise ValueError(f"`path`: expected 1 + n*n rows of positions, got {table.shape[0]}")
    return table[1:].unflatten(0, (side, side)).contiguous(), table[0].clone()


def _hub_blocks(reader: Reader, depth: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            tensors |= reader.pair(f"blocks.{i}.{layer}", f"blocks.{i}.{layer}")
        for scale in ("ls1", "ls2"):
            tensors[f"blocks.{i}.{scale}"] = reader.take(f"blocks.{i}.{scale}.gamma")
    return tensors | reader.pair("norm", "norm")


def _hf_blocks(reader: Reader, depth: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        parts = [f"{old}.attention.attention.{part}" for part in ("query", "key", "value")]
        tensors |= reader.fused(parts, f"{new}.attn.qkv")
        tensors |= reader.pair(f"{old}.attention.output.dense", f"{new}.attn.proj")
        for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            tensors |= reader.pair(f"{old}.{layer}", f"{new}.{layer}")
        for number in ("1", "2"):
            tensors[f"{new}.ls{number}"] = reader.take(f"{old}.layer_scale{number}.lambda1")
    return tensors | reader.pair("layernorm", "norm")


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    hub = find_prefix(state, _HUB)
    prefix = find_prefix(state, _HF) if hub is None else hub
    if prefix is None:
        raise ValueError(f"`path`: expected a DINOv2 encoder, but no tensor is named ...{_HUB} or ...{_HF}")
    reader = Reader(state, prefix)
    if hub is not None:
        depth = choose_depth(count_blocks(reader.state, "blocks.{}.ls1.gamma"), depth)
        tensors = _hub_blocks(reader, depth)
        position, cls_token = reader.take("pos_embed"), reader.take("cls_token")
    else:
        depth = choose_depth(count_blocks(reader.state, "encoder.layer.{}.layer_scale1.lambda1"), depth)
        tensors = _hf_blocks(reader, depth)
        position = reader.take("embeddings.position_embeddings")
        cls_token = reader.take("embeddings.cls_token")
    table, cls_position = split_table(position)
    width = table.shape[-1]
    return Source(
        name="dinov2",
        modality="vision",
        width=width,
        depth=depth,
        heads=int(config.get("num_attention_heads", max(1, width // 64))) if heads is None else heads,
        layout=LAYOUT,
        tensors=tensors,
        position_table=table,
        cls_token=cls_token.flatten(),
        cls_position=cls_position,
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="dinov2",
    title="DINOv2",
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
