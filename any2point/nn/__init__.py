"""Thin modules over `any2point.ops`: they hold parameters and options, the ops compute."""

from __future__ import annotations

from any2point.nn.adapter import Adapter, CellAttention, GuidedAdapter
from any2point.nn.batch_norm import BatchNorm
from any2point.nn.encoder import AdaptedEncoder
from any2point.nn.head import ClassificationHead
from any2point.nn.projection import VirtualProjection, spread_lines, spread_rotations
from any2point.nn.tokenizer import Tokenizer, Tokens, stage_sizes

__all__ = [
    "AdaptedEncoder",
    "Adapter",
    "BatchNorm",
    "CellAttention",
    "ClassificationHead",
    "GuidedAdapter",
    "Tokenizer",
    "Tokens",
    "VirtualProjection",
    "spread_lines",
    "spread_rotations",
    "stage_sizes",
]
