"""Point-cloud ops for CPU and CUDA: exact, deterministic, compilable; one module per op."""

from __future__ import annotations

import any2point._extension  # noqa: F401  (registers torch.ops.any2point)
from any2point.ops.ball_query import BallQuery, ball_query
from any2point.ops.farthest_point_sample import (
    FarthestPoints,
    farthest_point_hierarchy,
    farthest_point_sample,
)
from any2point.ops.knn import KNN, knn

__all__ = [
    "KNN",
    "BallQuery",
    "FarthestPoints",
    "ball_query",
    "farthest_point_hierarchy",
    "farthest_point_sample",
    "knn",
]
