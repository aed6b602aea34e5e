"""Point-cloud ops for CPU and CUDA: exact, deterministic, compilable; one module per op."""

from __future__ import annotations

import any2point._extension  # noqa: F401  (registers torch.ops.any2point)
from any2point.ops.ball_query import BallQuery, ball_query
from any2point.ops.farthest_point_sample import (
    FarthestPoints,
    farthest_point_hierarchy,
    farthest_point_sample,
)
from any2point.ops.group import group
from any2point.ops.guided_aggregate import CellAttention, GuidedPlan, guided_aggregate, plan_guided
from any2point.ops.interpolate import interpolate, inverse_distance_weight
from any2point.ops.knn import KNN, knn
from any2point.ops.local_aggregate import BatchNorm, ResidualUnit, local_aggregate
from any2point.ops.segment_pool import segment_pool
from any2point.ops.virtual_project import VirtualProjection, virtual_project
from any2point.ops.voxel_cluster import VoxelCluster, voxel_cluster

__all__ = [
    "KNN",
    "BallQuery",
    "BatchNorm",
    "CellAttention",
    "FarthestPoints",
    "GuidedPlan",
    "ResidualUnit",
    "VirtualProjection",
    "VoxelCluster",
    "ball_query",
    "farthest_point_hierarchy",
    "farthest_point_sample",
    "group",
    "guided_aggregate",
    "interpolate",
    "inverse_distance_weight",
    "knn",
    "local_aggregate",
    "plan_guided",
    "segment_pool",
    "virtual_project",
    "voxel_cluster",
]
