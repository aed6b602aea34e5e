"""Point-cloud ops for CPU and CUDA: exact, deterministic, compilable; one module per op."""

from __future__ import annotations

import any2point._extension  # noqa: F401  (registers torch.ops.any2point)

__all__: list[str] = []
