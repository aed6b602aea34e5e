"""Small generated files in the layouts of the published data sets, for every test that reads them.

What is written: the folders, file names, datasets, types and orders of the originals; what is smaller: the
number of clouds, and for ModelNet40 the points of a cloud. The clouds of a class are noisy ellipsoids of one
shape, so that a classifier can learn them.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np

SCANOBJECTNN = (
    "bag", "bin", "box", "cabinet", "chair", "desk", "display", "door", "shelf", "table", "bed", "pillow",
    "sink", "sofa", "toilet",
)  # fmt: skip
SCANOBJECTNN_FILES = {
    "OBJ_BG": "{}_objectdataset.h5",
    "OBJ_ONLY": "{}_objectdataset.h5",
    "PB_T50_RS": "{}_objectdataset_augmentedrot_scale75.h5",
}
MODELNET40 = (
    "airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone", "cup",
    "curtain", "desk", "door", "dresser", "flower_pot", "glass_box", "guitar", "keyboard", "lamp", "laptop",
    "mantel", "monitor", "night_stand", "person", "piano", "plant", "radio", "range_hood", "sink", "sofa",
    "stairs", "stool", "table", "tent", "toilet", "tv_stand", "vase", "wardrobe", "xbox",
)  # fmt: skip


def clouds(labels: np.ndarray, num_points: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """One noisy ellipsoid per label, its three axes given by the label.

    Args:
        labels: [n] int.
        num_points: per cloud.
        seed: of the noise.

    Returns:
        points [n, num_points, 3] and unit normals [n, num_points, 3], both float32.
    """
    generator = np.random.default_rng(seed)
    axes = 0.4 + 0.6 * np.random.default_rng(99).random((labels.max() + 1, 3))[labels][:, None]
    direction = generator.normal(size=(len(labels), num_points, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    points = direction * axes + 0.01 * generator.normal(size=direction.shape)
    normals = direction / axes
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return points.astype(np.float32), normals.astype(np.float32)


def write_scanobjectnn(
    root: Path,
    clouds_per_class: int = 2,
    *,
    variants: tuple[str, ...] = ("PB_T50_RS",),
    num_points: int = 2048,
    classes: int = 15,
    seed: int = 0,
) -> Path:
    """Write `root/h5_files/main_split[_nobg]/{training,test}_objectdataset*.h5`.

    Args:
        root: made if it is not there.
        clouds_per_class: in each of the two files; they follow each other in a random order.
        variants: out of `SCANOBJECTNN_FILES`.
        num_points: 2048 in the published files.
        classes: the first so many of the 15 have clouds.
        seed: of the clouds.

    Returns:
        `root`.
    """
    import h5py

    for variant in variants:
        folder = root / "h5_files" / ("main_split_nobg" if variant == "OBJ_ONLY" else "main_split")
        folder.mkdir(parents=True, exist_ok=True)
        for part, prefix in enumerate(("training", "test")):
            generator = np.random.default_rng([seed, part])
            labels = generator.permutation(np.repeat(np.arange(classes), clouds_per_class))
            points, _ = clouds(labels, num_points, seed + part)
            # The number of the object that a point belongs to; -1 is background.
            mask = np.where(generator.random(points.shape[:2]) < 0.2, -1, 5)
            with h5py.File(folder / SCANOBJECTNN_FILES[variant].format(prefix), "w") as file:
                file["data"] = points
                file["label"] = labels.astype(np.int32)
                file["mask"] = mask.astype(np.int32)
    return root


def modelnet40_items(clouds_per_class: int, classes: int, part: int) -> tuple[list[str], np.ndarray]:
    """Names such as airplane_0001, sorted by class as in the published lists, and labels [n]."""
    labels = np.repeat(np.arange(classes), clouds_per_class)
    first = 1 + part * clouds_per_class
    return [
        f"{MODELNET40[label]}_{first + i % clouds_per_class:04d}" for i, label in enumerate(labels)
    ], labels


def write_modelnet40_lists(folder: Path, clouds_per_class: int, classes: int) -> None:
    """Write modelnet40_shape_names.txt, modelnet40_train.txt and modelnet40_test.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "modelnet40_shape_names.txt").write_text("\n".join(MODELNET40) + "\n")
    for part, split in enumerate(("train", "test")):
        names, _ = modelnet40_items(clouds_per_class, classes, part)
        (folder / f"modelnet40_{split}.txt").write_text("\n".join(names) + "\n")


def write_modelnet40_text(
    root: Path, clouds_per_class: int = 2, *, num_points: int = 256, classes: int = 40, seed: int = 0
) -> Path:
    """Write `root/modelnet40_normal_resampled/CLASS/CLASS_0001.txt`, rows x,y,z,nx,ny,nz, and the lists.

    The published clouds have 10,000 points.
    """
    folder = root / "modelnet40_normal_resampled"
    write_modelnet40_lists(folder, clouds_per_class, classes)
    for part in range(2):
        names, labels = modelnet40_items(clouds_per_class, classes, part)
        points, normals = clouds(labels, num_points, seed + part)
        for name, table in zip(names, np.concatenate([points, normals], axis=2)):
            file = folder / name.rpartition("_")[0] / f"{name}.txt"
            file.parent.mkdir(exist_ok=True)
            np.savetxt(file, table, fmt="%.6f", delimiter=",")
    return root


def write_modelnet40_dat(
    root: Path, clouds_per_class: int = 2, *, num_points: int = 2048, classes: int = 40, seed: int = 0
) -> Path:
    """Write the caches `root/modelnet40_normal_resampled/modelnet40_{train,test}_8192pts_fps.dat` and lists.

    The published clouds have 8192 points, whatever is written here.
    """
    folder = root / "modelnet40_normal_resampled"
    write_modelnet40_lists(folder, clouds_per_class, classes)
    for part, split in enumerate(("train", "test")):
        _, labels = modelnet40_items(clouds_per_class, classes, part)
        tables = np.concatenate(clouds(labels, num_points, seed + part), axis=2)
        content = [list(tables), [np.array([label], np.int32) for label in labels]]
        with open(folder / f"modelnet40_{split}_8192pts_fps.dat", "wb") as file:
            pickle.dump(content, file)
    return root


def write_modelnet40_h5(
    root: Path,
    clouds_per_class: int = 2,
    *,
    num_points: int = 2048,
    classes: int = 40,
    files: int = 2,
    seed: int = 0,
) -> Path:
    """Write `root/modelnet40_ply_hdf5_2048/ply_data_{train,test}N.h5`, their lists and shape_names.txt.

    The published set has 5 training and 2 test files of up to 2048 clouds each.
    """
    import h5py

    folder = root / "modelnet40_ply_hdf5_2048"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shape_names.txt").write_text("\n".join(MODELNET40) + "\n")
    for part, split in enumerate(("train", "test")):
        names, labels = modelnet40_items(clouds_per_class, classes, part)
        order = np.random.default_rng([seed, part]).permutation(len(labels))
        points, normals = clouds(labels, num_points, seed + part)
        listed = []
        for number, rows in enumerate(np.array_split(order, files)):
            name = f"ply_data_{split}{number}.h5"
            listed.append(f"data/modelnet40_ply_hdf5_2048/{name}")
            with h5py.File(folder / name, "w") as file:
                file["data"] = points[rows]
                file["normal"] = normals[rows]
                file["label"] = labels[rows, None].astype(np.uint8)
                file["faceId"] = np.zeros((len(rows), num_points), np.int32)
            paths = [f"{names[row].rpartition('_')[0]}/{names[row]}.ply" for row in rows]
            (folder / f"ply_data_{split}_{number}_id2file.json").write_text(json.dumps(paths))
        (folder / f"{split}_files.txt").write_text("\n".join(listed) + "\n")
    return root
