"""ModelNet40: 40 classes of CAD models, in the three forms in which its points are passed around."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from any2point.data.checksums import checksum, verify
from any2point.data.dataset import PointDataset, Progress
from any2point.data.features import NORMALS
from any2point.data.h5 import read_h5
from any2point.data.pickles import load_arrays
from any2point.data.resampled import Clouds, read_lines, read_resampled

CLASSES = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup",
    "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop",
    "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa",
    "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip
_COUNTS = {
    "dat": {"train": 9843, "test": 2468},
    "text": {"train": 9843, "test": 2468},
    "h5": {"train": 9840, "test": 2468},
}
# MD5 of the files in modelnet40_ply_hdf5_2048.zip (itself c9ab8e6dfb16f67afdab25e155c79e59), as public
# loaders of the set check them; none is known of the other two layouts.
_MD5 = {
    "ply_data_train0.h5": "3176385ffc31a7b6b5af22191fd920d1",
    "ply_data_train1.h5": "e3f613fb500559403b34925112754dc4",
    "ply_data_train2.h5": "0c56e233a090ff87c3049d4ce08e7d8b",
    "ply_data_train3.h5": "9d2af465adfa33a3285c369f3ca66c45",
    "ply_data_train4.h5": "dff38de489b2c41bfaeded86c2208984",
    "ply_data_test0.h5": "e9732e6d83b09e79e9a7617df058adee",
    "ply_data_test1.h5": "aba4b12a67c34391cc3c015a6f08ed4b",
}
TREES = {
    "dat": """\
modelnet40_normal_resampled/                 8192 points with normals, in farthest point order
  modelnet40_train_8192pts_fps.dat
  modelnet40_test_8192pts_fps.dat
  modelnet40_shape_names.txt                 may be missing""",
    "text": """\
modelnet40_normal_resampled/                 10,000 points with normals, unpacked from the .zip of that name
  modelnet40_shape_names.txt
  modelnet40_train.txt
  modelnet40_test.txt
  airplane/airplane_0001.txt ...             rows x,y,z,nx,ny,nz""",
    "h5": """\
modelnet40_ply_hdf5_2048/                    2048 points with normals, unpacked from the .zip of that name
  train_files.txt, test_files.txt            may be missing
  shape_names.txt                            may be missing
  ply_data_train0.h5 ... ply_data_train4.h5
  ply_data_test0.h5, ply_data_test1.h5""",
}


def modelnet40_dataset(
    root: str | Path,
    split: str | None = "train",
    *,
    layout: str = "auto",
    num_points: int | None = None,
    features: Sequence[str] = (),
    strict: bool = False,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> PointDataset:
    """Read ModelNet40, points on the surfaces of CAD models, y up.

    Args:
        root: the folder of one of the layouts, or one that holds it.
        split: "train", "test", or None for both.
        layout: "dat" (the cache of 8192 points that most code since Point-BERT shares), "text"
            (modelnet40_normal_resampled), "h5" (modelnet40_ply_hdf5_2048), or "auto": the first of these, in
            this order, that is there.
        num_points: points per cloud. Of text files the farthest so many are taken, beginning with the first
            point (by default 8192, as in the .dat caches, which begin with a random one); the other layouts
            give their first so many, by default all.
        features: ["normals"] reads them as well.
        strict: refuse files that do not hold the published number of clouds (9843 and 2468; h5 9840 and
            2468) or, of the h5 layout, not the published bytes; otherwise either is a warning.
        cache: where to keep what was made of the text files, which takes minutes to read; by default beside
            them, or where that cannot be written in the user's cache folder.
        progress: called with (files read, files in all), text only.

    Returns:
        `PointDataset`. If `SHA256SUMS` lies in the folder, the files are compared with it when they are read.

    Raises:
        FileNotFoundError: files that are not there, with the tree that is expected.
        ImportError: h5py is not installed (layout h5).
        ValueError: naming the file, what was expected and what was found. A .dat file is a pickle, and one
            that holds more than arrays of numbers is refused, not run.
    """
    if layout not in ("auto", *TREES):
        raise ValueError(f"`layout`: expected auto, {', '.join(TREES)}, got {layout!r}")
    if split not in ("train", "test", None):
        raise ValueError(f'`split`: expected "train", "test" or None, got {split!r}')
    if not set(features) <= {"normals"}:
        raise ValueError(f"`features`: expected normals or none, got {', '.join(features)}")
    if num_points is not None and num_points < 1:
        raise ValueError(f"`num_points`: expected 1 or more, got {num_points}")
    parts = ("train", "test") if split is None else (split,)
    layout, folder = _find(Path(root), layout, parts)
    class_names = _class_names(folder, layout)
    read = []
    for part in parts:
        if layout == "text":
            size = num_points or 8192
            clouds = read_resampled(folder, part, class_names, size, bool(features), cache, progress)
        else:
            reader = _read_dat if layout == "dat" else _read_h5
            clouds = reader(folder, part, class_names, bool(features))
        _check_published(clouds, layout, part, strict)
        read.append(clouds)
    table = torch.from_numpy(read[0].table if split else np.concatenate([clouds.table for clouds in read]))
    if num_points is not None and table.shape[1] < num_points:
        raise ValueError(f"`num_points`: expected {table.shape[1]} at most of {folder}, got {num_points}")
    table = table[:, :num_points]
    return PointDataset(
        table[..., :3],
        torch.from_numpy(np.concatenate([clouds.labels for clouds in read])),
        class_names,
        tuple(name for clouds in read for name in clouds.names),
        table[..., 3:] if features else None,
        NORMALS if features else (),
        tuple(file for clouds in read for file in clouds.files),
    )


def _check_published(clouds: Clouds, layout: str, part: str, strict: bool) -> None:
    expected = _COUNTS[layout][part]
    folder = clouds.files[0].parent
    message = None
    if len(clouds.labels) != expected:
        message = f"{folder}: expected the {expected} published {part} clouds, got {len(clouds.labels)}"
    elif layout == "h5":
        other = [name for name, found in checksum(clouds.files, "md5").items() if found != _MD5.get(name)]
        if other:
            message = f"{folder / other[0]}: expected the published file, got another of its name"
    if message is None:
        return
    if strict:
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


def _find(root: Path, layout: str, parts: Sequence[str]) -> tuple[str, Path]:
    """Which layout is there, and in which folder."""
    trees = "\n\nor\n\n".join(TREES.values() if layout == "auto" else [TREES[layout]])
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected\n\n{trees}")
    tops = [root, root / "ModelNet", root / "ModelNet40"]
    folders = {
        "dat": [folder for top in tops for folder in (top, top / "modelnet40_normal_resampled")],
        "h5": [folder for top in tops for folder in (top, top / "modelnet40_ply_hdf5_2048")],
    }
    folders["text"] = folders["dat"]
    for kind in TREES if layout == "auto" else (layout,):
        for folder in folders[kind]:
            if all(_is_there(folder, kind, part) for part in parts):
                return kind, folder
    raise FileNotFoundError(f"{root}: expected ModelNet40, found no files of it; expected\n\n{trees}")


def _is_there(folder: Path, layout: str, part: str) -> bool:
    if layout == "dat":
        return _dat_file(folder, part).is_file()
    if layout == "h5":
        return any(folder.glob(f"ply_data_{part}*.h5"))
    # The lists alone also lie beside the .dat caches; it takes a class folder to be the text layout.
    listed = folder / f"modelnet40_{part}.txt"
    if not listed.is_file() or not (folder / "modelnet40_shape_names.txt").is_file():
        return False
    return any((folder / name).is_dir() for name in _class_names(folder, "text"))


def _class_names(folder: Path, layout: str) -> tuple[str, ...]:
    file = folder / ("shape_names.txt" if layout == "h5" else "modelnet40_shape_names.txt")
    if not file.is_file():
        return CLASSES
    names = tuple(read_lines(file))
    if len(names) != len(CLASSES):
        raise ValueError(f"{file}: expected {len(CLASSES)} class names, got {len(names)}")
    return names


def _dat_file(folder: Path, part: str) -> Path:
    return folder / f"modelnet40_{part}_8192pts_fps.dat"


def _read_dat(folder: Path, part: str, class_names: Sequence[str], normals: bool) -> Clouds:
    path = _dat_file(folder, part)
    verify(folder, files=[path])
    try:
        with open(path, "rb") as file:
            clouds, given = _lists(load_arrays(file))
        labels = np.array([label.item() for label in given], np.int64)
        shapes = {cloud.shape for cloud in clouds}
        if len(shapes) != 1 or len(clouds) != len(labels):
            raise ValueError(
                f"expected as many clouds of one size as labels, got {len(clouds)} of the sizes "
                f"{sorted(shapes)[:3]} and {len(labels)} labels"
            )
        if not 0 <= labels.min() <= labels.max() < len(class_names):
            raise ValueError(
                f"expected labels from 0 to {len(class_names) - 1}, got {labels.min()} to {labels.max()}"
            )
        (shape,) = shapes
        columns = 6 if normals else 3
        if len(shape) != 2 or shape[0] == 0 or shape[1] < columns:
            raise ValueError(f"expected clouds [N, {columns} or more], got {list(shape)}")
        table = np.stack([cloud[:, :columns] for cloud in clouds]).astype(np.float32, copy=False)
        if not np.isfinite(table).all():
            raise ValueError("expected finite numbers, got NaN or infinity")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    listed = folder / f"modelnet40_{part}.txt"
    names = read_lines(listed) if listed.is_file() else []
    if len(names) != len(labels):
        names = [f"{part}/{row}" for row in range(len(labels))]
    return Clouds(table, labels, names, [path])


def _lists(content: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The clouds and the labels of a cache; some have a third list, of file names."""
    if not isinstance(content, (list, tuple)) or len(content) not in (2, 3):
        raise ValueError("expected [clouds, labels], got another structure")
    clouds, labels = (
        [np.asarray(item) for item in part] if isinstance(part, list) else [] for part in content[:2]
    )
    if any(item.dtype.kind not in "fiu" for item in (*clouds, *labels)):
        raise ValueError("expected clouds and labels as numbers, got something else")
    if any(label.size != 1 or label.dtype.kind == "f" for label in labels):
        raise ValueError("expected one whole number as label of a cloud, got something else")
    return clouds, labels


def _read_h5(folder: Path, part: str, class_names: Sequence[str], normals: bool) -> Clouds:
    listed = folder / f"{part}_files.txt"
    if listed.is_file():  # its lines are paths on the machine where the set was made
        files = [folder / Path(line).name for line in read_lines(listed)]
    else:
        files = sorted(folder.glob(f"ply_data_{part}*.h5"))
    if not files:
        raise ValueError(f"{listed}: expected names of .h5 files, got none")
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, though {listed.name} lists it")
    verify(folder, files=files)
    tables, labels, names = [], [], []
    for file in files:
        arrays = read_h5(file, len(class_names), ["normal"] if normals else [])
        parts = [arrays["data"], arrays["normal"]] if normals else [arrays["data"]]
        tables.append(np.concatenate(parts, axis=2, dtype=np.float32))
        labels.append(arrays["label"])
        names += _h5_names(file, part, len(labels[-1]))
    sizes = {table.shape[1] for table in tables}
    if len(sizes) > 1:
        raise ValueError(f"{folder}: expected clouds of one size, got {sorted(sizes)}")
    return Clouds(np.concatenate(tables), np.concatenate(labels), names, files)


def _h5_names(file: Path, part: str, count: int) -> list[str]:
    """The names of a file's clouds, which lie beside it, or their numbers."""
    number = file.stem.removeprefix(f"ply_data_{part}")
    path = file.with_name(f"ply_data_{part}_{number}_id2file.json")
    try:
        known = json.loads(path.read_text())
    except FileNotFoundError:
        known = []
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    if not isinstance(known, list) or len(known) != count:
        return [f"{file.stem}/{row}" for row in range(count)]
    return [str(Path(str(name)).with_suffix("")) for name in known]
