"""SH3D-15, the labelled shapes that ship with the package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from any2point.data.dataset import PointDataset

SAMPLE_FILE = Path(__file__).with_name("sh3d15.npz")


def sample_set(split: str | None = "train", seed: int = 0) -> PointDataset:
    """458 furniture and household shapes in 15 classes, 2048 surface points each, y up, in the unit sphere.

    The shapes are human-made models from the catalogues of Sweet Home 3D, all under CC0 or CC BY: see
    `ATTRIBUTION.md` beside the data for authors and licences, `scripts/build_sh3d.py` for how they were
    chosen. Near copies of a shape are on the same side of the stored split.

    Args:
        split: "train" (70 %), "test" (30 %) or None for both.
        seed: 0 is the split stored in the file, which results are to be reported on; another number draws
            another one, stratified by class, near copies kept together.

    Returns:
        `PointDataset`.

    Example:
        >>> test = sample_set("test")
        >>> test.points.shape[1:], len(test.class_names)
        (torch.Size([2048, 3]), 15)
    """
    if split not in (None, "train", "test"):
        raise ValueError(f'`split`: expected "train", "test" or None, got {split!r}')
    with np.load(SAMPLE_FILE, allow_pickle=False) as stored:
        file = {name: stored[name] for name in ("points", "labels", "classes", "names", "test", "group")}
    rows = np.arange(len(file["labels"]))
    if split is not None:
        test = file["test"] if seed == 0 else grouped_mask(file["labels"], file["group"], 0.3, seed)
        rows = rows[test == (split == "test")]
    return PointDataset(
        torch.from_numpy(file["points"][rows].astype(np.float32)),
        torch.from_numpy(file["labels"][rows].astype(np.int64)),
        tuple(file["classes"].tolist()),
        tuple(file["names"][rows].tolist()),
        files=(SAMPLE_FILE,),
    )


def grouped_mask(labels: np.ndarray, group: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Mark about a share of every class, whole groups at a time.

    Args:
        labels: [n] int.
        group: [n] int, equal for clouds that must stay together (all of one class).
        fraction: share of the clouds to mark.
        seed: of the choice.

    Returns:
        [n] bool.
    """
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        left = round(fraction * len(rows))
        for chosen in generator.permutation(np.unique(group[rows])):
            members = rows[group[rows] == chosen]
            if len(members) <= left:
                mask[members] = True
                left -= len(members)
    return mask
