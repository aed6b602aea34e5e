"""The sample set's integrity, folder data sets, and the invariants of the transforms."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from any2point.data import PointDataset, folder_dataset, load_dataset, sample_set
from any2point.data.dataset import resample, stratified_mask
from any2point.data.sample import SAMPLE_FILE, grouped_mask

CONTENT = "82d658d3fcbd60e880cb973ee303beecb16f39ae3ca6dec223f731092a27acc1"
LICENCES = {"CC0-1.0", "CC-BY-3.0", "CC-BY-3.0-US"}


def test_sample_set_is_what_the_build_script_made() -> None:
    file = np.load(SAMPLE_FILE, allow_pickle=False)
    content = file["points"].tobytes() + file["labels"].tobytes() + file["test"].tobytes()
    assert hashlib.sha256(content).hexdigest() == CONTENT
    assert file["points"].shape == (458, 2048, 3)
    assert file["points"].dtype == np.float16
    assert SAMPLE_FILE.stat().st_size < 7_000_000
    counts = np.bincount(file["labels"])
    assert len(counts) == len(file["classes"]) == 15
    assert counts.min() == 15
    assert len(np.unique(file["points"].reshape(458, -1), axis=0)) == 458


def test_sample_set_licences() -> None:
    file = np.load(SAMPLE_FILE, allow_pickle=False)
    assert set(file["licence"].tolist()) == LICENCES
    text = SAMPLE_FILE.with_name("ATTRIBUTION.md").read_text()
    for key in ("source", "licence"):
        assert all(f"{value}" in text for value in np.unique(file[key]))
    entries = zip(
        file["names"], [file["classes"][i] for i in file["labels"]], file["creator"], file["licence"]
    )
    assert all(
        f"| {name} | {label} | {creator} | {licence} |" in text for name, label, creator, licence in entries
    )
    assert (file["creator"] != "").all()


def test_split_keeps_near_copies_together() -> None:
    file = np.load(SAMPLE_FILE, allow_pickle=False)
    for group in np.unique(file["group"]):
        assert len(np.unique(file["test"][file["group"] == group])) == 1
    share = np.bincount(file["labels"], file["test"]) / np.bincount(file["labels"])
    assert (abs(share - 0.3) < 0.04).all()
    train, test, both = sample_set("train"), sample_set("test"), sample_set(None)
    assert (len(train), len(test), len(both)) == (321, 137, 458)
    other = sample_set("test", seed=1)
    assert len(other) == 137
    assert not torch.equal(other.points, test.points)
    assert torch.equal(other.points, sample_set("test", seed=1).points)
    with pytest.raises(ValueError, match="`split`"):
        sample_set("val")


def test_sample_points_are_in_the_unit_sphere() -> None:
    points = sample_set(None).points
    assert points.dtype == torch.float32
    assert points.norm(dim=-1).max() <= 1.001
    assert points.norm(dim=-1).amax(dim=1).min() >= 0.999
    assert points.mean(dim=1).norm(dim=-1).max() < 1e-3


def test_grouped_mask() -> None:
    labels, group = np.repeat([0, 1], 10), np.repeat(np.arange(4), 5)
    mask = grouped_mask(labels, group, 0.5, seed=0)
    assert mask.sum() == 10
    assert all(len(np.unique(mask[group == g])) == 1 for g in range(4))


def test_point_dataset_checks() -> None:
    points, labels = torch.zeros(4, 8, 3), torch.tensor([0, 1, 1, 0])
    data = PointDataset(points, labels, ("a", "b"), tuple("pqrs"))
    assert len(data) == 4
    assert data.subset([2, 0]).names == ("r", "p")
    first, second = data.split(0.5)
    assert len(first) == len(second) == 2
    assert sorted(second.labels.tolist()) == [0, 1]
    with pytest.raises(ValueError, match="`points`"):
        PointDataset(torch.zeros(4, 8, 2), labels, ("a", "b"))
    with pytest.raises(ValueError, match="`labels`: expected 0 to 0"):
        PointDataset(points, labels, ("a",))
    with pytest.raises(ValueError, match=r"`labels`: expected \[4\]"):
        PointDataset(points, labels[:3], ("a", "b"))
    with pytest.raises(ValueError, match="finite"):
        PointDataset(points / 0, labels, ("a", "b"))


def test_stratified_mask() -> None:
    labels = np.array([0] * 10 + [1] * 3 + [2] * 2 + [3])
    assert np.bincount(labels, stratified_mask(labels, 0.3)).tolist() == [3, 1, 1, 0]
    with pytest.raises(ValueError, match="`fraction`"):
        stratified_mask(labels, 1.5)


def write_folder(root: Path, counts: dict[str, int]) -> None:
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            np.savetxt(root / name / f"cloud{i}.xyz", generator.normal(size=(20 + 10 * i, 3)))


def test_folder_dataset(tmp_path: Path) -> None:
    write_folder(tmp_path, {"chair": 4, "Apple": 4})
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / "chair" / "render.png").write_bytes(b"\x89PNG")
    seen: list[tuple[int, int]] = []
    train = folder_dataset(
        tmp_path, "train", num_points=32, progress=lambda done, all: seen.append((done, all))
    )
    test = folder_dataset(tmp_path, "test", num_points=32)
    assert train.class_names == ("Apple", "chair")
    assert train.points.shape == (6, 32, 3)
    assert seen[-1] == (6, 6)
    assert len(test) == 2
    assert not set(train.names or ()) & set(test.names or ())
    assert torch.equal(train.points, load_dataset(tmp_path, "train", num_points=32).points)


def test_folder_dataset_with_fixed_split(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 3})
    write_folder(tmp_path / "test", {"a": 1, "b": 1})
    assert len(folder_dataset(tmp_path, "train", num_points=16)) == 5
    assert len(folder_dataset(tmp_path, "test", num_points=16)) == 2


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "2 or more classes, got 0"),
        ({"a": 2}, "got 1"),
        ({"a": 2, "empty": 0}, "in class 'empty', got none"),
    ],
)
def test_folder_dataset_refuses(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    write_folder(tmp_path, counts)
    with pytest.raises(ValueError, match=message):
        folder_dataset(tmp_path)


def test_folder_dataset_names_the_bad_file(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "broken.ply").write_bytes(b"ply\n")
    with pytest.raises(ValueError, match=r"b/broken.ply: expected a PLY header"):
        folder_dataset(tmp_path)
    with pytest.raises(FileNotFoundError):
        folder_dataset(tmp_path / "none")
    with pytest.raises(ValueError, match="got a file"):
        folder_dataset(tmp_path / "b" / "broken.ply")


def test_resample() -> None:
    points = np.arange(30.0).reshape(10, 3)
    few = resample(points, 4, np.random.default_rng(0))
    assert len(np.unique(few, axis=0)) == 4
    many = resample(points, 25, np.random.default_rng(0))
    assert len(np.unique(many, axis=0)) == 10
