"""Frozen transformers of every modality: one encoder, and one small file per family of checkpoints."""

from __future__ import annotations

from any2point.sources import (
    ast,
    bert,
    clip_text,
    clip_vision,
    deit,
    dino,
    dinov2,
    distilbert,
    gpt2,
    hubert,
    imagebind,
    mae,
    roberta,
    ssast,
    vit,
    wav2vec2,
    whisper,
)
from any2point.sources.encoder import FrozenEncoder, Layout
from any2point.sources.source import Family, Source

# A checkpoint is of the first family that matches: the special before the general that shares their names.
_LANGUAGE = (clip_text, bert, roberta, distilbert, gpt2)
_AUDIO = (imagebind, ssast, ast, whisper, hubert, wav2vec2)
_VISION = (dinov2, clip_vision, deit, mae, dino, vit)
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (*_LANGUAGE, *_AUDIO, *_VISION)
}

__all__ = ["FAMILIES", "Family", "FrozenEncoder", "Layout", "Source"]
