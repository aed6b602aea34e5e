"""A folder of clouds or meshes as a data set: a class is a folder, its name is the folder's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from any2point.data.checksums import verify
from any2point.data.dataset import PointDataset, Progress, resample, stratified_mask
from any2point.data.features import feature_names
from any2point.data.formats import READERS
from any2point.data.points import read_points


def folder_dataset(
    root: str | Path,
    split: str | None = None,
    *,
    num_points: int = 2048,
    test_fraction: float = 0.3,
    seed: int = 0,
    features: Sequence[str] = (),
    progress: Progress | None = None,
) -> PointDataset:
    """Read a folder of clouds or meshes.

    The layout is `root/class/file`, or `root/train/class/file` and `root/test/class/file`.
    Files of other kinds (pictures, materials, notes) and hidden files are passed over; a file whose name says
    that it is a cloud and whose content does not is an error.

    Args:
        root: the folder.
        split: "train", "test", or None for everything. Without train and test folders, `test_fraction` of
            every class, chosen by `seed`, is the test set.
        num_points: every cloud is brought to this size.
        test_fraction: see `split`.
        seed: of the split and of every draw.
        features: "normals" and "colors", which every file must then have; see `read_points`.
        progress: called with (files read, files in all).

    Returns:
        `PointDataset`, classes in alphabetical order. If `SHA256SUMS` lies in the folder, the files are
        compared with it.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: naming the file or folder, what was expected and what was found.
    """
    root = Path(root)
    if split not in (None, "train", "test"):
        raise ValueError(f'`split`: expected "train", "test" or None, got {split!r}')
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir():
        raise ValueError(f"{root}: expected a folder of class folders, got a file")
    halves = [root / "train", root / "test"]
    fixed = all(half.is_dir() for half in halves)
    tops = halves if fixed else [root]
    classes = sorted(
        {folder.name for top in tops for folder in _visible(top) if folder.is_dir()}, key=_natural
    )
    if len(classes) < 2:
        raise ValueError(f"{root}: expected a folder for each of 2 or more classes, got {len(classes)}")
    found = [
        (file, label, top is halves[1])
        for top in tops
        for label, name in enumerate(classes)
        if (top / name).is_dir()
        for file in sorted((top / name).rglob("*"), key=lambda file: _natural(str(file)))
        if file.is_file() and file.suffix.lower() in READERS and not file.name.startswith(".")
    ]
    labels = np.array([label for _, label, _ in found], np.int64)
    for label, name in enumerate(classes):
        if not (labels == label).any():
            raise ValueError(f"{root}: expected {' '.join(READERS)} files in class {name!r}, got none")
    if split is not None:
        in_test = (
            np.array([test for *_, test in found]) if fixed else stratified_mask(labels, test_fraction, seed)
        )
        found = [item for item, test in zip(found, in_test) if test == (split == "test")]
    if not found:
        raise ValueError(f"{root}: expected clouds in the {split} set, got none")
    verify(root, files=[file for file, _, _ in found])
    clouds = []
    for number, (file, _, _) in enumerate(found):
        points = read_points(file, num_points, seed, features)
        clouds.append(resample(points, num_points, np.random.default_rng([seed, number])))
        if progress is not None:
            progress(number + 1, len(found))
    inputs = torch.from_numpy(np.stack(clouds))
    return PointDataset(
        inputs[..., :3],
        torch.tensor([label for _, label, _ in found]),
        tuple(classes),
        tuple(str(file.relative_to(root)) for file, _, _ in found),
        inputs[..., 3:] if features else None,
        feature_names(features),
        tuple(file for file, _, _ in found),
    )


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", text)]
