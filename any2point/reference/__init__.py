"""Every op in plain PyTorch: short, slow, float64-safe. The kernels are tested against it."""

from __future__ import annotations

from any2point.reference.ball_query import ball_query
from any2point.reference.farthest_point_sample import farthest_point_sample
from any2point.reference.knn import knn
from any2point.reference.squared_distance import squared_distance

__all__ = ["ball_query", "farthest_point_sample", "knn", "squared_distance"]
