"""Every op in plain PyTorch: short, slow, float64-safe. The kernels are tested against it."""

from __future__ import annotations

from any2point.reference.ball_query import ball_query
from any2point.reference.farthest_point_sample import farthest_point_sample
from any2point.reference.group import group
from any2point.reference.guided_aggregate import guided_aggregate
from any2point.reference.interpolate import interpolate, inverse_distance_weight
from any2point.reference.knn import knn
from any2point.reference.local_aggregate import local_aggregate
from any2point.reference.segment_pool import segment_pool
from any2point.reference.squared_distance import squared_distance
from any2point.reference.virtual_project import virtual_project
from any2point.reference.voxel_cluster import voxel_cluster

__all__ = [
    "ball_query",
    "farthest_point_sample",
    "group",
    "guided_aggregate",
    "interpolate",
    "inverse_distance_weight",
    "knn",
    "local_aggregate",
    "segment_pool",
    "squared_distance",
    "virtual_project",
    "voxel_cluster",
]
