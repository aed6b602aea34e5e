"""guided_aggregate against its composition in torch."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "guided_aggregate"
