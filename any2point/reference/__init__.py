"""Every op in plain PyTorch: short, slow, float64-safe. The kernels are tested against it."""

from __future__ import annotations

from any2point.reference.farthest_point_sample import farthest_point_sample
from any2point.reference.squared_distance import squared_distance

__all__ = ["farthest_point_sample", "squared_distance"]
