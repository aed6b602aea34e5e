"""SSAST, the self-supervised AST, as its training code saves it: a timm DeiT under `v.`, with its heads.

Class token and distillation token (the source's one register; models without distillation have none), then
the patches of a spectrogram, frequency rows first. A pretraining checkpoint tells the spectrogram's size
(`p_input_fdim`, `p_input_tdim`); its patches do not overlap: 8 x 64 of 16 x 16, or 1 x 512 frames of 128 x 2,
a sequence. A fine-tuned one has 128 mel bins and overlaps by stride 10 if the number of patches says so.
Recognised by the mask embedding or the heads of pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import TIMM, Grid, find_names, open_reader, read_vit, spectrogram_grid
from any2point.sources.checkpoint import Reader
from any2point.sources.source import Family, Source
from any2point.sources.vit import LAYOUT

_MARKS = ("mask_embed", "p_input_fdim", "cpredlayer.0.weight", "gpredlayer.0.weight")


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_names(state, (TIMM,)) is not None and any(key.endswith(_MARKS) for key in state)


def _grid(state: Mapping[str, Tensor], reader: Reader) -> Grid:
    height, width = reader.take(TIMM.stem).shape[-2:]
    sizes = [state.get(f"p_input_{axis}dim") for axis in "ft"]
    if sizes[0] is not None and sizes[1] is not None:
        return int(sizes[0]) // height, int(sizes[1]) // width
    tokens = 1 + sum(name in reader for name in TIMM.registers)
    return spectrogram_grid(reader.take(TIMM.table).shape[-2] - tokens, height, strides=(height, 10))


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, (TIMM,), "an SSAST")
    return read_vit(
        "ssast",
        "audio",
        names,
        reader,
        config,
        depth=depth,
        heads=heads,
        origin=origin,
        grid=_grid(state, reader),
    )


FAMILY = Family(
    name="ssast",
    title="SSAST (self-supervised AST)",
    modality="audio",
    checkpoint="official .pth: `v.blocks.N`, `v.pos_embed`, with `mask_embed` or `p_input_fdim`",
    width=768,
    depth=12,
    positions=(8, 64),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
    registers=1,
)
