"""local_aggregate against its composition in torch: the stages of the tokenizer."""

from __future__ import annotations

from benchmarks.suites import test_op

__all__ = ["test_op"]

OP = "local_aggregate"
