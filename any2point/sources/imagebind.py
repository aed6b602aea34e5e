"""Audio trunk of ImageBind: the official checkpoint of all modalities, or its audio tensors alone.

A pre-norm ViT over patches of a spectrogram of 128 mel bins and 204 frames: 12 mel rows x 19 time columns
(stride 10), after the class token's row. Every block's attention has one more key and value (`bias_k`,
`bias_v`), which are loaded and used. The final norm is the first layer of the audio head. The trunks of the
other modalities, patch embedding and projection play no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import Names, find_names, open_reader, read_vit, spectrogram_grid
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

_STEM = "modality_preprocessors.audio"
_NAMES = Names(
    anchor=f"{_STEM}.pos_embedding_helper.pos_embed",
    block="modality_trunks.audio.blocks.{}",
    qkv=("attn.in_proj",),
    proj="attn.out_proj",
    norm1="norm_1",
    norm2="norm_2",
    norm="modality_heads.audio.0",
    table=f"{_STEM}.pos_embedding_helper.pos_embed",
    cls=f"{_STEM}.cls_token",
    stem=f"{_STEM}.rgbt_stem.proj.weight",
)
LAYOUT = Layout(norm="pre", activation="gelu", bias_kv=True, eps=1e-6)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_names(state, (_NAMES,)) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, (_NAMES,), "ImageBind's audio trunk")
    grid = spectrogram_grid(reader.take(names.table).shape[-2] - 1, 16, strides=(10,))
    return read_vit(
        "imagebind", "audio", names, reader, config, depth=depth, heads=heads, origin=origin, grid=grid
    )


FAMILY = Family(
    name="imagebind",
    title="ImageBind audio trunk",
    modality="audio",
    checkpoint="official imagebind_huge.pth, or of it the names `modality_*.audio.` alone",
    width=768,
    depth=12,
    positions=(12, 19),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
