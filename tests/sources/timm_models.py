"""timm where torchvision is missing: its ViTs do not use it, but its modules import it at the top."""

from __future__ import annotations

import enum
import importlib.util
import sys
from types import ModuleType

import pytest

_MODULES = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.transforms",
    "torchvision.transforms.functional",
)


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Stub(ModuleType):
    """A module that has every name, each an empty class."""

    __path__: list[str] = []
    InterpolationMode = _InterpolationMode

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def load_timm() -> ModuleType:
    """timm, or a skipped test; stubs of torchvision stand in `sys.modules` only while timm is imported."""
    stubs = {}
    if importlib.util.find_spec("torchvision") is None and "timm" not in sys.modules:
        stubs = {name: _Stub(name) for name in _MODULES}
        for name, module in stubs.items():
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(stubs[parent], child, module)
        sys.modules.update(stubs)
    try:
        return pytest.importorskip("timm")
    finally:
        for name in stubs:
            sys.modules.pop(name, None)
