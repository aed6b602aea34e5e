"""HuBERT encoders (Hugging Face): the network of wav2vec 2.0, stand-in positions included (see there).

There is no position table: a fixed sinusoid of 1500 positions and amplitude 1 stands in for the convolution
that these models compute positions with. Recognised by `model_type` in config.json or the prefix `hubert.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import find_names, sinusoid
from any2point.sources.source import Family, Source
from any2point.sources.wav2vec2 import LAYOUT, LENGTH, NAMES, read_speech


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    found = find_names(state, (NAMES,))
    return found is not None and (found[1].startswith("hubert.") or config.get("model_type") == "hubert")


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    return read_speech("hubert", state, config, depth=depth, heads=heads, origin=origin)


FAMILY = Family(
    name="hubert",
    title="HuBERT encoders; a fixed sinusoid stands in for positions, of which they have none",
    modality="audio",
    checkpoint="Hugging Face: as wav2vec 2.0, with `hubert.` or model_type hubert in config.json",
    width=768,
    depth=12,
    positions=(LENGTH,),
    layout=LAYOUT,
    has_cls=False,
    matches=_matches,
    convert=_convert,
    position_kind="stand-in",
    table=sinusoid,
)
