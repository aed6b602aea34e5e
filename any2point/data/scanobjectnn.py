"""ScanObjectNN: 15 classes of objects cut out of indoor scans, read from its published HDF5 files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from any2point.data.checksums import verify
from any2point.data.dataset import PointDataset
from any2point.data.h5 import read_h5

CLASSES = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
    "sink", "sofa", "toilet",
)  # fmt: skip
_FILES = {
    "OBJ_BG": "{}_objectdataset.h5",
    "OBJ_ONLY": "{}_objectdataset.h5",
    "PB_T25": "{}_objectdataset_augmented25_norot.h5",
    "PB_T25_R": "{}_objectdataset_augmented25rot.h5",
    "PB_T50_R": "{}_objectdataset_augmentedrot.h5",
    "PB_T50_RS": "{}_objectdataset_augmentedrot_scale75.h5",
}
_PREFIX = {"train": "training", "test": "test"}
# Clouds in the published files, where their number is known.
_COUNTS = {
    "OBJ_BG": {"train": 2309, "test": 581},
    "OBJ_ONLY": {"train": 2309, "test": 581},
    "PB_T50_RS": {"train": 11416, "test": 2882},
}
TREE = """\
ScanObjectNN/
  h5_files/                  unpacked from h5_files.zip of https://hkust-vgd.github.io/scanobjectnn
    main_split/              (13,099,259,542 bytes, MD5 36876af479f9ad39abad5ebcd89038dd)
      training_objectdataset.h5                        OBJ_BG
      test_objectdataset.h5
      training_objectdataset_augmentedrot_scale75.h5   PB_T50_RS
      test_objectdataset_augmentedrot_scale75.h5
    main_split_nobg/
      training_objectdataset.h5                        OBJ_ONLY
      test_objectdataset.h5"""


def scanobjectnn_dataset(
    root: str | Path,
    split: str | None = "train",
    *,
    variant: str = "PB_T50_RS",
    background: bool | None = None,
    features: Sequence[str] = (),
    strict: bool = False,
) -> PointDataset:
    """Read ScanObjectNN: real scans of furniture, 2048 points each, y up, in the scan's own unit.

    Args:
        root: ScanObjectNN/h5_files, a folder above it, or the folder of one split (main_split, ...,
            split4_nobg).
        split: "train", "test", or None for both.
        variant: "OBJ_BG" (objects with what surrounds them), "OBJ_ONLY" (without), or one of the perturbed
            "PB_T25", "PB_T25_R", "PB_T50_R" and "PB_T50_RS" (the hardest, five of every object).
        background: read the files with background or those without (`..._nobg`); by default as the variant
            says.
        features: ["mask"] reads a feature "object", 1 for points of the object and 0 for background.
        strict: refuse files that do not hold the published number of clouds (PB_T50_RS 11,416 and 2882,
            OBJ_BG and OBJ_ONLY 2309 and 581); otherwise they are a warning, so that a part of the set can be
            used.

    Returns:
        `PointDataset`. If `SHA256SUMS` lies in the folder, the files are compared with it.

    Raises:
        FileNotFoundError: files that are not there, with the tree that is expected.
        ImportError: h5py is not installed.
        ValueError: naming the file, what was expected and what was found.
    """
    if variant not in _FILES:
        raise ValueError(f"`variant`: expected one of {', '.join(_FILES)}, got {variant!r}")
    if split not in ("train", "test", None):
        raise ValueError(f'`split`: expected "train", "test" or None, got {split!r}')
    if not set(features) <= {"mask"}:
        raise ValueError(f"`features`: expected mask or none, got {', '.join(features)}")
    if background is None:
        background = variant != "OBJ_ONLY"
    elif variant in ("OBJ_BG", "OBJ_ONLY") and background != (variant == "OBJ_BG"):
        raise ValueError(f"`background`: expected {not background} (or None) for {variant}, got {background}")
    parts = ("train", "test") if split is None else (split,)
    names = [_FILES[variant].format(_PREFIX[part]) for part in parts]
    folder = _find(Path(root), background, names)
    files = [folder / name for name in names]
    verify(folder, files=files)
    read = [read_h5(file, len(CLASSES), ["mask"] if features else []) for file in files]
    for part, file, arrays in zip(parts, files, read):
        expected, found = _COUNTS.get(variant, {}).get(part), len(arrays["label"])
        if expected is not None and found != expected:
            message = f"{file}: expected the {expected} clouds of the published file, got {found}"
            if strict:
                raise ValueError(message)
            warnings.warn(message, stacklevel=2)
    mask = [(arrays["mask"] != -1)[..., None].astype(np.float32) for arrays in read if features]
    return PointDataset(
        torch.from_numpy(np.concatenate([arrays["data"] for arrays in read])),
        torch.from_numpy(np.concatenate([arrays["label"] for arrays in read])),
        CLASSES,
        tuple(f"{part}/{row}" for part, arrays in zip(parts, read) for row in range(len(arrays["label"]))),
        torch.from_numpy(np.concatenate(mask)) if features else None,
        ("object",) if features else (),
        tuple(files),
    )


def _find(root: Path, background: bool, names: Sequence[str]) -> Path:
    """The folder that holds these files."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected\n\n{TREE}")
    wanted = "main_split" if background else "main_split_nobg"
    tops = [root, root / "h5_files", root / "ScanObjectNN", root / "ScanObjectNN" / "h5_files"]
    folders = [top / wanted for top in tops]
    name = root.resolve().name
    if "split" not in name:
        folders.append(root)
    elif name.endswith("_nobg") != background:
        folders.insert(0, root)
    else:  # its files have the same names, but are not the ones asked for
        folders.insert(0, root / ".." / (name.removesuffix("_nobg") if background else f"{name}_nobg"))
    for folder in folders:
        if all((folder / name).is_file() for name in names):
            return folder
    raise FileNotFoundError(
        f"{root}: expected {' and '.join(names)} in {wanted}, found no such files; expected\n\n{TREE}"
    )
