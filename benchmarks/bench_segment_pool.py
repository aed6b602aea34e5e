"""segment_pool, forward and backward, against index_add and scatter_reduce in torch."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "segment_pool"
