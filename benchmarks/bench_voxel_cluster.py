"""voxel_cluster against floor + unique in torch."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "voxel_cluster"
