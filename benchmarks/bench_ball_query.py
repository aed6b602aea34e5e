"""ball_query against cdist + topk."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "ball_query"
