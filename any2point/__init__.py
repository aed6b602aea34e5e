"""any2point: frozen transformers of any modality for 3D point clouds, and the point-cloud ops beneath them.

Importing the package costs nothing: each name is loaded when it is first used, so that
`any2point.numpy` works without torch and `any2point.ops` without the training extras.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from any2point._version import __version__

if TYPE_CHECKING:
    from any2point.models import Any2Point, Any2PointConfig
    from any2point.sources import Source

_EXPORTS = {"Any2Point": "models", "Any2PointConfig": "models", "Source": "sources"}
_MODULES = ("ops", "reference", "nn", "sources", "models", "data", "train", "viz", "numpy", "info")

__all__ = ["Any2Point", "Any2PointConfig", "Source", "__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"any2point.{_EXPORTS[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"any2point.{name}")
    raise AttributeError(f"module 'any2point' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
