"""group, forward and backward, against torch indexing and gather, and the peers given by `--peers`."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "group"
