"""The HDF5 files of ScanObjectNN and ModelNet40: clouds, labels and what else there is per point."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def read_h5(path: Path, num_classes: int, columns: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Read the datasets `data`, `label` and `columns`.

    Args:
        path: the file.
        num_classes: labels must be below this.
        columns: further datasets, one value or row per point.

    Returns:
        data [n, N, 3] float32, label [n] int64, and each of `columns` [n, N] or [n, N, A] as it is stored.

    Raises:
        ImportError: h5py is not installed.
        ValueError: naming the file, what was expected and what was found.
    """
    try:
        import h5py
    except ImportError:
        raise ImportError(
            f'{path}: reading .h5 files takes h5py: pip install "any2point[train]", or h5py alone'
        ) from None
    try:
        with h5py.File(path, "r") as file:
            missing = [name for name in ("data", "label", *columns) if name not in file]
            if missing:
                raise ValueError(f"expected a dataset {missing[0]!r}, got {sorted(file)}")
            return _checked(file, num_classes, columns)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:  # what HDF5 says of files that are cut short, damaged or of another kind
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: expected an HDF5 file, got {reason} (damaged or cut short?)") from None


def _checked(file: Any, num_classes: int, columns: Sequence[str]) -> dict[str, np.ndarray]:
    shape, count = file["data"].shape, file["data"].shape[0] if file["data"].shape else 0
    if len(shape) != 3 or shape[2] != 3 or 0 in shape or file["data"].dtype.kind != "f":
        raise ValueError(f"expected `data` [n, N, 3] of floats, got {list(shape)} of {file['data'].dtype}")
    if file["label"].size != count or file["label"].dtype.kind not in "iu":
        raise ValueError(
            f"expected `label` [{count}] of integers, got {list(file['label'].shape)} of "
            f"{file['label'].dtype}"
        )
    for name in columns:
        if file[name].shape[:2] != shape[:2]:
            raise ValueError(f"expected `{name}` [{shape[0]}, {shape[1]}], got {list(file[name].shape)}")
    arrays = {"data": file["data"][()].astype(np.float32, copy=False)}
    arrays["label"] = file["label"][()].reshape(-1).astype(np.int64)
    low, high = arrays["label"].min(), arrays["label"].max()
    if low < 0 or high >= num_classes:
        raise ValueError(f"expected labels from 0 to {num_classes - 1}, got {low} to {high}")
    if not np.isfinite(arrays["data"]).all():
        bad = int((~np.isfinite(arrays["data"]).all(axis=(1, 2))).sum())
        raise ValueError(f"expected finite coordinates, got NaN or infinity in {bad} of {count} clouds")
    return arrays | {name: file[name][()] for name in columns}
