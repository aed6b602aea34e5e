"""Thin modules over `any2point.ops`: they hold parameters and options, the ops compute."""

from __future__ import annotations

from any2point.nn.adapter import Adapter, CellAttention, GuidedAdapter
from any2point.nn.batch_norm import BatchNorm
from any2point.nn.encoder import AdaptedEncoder
from any2point.nn.head import ClassificationHead
from any2point.nn.positions import LearnedPositions, NoPositions, SinusoidalPositions
from any2point.nn.projection import VirtualProjection
from any2point.nn.tokenizer import Neighborhoods, PointNetTokenizer, Tokenizer, Tokens, stage_sizes
from any2point.nn.views import euler_rotations, given_lines, spread_lines, spread_rotations

__all__ = [
    "AdaptedEncoder",
    "Adapter",
    "BatchNorm",
    "CellAttention",
    "ClassificationHead",
    "GuidedAdapter",
    "LearnedPositions",
    "Neighborhoods",
    "NoPositions",
    "PointNetTokenizer",
    "SinusoidalPositions",
    "Tokenizer",
    "Tokens",
    "VirtualProjection",
    "euler_rotations",
    "given_lines",
    "spread_lines",
    "spread_rotations",
    "stage_sizes",
]
