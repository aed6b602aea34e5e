"""farthest_point_sample against fpsample, the loop in torch, and the peers given by `--peers` (GPU)."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "farthest_point_sample"
