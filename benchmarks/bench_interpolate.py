"""interpolate, forward and backward, against gather + weighted sum in torch."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "interpolate"
