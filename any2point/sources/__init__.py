"""Frozen transformers of every modality: one encoder, and one small file per family of checkpoints."""

from __future__ import annotations

from any2point.sources import bert, clip_text, dinov2
from any2point.sources.encoder import FrozenEncoder, Layout
from any2point.sources.source import Family, Source

FAMILIES: dict[str, Family] = {family.FAMILY.name: family.FAMILY for family in (clip_text, bert, dinov2)}

__all__ = ["FAMILIES", "Family", "FrozenEncoder", "Layout", "Source"]
