"""AST, the audio spectrogram transformer, named as by Hugging Face or by the official code (`v.`).

A DeiT over patches of a mel spectrogram: class token and distillation token (the source's one register),
then the patches, frequency rows first. The grid is not square (12 x 101 as published). It follows from
config.json, or else from the number of patches and the 128 mel bins of every published model: 12 rows
(stride 10) if they divide the patches, or else 8 (stride 16). Recognised by the one input channel of its
patches; under the official names SSAST's fine-tuned models look the same, which `family="ssast"` settles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import Grid, find_vit, open_reader, read_vit, spectrogram_grid
from any2point.sources.source import Family, Source
from any2point.sources.vit import LAYOUT, NAMES


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_vit(state, NAMES, spectrogram=True) is not None


def _told_grid(config: Mapping[str, Any]) -> Grid | None:
    names = ("num_mel_bins", "max_length", "patch_size", "frequency_stride", "time_stride")
    sizes = [size for name in names if isinstance(size := config.get(name), int) and size > 0]
    if len(sizes) < len(names):
        return None
    bins, frames, patch, down, across = sizes
    return (bins - patch) // down + 1, (frames - patch) // across + 1


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, NAMES, "an AST")
    grid = _told_grid(config)
    if grid is None:
        grid = spectrogram_grid(reader.take(names.table).shape[-2] - 2, 16, strides=(10, 16))
    return read_vit("ast", "audio", names, reader, config, depth=depth, heads=heads, origin=origin, grid=grid)


FAMILY = Family(
    name="ast",
    title="AST (audio spectrogram transformer)",
    modality="audio",
    checkpoint="Hugging Face ASTModel, or official: `v.blocks.N`; patches of one channel",
    width=768,
    depth=12,
    positions=(12, 101),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
    registers=1,
)
