"""knn against k-d trees (CPU: build and query, one thread), cdist + topk, and GPU peers."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "knn"
