"""ScanObjectNN and ModelNet40, read from small files in the layouts in which they are published."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from published_layouts import (
    MODELNET40,
    SCANOBJECTNN,
    clouds,
    write_modelnet40_dat,
    write_modelnet40_h5,
    write_modelnet40_text,
    write_scanobjectnn,
)

from any2point.data import PointDataset, load_dataset, modelnet40, scanobjectnn
from any2point.data.checksums import checksum, verify
from any2point.data.pickles import load_arrays

pytestmark = pytest.mark.filterwarnings("ignore:.*expected the .*published")
PB = "training_objectdataset_augmentedrot_scale75.h5"


# --- ScanObjectNN ---


def test_scanobjectnn_is_read_as_it_is(tmp_path: Path) -> None:
    top = write_scanobjectnn(tmp_path / "ScanObjectNN")
    folder = top / "h5_files" / "main_split"
    for root in (tmp_path, top, top / "h5_files", folder):
        train = load_dataset("scanobjectnn", "train", root)
        with h5py.File(folder / PB) as file:
            np.testing.assert_array_equal(train.points.numpy(), file["data"][()])
            np.testing.assert_array_equal(train.labels.numpy(), file["label"][()])
            mask = file["mask"][()]
    assert train.class_names == SCANOBJECTNN
    assert train.points.dtype == torch.float32
    assert train.names is not None
    assert train.names[3] == "train/3"
    assert [file.name for file in train.files] == [PB]
    masked = load_dataset("scanobjectnn", "train", tmp_path, features=["mask"])
    assert masked.feature_names == ("object",)
    assert masked.features is not None
    np.testing.assert_array_equal(masked.features[..., 0].numpy() == 1, mask != -1)
    both = load_dataset("scanobjectnn", None, tmp_path)
    test = load_dataset("scanobjectnn", "test", tmp_path)
    assert torch.equal(both.points, torch.cat([train.points, test.points]))


def test_scanobjectnn_variants_are_not_mixed_up(tmp_path: Path) -> None:
    write_scanobjectnn(tmp_path / "both", variants=("OBJ_BG",), seed=1)
    write_scanobjectnn(tmp_path / "both", variants=("OBJ_ONLY",), seed=2)
    files = tmp_path / "both" / "h5_files"
    with_background = load_dataset("scanobjectnn", "test", files, variant="OBJ_BG")
    without = load_dataset("scanobjectnn", "test", files, variant="OBJ_ONLY")
    assert not torch.equal(with_background.points, without.points)
    # The files of the two folders have the same names: the folder of the other variant must not do.
    for folder in ("main_split", "main_split_nobg"):
        again = load_dataset("scanobjectnn", "test", files / folder, variant="OBJ_ONLY")
        assert torch.equal(again.points, without.points)
        again = load_dataset("scanobjectnn", "test", files / folder, variant="OBJ_BG")
        assert torch.equal(again.points, with_background.points)
    same = load_dataset("scanobjectnn", "test", files, variant="OBJ_ONLY", background=False)
    assert torch.equal(same.points, without.points)
    with pytest.raises(ValueError, match=r"`background`: expected False .* OBJ_ONLY"):
        load_dataset("scanobjectnn", "test", files, variant="OBJ_ONLY", background=True)
    write_scanobjectnn(tmp_path / "alone", variants=("OBJ_BG",))
    with pytest.raises(FileNotFoundError, match="in main_split_nobg"):
        load_dataset("scanobjectnn", "test", tmp_path / "alone/h5_files/main_split", variant="OBJ_ONLY")


def test_scanobjectnn_in_a_folder_of_any_name(tmp_path: Path) -> None:
    write_scanobjectnn(tmp_path)
    moved = (tmp_path / "h5_files" / "main_split").rename(tmp_path / "hardest")
    assert len(load_dataset("scanobjectnn", "train", moved)) == 30


def test_scanobjectnn_counts(tmp_path: Path) -> None:
    write_scanobjectnn(tmp_path)
    with pytest.warns(UserWarning, match=f"{PB}: expected the 11416 clouds of the published file, got 30"):
        load_dataset("scanobjectnn", "train", tmp_path)
    with pytest.raises(ValueError, match="expected the 2882 clouds"):
        load_dataset("scanobjectnn", "test", tmp_path, strict=True)


def test_scanobjectnn_missing_files_print_the_tree(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError) as caught:
            load_dataset("scanobjectnn", "train", root)
        assert scanobjectnn.TREE in str(caught.value)
        assert str(root) in str(caught.value)


def rewrite(path: Path, **arrays: np.ndarray | None) -> None:
    with h5py.File(path, "r+") as file:
        for name, array in arrays.items():
            del file[name]
            if array is not None:
                file[name] = array


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


BAD_H5 = {
    "cut": (cut, "damaged or cut short"),
    "foreign": (lambda path: path.write_bytes(b"<html>404</html>"), "expected an HDF5 file"),
    "empty": (lambda path: path.write_bytes(b""), "expected an HDF5 file"),
    "no label": (dict(label=None), r"expected a dataset 'label', got \['data', 'mask'\]"),
    "labels": (dict(label=np.full(30, 15)), "expected labels from 0 to 14, got 15 to 15"),
    "few labels": (dict(label=np.zeros(29, int)), r"`label` \[30\] of integers, got \[29\]"),
    "flat": (dict(data=np.zeros((30, 6))), r"`data` \[n, N, 3\] of floats, got \[30, 6\]"),
    "nan": (dict(data=np.full((30, 8, 3), np.nan)), "NaN or infinity in 30 of 30 clouds"),
    "no clouds": (dict(data=np.zeros((0, 8, 3))), r"got \[0, 8, 3\]"),
}


@pytest.mark.parametrize("name", BAD_H5)
def test_bad_h5_is_one_clear_error(tmp_path: Path, name: str) -> None:
    write_scanobjectnn(tmp_path)
    damage, message = BAD_H5[name]
    path = tmp_path / "h5_files" / "main_split" / PB
    if isinstance(damage, dict):
        rewrite(path, **damage)
    else:
        damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("scanobjectnn", "train", tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_h5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scanobjectnn(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "any2point\[train\]"'):
        load_dataset("scanobjectnn", "train", tmp_path)


# --- ModelNet40 ---


@pytest.mark.parametrize(
    ("write", "layout"),
    [(write_modelnet40_dat, "dat"), (write_modelnet40_text, "text"), (write_modelnet40_h5, "h5")],
)
def test_modelnet40_layouts(tmp_path: Path, write: object, layout: str) -> None:
    write(tmp_path, num_points=64, classes=5)  # type: ignore[operator]
    (folder,) = tmp_path.iterdir()
    for part, split in enumerate(("train", "test")):
        seen: list[tuple[int, int]] = []
        data = load_dataset(
            "modelnet40",
            split,
            tmp_path,
            num_points=64,
            features=["normals"],
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert seen == ([(i + 1, 10) for i in range(10)] if layout == "text" else [])
        assert data.class_names == MODELNET40
        assert data.feature_names == ("nx", "ny", "nz")
        assert data.names is not None
        assert data.features is not None
        order = np.argsort([name.rpartition("/")[2] for name in data.names])
        labels = np.repeat(np.arange(5), 2)
        np.testing.assert_array_equal(data.labels.numpy()[order], labels)
        points, normals = clouds(labels, 64, seed=part)
        for row, point, normal in zip(order, points, normals):
            name = data.names[row].rpartition("/")[2]
            assert name == f"{MODELNET40[data.labels[row]]}_{1 + 2 * part + row_in_class(order, row):04d}"
            # The text layout is in farthest point order, so points are matched by place.
            match = torch.cdist(data.points[row], torch.from_numpy(point)).argmin(dim=1)
            assert len(match.unique()) == 64
            torch.testing.assert_close(data.points[row], torch.from_numpy(point)[match], atol=1e-6, rtol=0)
            torch.testing.assert_close(data.features[row], torch.from_numpy(normal)[match], atol=1e-6, rtol=0)
        plain = load_dataset("modelnet40", split, folder, layout=layout, num_points=64)
        assert plain.features is None
        assert torch.equal(plain.points, data.points)
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("modelnet40", "train", tmp_path, layout="h5" if layout != "h5" else "dat")
    assert modelnet40.TREES["h5" if layout != "h5" else "dat"] in str(caught.value)


def row_in_class(order: np.ndarray, row: int) -> int:
    return int(np.flatnonzero(order == row)[0]) % 2


def test_modelnet40_prefers_the_cache_and_cuts_it(tmp_path: Path) -> None:
    write_modelnet40_h5(tmp_path, num_points=32)
    write_modelnet40_text(tmp_path, num_points=48, classes=4)
    write_modelnet40_dat(tmp_path, num_points=64, classes=4)
    data = load_dataset("modelnet40", "test", tmp_path)
    assert data.points.shape == (8, 64, 3)
    assert torch.equal(
        load_dataset("modelnet40", "test", tmp_path, num_points=16).points, data.points[:, :16]
    )
    with pytest.raises(ValueError, match="`num_points`: expected 64 at most"):
        load_dataset("modelnet40", "test", tmp_path, num_points=65)
    assert load_dataset("modelnet40", "test", tmp_path, layout="h5").points.shape[1] == 32
    assert load_dataset("modelnet40", None, tmp_path, layout="text", num_points=8).points.shape == (16, 8, 3)


def test_modelnet40_missing_files_print_the_trees(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset("modelnet40", "train", tmp_path)
    assert all(tree in str(caught.value) for tree in modelnet40.TREES.values())
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_dataset("modelnet40", "train", tmp_path / "none")


def test_modelnet40_counts_and_published_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_modelnet40_h5(tmp_path, num_points=8)
    with pytest.warns(UserWarning, match="expected the 9840 published train clouds, got 80"):
        load_dataset("modelnet40", "train", tmp_path)
    with pytest.raises(ValueError, match="expected the 2468 published test clouds"):
        load_dataset("modelnet40", "test", tmp_path, strict=True)
    # With the right number of clouds the bytes are compared as well.
    monkeypatch.setitem(modelnet40._COUNTS, "h5", {"train": 80, "test": 80})
    with pytest.raises(ValueError, match=r"ply_data_test0.h5: expected the published file, got another"):
        load_dataset("modelnet40", "test", tmp_path, strict=True)
    data = load_dataset("modelnet40", "train", tmp_path)
    monkeypatch.setattr(modelnet40, "_MD5", checksum(data.files, "md5"))
    assert len(load_dataset("modelnet40", "train", tmp_path, strict=True)) == 80


def test_modelnet40_h5_lists(tmp_path: Path) -> None:
    write_modelnet40_h5(tmp_path, 1, num_points=8, classes=4)
    folder = tmp_path / "modelnet40_ply_hdf5_2048"
    listed = load_dataset("modelnet40", "train", tmp_path)
    (folder / "ply_data_train_0_id2file.json").unlink()
    (folder / "train_files.txt").unlink()  # without the list the files count in the order of their names
    assert torch.equal(load_dataset("modelnet40", "train", tmp_path).points, listed.points)
    names = load_dataset("modelnet40", "train", tmp_path).names
    assert names is not None
    assert names[0] == "ply_data_train0/0"
    assert names[2:] == (listed.names or ())[2:]
    (folder / "ply_data_train_1_id2file.json").write_text("[")
    with pytest.raises(ValueError, match=r"ply_data_train_1_id2file.json: expected JSON"):
        load_dataset("modelnet40", "train", tmp_path)
    (folder / "test_files.txt").write_text("ply_data_test7.h5\n")
    with pytest.raises(FileNotFoundError, match=r"ply_data_test7.h5: no such file, though test_files.txt"):
        load_dataset("modelnet40", "test", tmp_path)
    (folder / "test_files.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"test_files.txt: expected names of .h5 files, got none"):
        load_dataset("modelnet40", "test", tmp_path)


def test_text_takes_the_farthest_points(tmp_path: Path) -> None:
    from any2point.reference import farthest_point_sample

    write_modelnet40_text(tmp_path, 1, num_points=50, classes=2)
    data = load_dataset("modelnet40", "train", tmp_path, num_points=20)
    file = tmp_path / "modelnet40_normal_resampled" / "bathtub" / "bathtub_0001.txt"
    points = torch.from_numpy(np.loadtxt(file, np.float32, delimiter=","))[None, :, :3].contiguous()
    index = farthest_point_sample(points, 20)
    index = index[0] if isinstance(index, tuple) else index
    assert torch.equal(data.points[1], points[0, index.reshape(-1)])


def test_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_modelnet40_text(tmp_path, 1, num_points=20, classes=3)
    folder = tmp_path / "modelnet40_normal_resampled"

    def read(**options: object) -> tuple[PointDataset, int]:
        steps: list[int] = []
        data = load_dataset(
            "modelnet40",
            "train",
            tmp_path,
            num_points=10,
            progress=lambda done, _: steps.append(done),
            **options,
        )
        return data, len(steps)

    first, files = read()
    assert files == 3
    assert (folder / "modelnet40_train_10pts_fps.npz").exists()
    assert not list(folder.glob(".*"))
    again, files = read()
    assert files == 0
    assert torch.equal(first.points, again.points)
    # Another number of points, and normals that were not asked for the first time.
    assert len(load_dataset("modelnet40", "train", tmp_path, num_points=12)) == 3
    with_normals, files = read(features=["normals"])
    assert files == 0
    assert with_normals.features is not None
    # A changed file, a damaged cache.
    text = folder / "bed" / "bed_0001.txt"
    text.write_text("\n".join(f"{i}.5,0,{i},0,0,1" for i in range(20)))
    changed, files = read()
    assert files == 3
    assert not torch.equal(changed.points[2], first.points[2])
    kept = folder / "modelnet40_train_10pts_fps.npz"
    kept.write_bytes(kept.read_bytes()[:200])
    mended, files = read()
    assert files == 3
    assert torch.equal(mended.points, changed.points)
    # A folder that cannot be written, here because a file lies where it should be.
    kept.unlink()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    from any2point.data import resampled

    monkeypatch.setattr(
        resampled, "_places", lambda folder, cache: [tmp_path / "file" / "x", tmp_path / "home"]
    )
    assert read()[1] == 3
    assert read()[1] == 0
    monkeypatch.setattr(resampled, "_places", lambda folder, cache: [tmp_path / "file" / "x"])
    with pytest.warns(UserWarning, match="read again next time"):
        assert read()[1] == 3
    monkeypatch.undo()
    chosen = tmp_path / "chosen"
    assert read(cache=chosen)[1] == 3
    assert [file.name for file in chosen.iterdir()] == ["modelnet40_train_10pts_fps.npz"]


BAD_TEXT = {
    "word": ("1,2,3,4,5,6\n1,2,x,4,5,6\n", "expected rows x,y,z,nx,ny,nz, got"),
    "cut": ("1,2,3,4,5,6\n1,2,3", "expected rows x,y,z,nx,ny,nz, got"),
    "short": ("1,2,3,4,5,6\n", "expected 10 or more rows"),
    "narrow": ("1,2,3\n" * 20, "got 20 rows of 3"),
    "nan": ("1,2,3,4,nan,6\n" * 20, "NaN or infinity"),
    "binary": ("\x89PNG\0", "expected rows x,y,z"),
}


@pytest.mark.filterwarnings("ignore:loadtxt")
@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_one_clear_error(tmp_path: Path, name: str) -> None:
    write_modelnet40_text(tmp_path, 1, num_points=20, classes=2)
    content, message = BAD_TEXT[name]
    path = tmp_path / "modelnet40_normal_resampled" / "bathtub" / "bathtub_0001.txt"
    path.write_text(content, encoding="latin1")
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("modelnet40", "train", tmp_path, num_points=10)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_text_lists(tmp_path: Path) -> None:
    write_modelnet40_text(tmp_path, 1, num_points=20, classes=3)
    folder = tmp_path / "modelnet40_normal_resampled"
    (folder / "bed" / "bed_0001.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"bed_0001.txt: no such file; 1 of the 3 listed"):
        load_dataset("modelnet40", "train", tmp_path, num_points=10)
    (folder / "modelnet40_test.txt").write_text("airplane_0002\nspaceship_0001\n")
    with pytest.raises(ValueError, match=r"modelnet40_test.txt: expected names .* got 'spaceship_0001'"):
        load_dataset("modelnet40", "test", tmp_path, num_points=10)
    (folder / "modelnet40_shape_names.txt").write_text("airplane\nbed\n")
    with pytest.raises(ValueError, match="expected 40 class names, got 2"):
        load_dataset("modelnet40", "train", tmp_path)


# --- pickles ---

ARRAYS = [
    [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.eye(3))],
    [np.array([3], np.int32), np.int64(4), 5],
]


def same(left: object, right: object) -> bool:
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(same, left, right))
    return np.asarray(left).dtype.kind == np.asarray(right).dtype.kind and np.array_equal(left, right)  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_pickled_arrays_of_every_protocol_and_numpy(tmp_path: Path, protocol: int, core: bytes) -> None:
    content = pickle.dumps(ARRAYS, protocol)
    if protocol < 4:  # module names are lines; the length of later protocols' ones would have to change too
        content = content.replace(b"numpy._core", core)
        assert core in content
    (tmp_path / "a.dat").write_bytes(content)
    with open(tmp_path / "a.dat", "rb") as file:
        assert same(load_arrays(file), ARRAYS)


def test_pickles_of_python_2_and_of_the_other_byte_order(tmp_path: Path) -> None:
    text = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02i2K\x00K\x01\x87R(K\x03U\x01>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x04\x00\xff\x01\x00tb."
    )
    (tmp_path / "a.dat").write_bytes(text)
    with open(tmp_path / "a.dat", "rb") as file:
        assert load_arrays(file).tolist() == [255, 256]


class Evil:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]  # type: ignore[return-value]


def evil(victim: Path) -> dict[str, bytes]:
    objects = np.array([Evil(os.system, f"touch {victim}")], dtype=object)
    return {
        "system": pickle.dumps([[Evil(os.system, f"touch {victim}")], []]),
        "eval": pickle.dumps(Evil(eval, f"open({str(victim)!r}, 'w')")),
        "objects": pickle.dumps([[objects], [np.array([0])]]),
        "open": f"c__builtin__\nopen\n(V{victim}\nVw\ntR.".encode(),
        "attribute": b"cnumpy.core.multiarray\nscalar.__globals__\n.",
        "numpy function": b"cnumpy\nload\n(Vx\ntR.",
        "state of a function": b"c_codecs\nencode\n(NdVx\nI1\nstb.",
        "state of a class": b"cnumpy\nndarray\n(NdVx\nI1\nstb.",
        "void": pickle.dumps(np.zeros(2, [("a", "f4")])),
        "huge": pickle.dumps(np.zeros(2)).replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85"),
    }


@pytest.mark.parametrize("name", evil(Path("victim")))
def test_a_pickle_that_does_more_is_refused_and_not_run(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    write_modelnet40_dat(tmp_path, 1, num_points=8, classes=2)
    path = tmp_path / "modelnet40_normal_resampled" / "modelnet40_train_8192pts_fps.dat"
    path.write_bytes(evil(victim)[name])
    with pytest.raises(ValueError, match="expected a pickle of lists of arrays") as caught:
        load_dataset("modelnet40", "train", tmp_path)
    assert str(caught.value).startswith(str(path))
    assert not victim.exists()


def test_a_pickle_of_shared_lists_stays_small(tmp_path: Path) -> None:
    """Forty lists, each twice in the next: written out they would be 2**40."""
    value: list[object] = [1]
    for _ in range(40):
        value = [value, value]
    (tmp_path / "a.dat").write_bytes(pickle.dumps(value))
    with open(tmp_path / "a.dat", "rb") as file:
        read = load_arrays(file)
    assert read[0] is read[1]


@pytest.mark.parametrize("protocol", [2, 5])
def test_damaged_pickles(tmp_path: Path, protocol: int) -> None:
    """Whatever happens to a pickle, the reader gives lists and arrays or a ValueError."""
    whole = pickle.dumps(ARRAYS, protocol)
    generator = np.random.default_rng(protocol)
    path = tmp_path / "a.dat"
    read = 0
    for trial in range(400):
        content = bytearray(whole[: generator.integers(len(whole))] if trial % 3 == 0 else whole)
        for _ in range(1 + trial % 2):
            if content:
                content[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(bytes(content))
        try:
            with open(path, "rb") as file:
                value = load_arrays(file)
        except ValueError:
            continue
        read += 1
        assert isinstance(value, (list, tuple, dict, np.ndarray, int, float, str, bytes, type(None)))
    assert read > 0


CLOUD = np.zeros((4, 6), np.float32)
BAD_DAT = {
    "one list": ([CLOUD], "expected .clouds, labels., got another structure"),
    "text": ("clouds", "expected .clouds, labels., got another structure"),
    "sizes": ([[CLOUD, CLOUD[:3]], [0, 0]], "one size as labels, got 2 of the sizes"),
    "labels": ([[CLOUD, CLOUD], [0]], "got 2 of the sizes .* and 1 labels"),
    "label": ([[CLOUD], [40]], "labels from 0 to 39, got 40 to 40"),
    "flat": ([[CLOUD[0]], [0]], r"expected clouds \[N, 3 or more\], got \[6\]"),
    "nan": ([[CLOUD * np.nan], [0]], "NaN or infinity"),
    "words": ([["a"], ["b"]], "expected"),
    "none": ([[], []], "expected"),
}


@pytest.mark.parametrize("name", [*BAD_DAT, "cut"])
def test_bad_dat_is_one_clear_error(tmp_path: Path, name: str) -> None:
    write_modelnet40_dat(tmp_path, 1, num_points=8, classes=2)
    path = tmp_path / "modelnet40_normal_resampled" / "modelnet40_train_8192pts_fps.dat"
    content, message = BAD_DAT.get(name, (None, "expected a pickle of lists of arrays"))
    path.write_bytes(pickle.dumps(content) if content is not None else path.read_bytes()[:200])
    with pytest.raises(ValueError, match=message) as caught:
        load_dataset("modelnet40", "train", tmp_path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_dat_with_names(tmp_path: Path) -> None:
    """Some caches hold a third list, of file names."""
    write_modelnet40_dat(tmp_path, 1, num_points=8, classes=2)
    path = tmp_path / "modelnet40_normal_resampled" / "modelnet40_train_8192pts_fps.dat"
    path.write_bytes(pickle.dumps(([CLOUD, CLOUD], [np.array([1]), np.array([0])], ["a", "b"])))
    assert load_dataset("modelnet40", "train", tmp_path).labels.tolist() == [1, 0]


# --- checksums and names ---


def test_checksums(tmp_path: Path) -> None:
    write_scanobjectnn(tmp_path)
    folder = tmp_path / "h5_files" / "main_split"
    data = load_dataset("scanobjectnn", None, tmp_path)
    sums = checksum(data.files)
    assert list(sums) == [PB, PB.replace("training", "test")]
    assert verify(folder, sums) == 2
    assert verify(folder) == 0  # nothing to compare with
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    assert verify(folder) == 2
    assert len(load_dataset("scanobjectnn", None, tmp_path)) == 60
    content = bytearray((folder / PB).read_bytes())
    content[-9] ^= 1  # one bit of the last array
    (folder / PB).write_bytes(content)
    with pytest.raises(ValueError, match=f"{PB}: expected SHA-256 {sums[PB]}, got"):
        load_dataset("scanobjectnn", "train", tmp_path)
    assert len(load_dataset("scanobjectnn", "test", tmp_path)) == 30  # the other file is whole
    with pytest.raises(FileNotFoundError, match=r"none\.h5: no such file"):
        verify(folder, {"none.h5": "0" * 64})
    (folder / "SHA256SUMS").write_text("something else\n")
    with pytest.raises(ValueError, match="SHA256SUMS: expected a SHA-256 and a file name"):
        load_dataset("scanobjectnn", "test", tmp_path)
    assert checksum([]) == {}
    nested = checksum([folder / PB, tmp_path / "h5_files" / "main_split" / ".." / "main_split" / PB])
    assert set(nested.values()) == set(checksum([folder / PB]).values())


def test_names_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scanobjectnn(tmp_path)
    monkeypatch.delenv("ANY2POINT_DATA", raising=False)
    with pytest.raises(ValueError, match="`root`: expected the folder of scanobjectnn"):
        load_dataset("scanobjectnn", "train")
    monkeypatch.setenv("ANY2POINT_DATA", str(tmp_path))
    assert len(load_dataset("scanobjectnn", "train")) == 30
    with pytest.raises(
        ValueError, match="expected options out of variant, background, strict; got fold, layout"
    ):
        load_dataset("scanobjectnn", "train", layout="h5", fold=1)
    with pytest.raises(ValueError, match="`variant`: expected one of OBJ_BG"):
        load_dataset("scanobjectnn", "train", variant="PB")
    with pytest.raises(ValueError, match=r"`features`: expected a list such as \['mask'\], got 'mask'"):
        load_dataset("scanobjectnn", "train", features="mask")
    with pytest.raises(ValueError, match="`features`: expected mask or none, got normals"):
        load_dataset("scanobjectnn", "train", features=["normals"])
    with pytest.raises(ValueError, match="`features`: expected normals or none"):
        load_dataset("modelnet40", "train", tmp_path, features=["mask"])
    with pytest.raises(ValueError, match="`layout`: expected auto, dat, text, h5"):
        load_dataset("modelnet40", "train", tmp_path, layout="off")
    for name in ("scanobjectnn", "modelnet40", "sh3d15"):
        with pytest.raises(ValueError, match="`split`"):
            load_dataset(name, "val")
    with pytest.raises(ValueError, match="`root`: expected none beside sh3d15"):
        load_dataset("sh3d15", "train", tmp_path)
    with pytest.raises(ValueError, match="`features`: expected height or none of sh3d15"):
        load_dataset("sh3d15", "train", features=["normals"])
    tall = load_dataset("sh3d15", "test", features=["height"], up=1)
    assert tall.feature_names == ("height",)
    assert tall.features is not None
    assert torch.equal(tall.features.amin(dim=1), torch.zeros(137, 1))
    assert torch.equal(
        tall.features[..., 0], tall.points[..., 1] - tall.points[..., 1].amin(dim=1, keepdim=True)
    )


def test_checksums_of_text_and_folders(tmp_path: Path) -> None:
    write_modelnet40_text(tmp_path, 1, num_points=20, classes=3)
    folder = tmp_path / "modelnet40_normal_resampled"
    name = "bed/bed_0001.txt"
    (folder / "SHA256SUMS").write_text(f"{'0' * 64} *{name}\n")
    with pytest.raises(ValueError, match=r"bed_0001.txt: expected SHA-256 0000"):
        load_dataset("modelnet40", "train", tmp_path, num_points=10)
    with pytest.raises(ValueError, match=r"bed_0001.txt: expected SHA-256 0000"):
        load_dataset(folder, None, num_points=10)
    (folder / "SHA256SUMS").write_text(f"{checksum([folder / name])['bed_0001.txt']} *{name}\n")
    data = load_dataset("modelnet40", "train", tmp_path, num_points=10)
    assert name in checksum(data.files)
    with pytest.raises(FileNotFoundError, match=r"no such folder, and no data set of this name \(sh3d15, "):
        load_dataset("shapenet", "train")
