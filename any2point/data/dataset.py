"""Labelled point clouds in memory, and the folder layout that makes one of your own files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from any2point.data.formats import READERS
from any2point.data.points import read_points


@dataclass(frozen=True)
class PointDataset(torch.utils.data.Dataset):
    """Clouds of one size with their labels.

    The whole set is one tensor: even ModelNet40 with 8192 points is 1 GB, and a batch is then an index, with
    nothing to start, to share between processes or to wait for.

    Attributes:
        points: [n, N, 3] float32.
        labels: [n] int64.
        class_names: one name per class; labels are below their number.
        names: a name per cloud for messages, or None.
    """

    points: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        points = torch.as_tensor(self.points)
        labels = torch.as_tensor(self.labels)
        if points.ndim != 3 or points.shape[-1] != 3 or not points.dtype.is_floating_point:
            raise ValueError(
                f"`points`: expected floats of shape [n, N, 3], got {points.dtype} {list(points.shape)}"
            )
        if labels.shape != points.shape[:1] or labels.dtype.is_floating_point:
            raise ValueError(
                f"`labels`: expected [{len(points)}] integers, got {labels.dtype} {list(labels.shape)}"
            )
        if not torch.isfinite(points).all():
            raise ValueError("`points`: expected finite coordinates, got NaN or infinity")
        classes = len(self.class_names)
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise ValueError(
                f"`labels`: expected 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )
        object.__setattr__(self, "points", points.float().contiguous())
        object.__setattr__(self, "labels", labels.long())
        object.__setattr__(self, "class_names", tuple(self.class_names))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.labels[index]

    @property
    def num_points(self) -> int:
        """Points per cloud."""
        return self.points.shape[1]

    def subset(self, index: Tensor | Sequence[int]) -> PointDataset:
        """The clouds of these rows, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        names = None if self.names is None else tuple(self.names[i] for i in rows.tolist())
        return PointDataset(self.points[rows], self.labels[rows], self.class_names, names)

    def to(self, device: torch.device | str) -> PointDataset:
        """The same set with its tensors on `device`."""
        return PointDataset(self.points.to(device), self.labels.to(device), self.class_names, self.names)

    def split(self, fraction: float, seed: int = 0) -> tuple[PointDataset, PointDataset]:
        """Cut the set in two, class by class.

        Args:
            fraction: share of every class that goes to the second part, at least one cloud of each class that
                has two.
            seed: of the choice.

        Returns:
            (first, second).
        """
        mask = torch.from_numpy(stratified_mask(self.labels.cpu().numpy(), fraction, seed))
        rows = torch.arange(len(self))
        return self.subset(rows[~mask]), self.subset(rows[mask])


def stratified_mask(labels: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Mark a share of every class.

    Args:
        labels: [n] int.
        fraction: share to mark, between 0 and 1.
        seed: of the choice.

    Returns:
        [n] bool; round(fraction * size) clouds of every class, but at least one and at most all but one of a
        class that has two or more.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"`fraction`: expected a number between 0 and 1, got {fraction}")
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = int(np.clip(round(fraction * len(rows)), 1, len(rows) - 1)) if len(rows) > 1 else 0
        mask[generator.permutation(rows)[:count]] = True
    return mask


def resample(points: np.ndarray, num_points: int, generator: np.random.Generator) -> np.ndarray:
    """Bring a cloud to a fixed size: a random subset, or every point and repeats of random ones.

    Args:
        points: [N, 3], N at least 1.
        num_points: the size wanted.
        generator: of the choice.

    Returns:
        [num_points, 3].
    """
    order = generator.permutation(len(points))
    if len(points) < num_points:
        order = np.concatenate([order, generator.integers(len(points), size=num_points - len(points))])
    return points[order[:num_points]]


def folder_dataset(
    root: str | Path,
    split: str | None = None,
    *,
    num_points: int = 2048,
    test_fraction: float = 0.3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
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
        progress: called with (files read, files in all).

    Returns:
        `PointDataset`, classes in alphabetical order.

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
    clouds = []
    for number, (file, _, _) in enumerate(found):
        points = read_points(file, num_points, seed)
        clouds.append(resample(points, num_points, np.random.default_rng([seed, number])))
        if progress is not None:
            progress(number + 1, len(found))
    return PointDataset(
        torch.from_numpy(np.stack(clouds)),
        torch.tensor([label for _, label, _ in found]),
        tuple(classes),
        tuple(str(file.relative_to(root)) for file, _, _ in found),
    )


def load_dataset(name: str | Path, split: str, **options: object) -> PointDataset:
    """The sample set by its name ("sh3d15"), or a folder; see `sample_set` and `folder_dataset`."""
    if str(name) == "sh3d15":
        from any2point.data.sample import sample_set

        return sample_set(split)
    return folder_dataset(name, split, **options)  # type: ignore[arg-type]


def _visible(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part.lower()) for part in re.split(r"(\d+)", text)]
