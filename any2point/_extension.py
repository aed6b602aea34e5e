"""Loads the compiled extension into torch's op registry, once."""

from __future__ import annotations

from pathlib import Path

import torch

_HOW = "build it with `pip install --no-build-isolation .` in a checkout (see `any2point info`)"


def _load() -> None:
    path = Path(__file__).with_name("_C.abi3.so")
    if not path.exists():
        raise ImportError(f"any2point: the compiled extension is missing at {path}; {_HOW}")
    if hasattr(torch.ops.any2point, "_simd"):
        # A second library with the same op names would crash the process instead of raising.
        raise ImportError("any2point: another copy of the extension is already loaded in this process")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"any2point: {path} does not load with torch {torch.__version__}: {error}; {_HOW}"
        ) from None


_load()
