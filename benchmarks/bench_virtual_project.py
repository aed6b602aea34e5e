"""virtual_project (lines and images) against its composition in torch."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "virtual_project"
