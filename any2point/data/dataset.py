"""Labelled point clouds in memory, and one function that opens any data set by its name."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int, int], None]


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
        features: [n, N, F] float32, what else is known of every point, or None.
        feature_names: a name per column of `features`. Columns "nx", "ny", "nz" are normals and turn with
            their cloud; all others stay as they are.
        files: the files that the set was read from, for `checksum`.
    """

    points: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...] | None = None
    features: Tensor | None = None
    feature_names: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()

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
        if self.names is not None and len(self.names) != len(points):
            raise ValueError(f"`names`: expected {len(points)}, got {len(self.names)}")
        features = None if self.features is None else _checked_features(points, self.features)
        object.__setattr__(self, "points", points.float().contiguous())
        object.__setattr__(self, "labels", labels.long())
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "features", features)
        object.__setattr__(self, "feature_names", tuple(self.feature_names))
        if len(self.feature_names) != (0 if features is None else features.shape[-1]):
            what = "none without `features`" if features is None else f"{features.shape[-1]}"
            raise ValueError(f"`feature_names`: expected {what}, got {self.feature_names}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One cloud [N, 3 + F] and its label."""
        return self.inputs(slice(index, index + 1 or None))[0], self.labels[index]

    @property
    def num_points(self) -> int:
        """Points per cloud."""
        return self.points.shape[1]

    def inputs(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Points and features of some clouds side by side, [b, N, 3 + F], as the transforms take them."""
        if self.features is None:
            return self.points[rows]
        return torch.cat([self.points[rows], self.features[rows]], dim=-1)

    def with_inputs(self, inputs: Tensor) -> PointDataset:
        """The same clouds after a transform of `inputs()`: [n, M, 3 + F], any number of points M."""
        features = None if self.features is None else inputs[..., 3:]
        return replace(self, points=inputs[..., :3], features=features)

    def with_height(self, up: int = 1) -> PointDataset:
        """The same set with one more feature, "height": how far a point is above the lowest of its cloud.

        Args:
            up: 0, 1 or 2, the upright axis.
        """
        level = self.points[..., up : up + 1]
        height = level - level.amin(dim=1, keepdim=True)
        features = height if self.features is None else torch.cat([self.features, height], dim=-1)
        return replace(self, features=features, feature_names=(*self.feature_names, "height"))

    def subset(self, index: Tensor | Sequence[int]) -> PointDataset:
        """The clouds of these rows, in this order."""
        rows = torch.as_tensor(index, dtype=torch.int64)
        return replace(
            self,
            points=self.points[rows],
            labels=self.labels[rows],
            names=None if self.names is None else tuple(self.names[i] for i in rows.tolist()),
            features=None if self.features is None else self.features[rows],
        )

    def to(self, device: torch.device | str) -> PointDataset:
        """The same set with its tensors on `device`."""
        features = None if self.features is None else self.features.to(device)
        return replace(self, points=self.points.to(device), labels=self.labels.to(device), features=features)

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


def _checked_features(points: Tensor, features: Tensor) -> Tensor:
    features = torch.as_tensor(features)
    wrong = features.ndim != 3 or features.shape[:2] != points.shape[:2] or features.shape[-1] == 0
    if wrong or not features.dtype.is_floating_point:
        raise ValueError(
            f"`features`: expected floats of shape [{len(points)}, {points.shape[1]}, F], "
            f"got {features.dtype} {list(features.shape)}"
        )
    if not torch.isfinite(features).all():
        raise ValueError("`features`: expected finite numbers, got NaN or infinity")
    return features.float().contiguous()


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


def load_dataset(
    name: str | Path,
    split: str | None,
    root: str | Path | None = None,
    *,
    features: Sequence[str] = (),
    up: int = 1,
    progress: Progress | None = None,
    **options: object,
) -> PointDataset:
    """Open a data set by its name.

    Args:
        name: "sh3d15" (`sample_set`), "scanobjectnn" (`scanobjectnn_dataset`), "modelnet40"
            (`modelnet40_dataset`), or a folder of clouds or meshes (`folder_dataset`).
        split: "train", "test", or None for both.
        root: where the files of a published set are; by default the environment's ANY2POINT_DATA.
        features: what to read beside the coordinates: "normals" (ModelNet40, folders), "colors" (folders),
            "mask" (ScanObjectNN) and, for every set, "height" above the lowest point.
        up: 0, 1 or 2, the upright axis, for "height".
        progress: called with (done, of how many) where reading takes long.
        options: further arguments of the function named above.

    Returns:
        `PointDataset`.

    Raises:
        FileNotFoundError: files that are not there, with the tree that is expected.
        ValueError: naming the option, file or folder, what was expected and what was found.
    """
    if isinstance(features, str):
        raise ValueError(f"`features`: expected a list such as ['{features}'], got {features!r}")
    module, function_name = _NAMED.get(str(name), ("folder", "folder_dataset"))
    function = getattr(importlib.import_module(f"any2point.data.{module}"), function_name)
    known = inspect.signature(function).parameters
    given: dict[str, object] = {"features": tuple(kind for kind in features if kind != "height")}
    given |= {"root": root, "progress": progress}
    if module in ("scanobjectnn", "modelnet40"):
        given["root"] = root or os.environ.get("ANY2POINT_DATA")
        if given["root"] is None:
            raise ValueError(
                f"`root`: expected the folder of {name} (on the command line --data, or the environment's "
                "ANY2POINT_DATA), got none"
            )
    elif root is not None:
        raise ValueError(f"`root`: expected none beside {name}, got {root}")
    elif module == "folder":
        given["root"] = name
        if not Path(name).exists():
            known_names = ", ".join(_NAMED)
            raise FileNotFoundError(f"{name}: no such folder, and no data set of this name ({known_names})")
    elif given["features"]:
        raise ValueError(f"`features`: expected height or none of {name}, got {', '.join(features)}")
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = ", ".join(option for option in known if option not in {*given, "split"})
        raise ValueError(f"{name}: expected options out of {takes}; got {', '.join(unknown)}")
    data = function(split=split, **{key: value for key, value in given.items() if key in known}, **options)
    return data.with_height(up) if "height" in features else data


_NAMED = {
    "sh3d15": ("sample", "sample_set"),
    "scanobjectnn": ("scanobjectnn", "scanobjectnn_dataset"),
    "modelnet40": ("modelnet40", "modelnet40_dataset"),
}
