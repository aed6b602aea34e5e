"""Point clouds in: file readers, data sets, the sample set that ships with the package, batched transforms.

Reading files needs NumPy only; data sets and transforms give torch tensors.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from any2point.data.checksums import checksum, verify
from any2point.data.formats import READERS, Mesh, read_mesh_or_cloud
from any2point.data.points import read_points, sample_surface

if TYPE_CHECKING:
    from any2point.data import transforms
    from any2point.data.ahead import prefetch
    from any2point.data.dataset import PointDataset, load_dataset
    from any2point.data.folder import folder_dataset
    from any2point.data.modelnet40 import modelnet40_dataset
    from any2point.data.sample import sample_set
    from any2point.data.scanobjectnn import scanobjectnn_dataset

_LAZY = {
    "PointDataset": "dataset",
    "folder_dataset": "folder",
    "load_dataset": "dataset",
    "modelnet40_dataset": "modelnet40",
    "prefetch": "ahead",
    "sample_set": "sample",
    "scanobjectnn_dataset": "scanobjectnn",
}

__all__ = [
    "READERS",
    "Mesh",
    "PointDataset",
    "checksum",
    "folder_dataset",
    "load_dataset",
    "modelnet40_dataset",
    "prefetch",
    "read_mesh_or_cloud",
    "read_points",
    "sample_set",
    "sample_surface",
    "scanobjectnn_dataset",
    "transforms",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"any2point.data.{_LAZY[name]}"), name)
    if name == "transforms":
        return importlib.import_module("any2point.data.transforms")
    raise AttributeError(f"module 'any2point.data' has no attribute {name!r}")
