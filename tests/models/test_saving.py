"""Saving and loading: round trips, sources found again, folders that are broken or contradict themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FAMILIES, clouds, make, make_source

from any2point import Any2Point


def test_state_dict_round_trip() -> None:
    first, points = make(), clouds()
    second = Any2Point(first.config, make_source(seed=5)).eval()
    assert not torch.equal(first(points), second(points))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(points), second(points))
    assert first.config.resolve(make_source()) == first.config


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, points = make(family), clouds()
    model.class_names = ["a", "b", "c", "d", "e"]
    want = model(points)
    model.save_pretrained(tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Any2Point.from_pretrained(tmp_path / "run")
    assert torch.equal(loaded(points), want)
    assert loaded.class_names == model.class_names
    assert loaded.config == model.config
    assert not loaded.training

    # The source from a file, saved along, or given
    folder = tmp_path / "whole"
    model.save_pretrained(folder, include_source=True)
    description = json.loads((folder / "config.json").read_text())
    description["source"]["origin"] = {}
    (folder / "config.json").write_text(json.dumps(description))
    assert torch.equal(Any2Point.from_pretrained(folder)(points), want)
    (folder / "source.safetensors").unlink()
    description["source_included"] = False
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"`source`: cannot find the .* give source="):
        Any2Point.from_pretrained(folder)
    assert torch.equal(Any2Point.from_pretrained(folder, make_source(family))(points), want)
    with pytest.raises(ValueError, match="are not those that the model was trained with"):
        Any2Point.from_pretrained(folder, make_source(family, seed=1))


def test_broken_folders(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = make()
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    data, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(data[:-10])
    with pytest.raises(ValueError, match="is not a complete safetensors file"):
        Any2Point.from_pretrained(tmp_path)
    weights.write_bytes(data)
    for broken, message in (
        ("{", "cannot read"),
        ("[]", "expected a JSON object"),
        ('{"model_type": "bert"}', "expected model_type 'any2point'"),
        ('{"model_type": "any2point"}', "is incomplete"),
        (text.replace('"views"', '"vistas"'), "expected fields of Any2PointConfig"),
    ):
        config.write_text(broken)
        with pytest.raises(ValueError, match=message):
            Any2Point.from_pretrained(tmp_path)
    description = json.loads(text)
    description["config"]["num_classes"] = 7
    config.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"expected shape \[7, 256\]"):
        Any2Point.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        Any2Point.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="`directory`: expected a folder or a repository, got NoneType"):
        Any2Point.from_pretrained(None)  # type: ignore[arg-type]
    config.write_text(text)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({k: v.long() for k, v in safetensors.load(data).items()}, weights)
    with pytest.raises(
        ValueError, match=r"`directory`: expected torch.float32 in .*, got torch.int64 for 'cls"
    ):
        Any2Point.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"`path`: no file .*model.safetensors"):
        Any2Point.from_pretrained(tmp_path)


def test_descriptions_of_sources_that_cannot_be(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    make().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    text = file.read_text()
    for name in (
        "family",
        "modality",
        "width",
        "depth",
        "heads",
        "positions",
        "layout",
        "fingerprint",
        "origin",
    ):
        for value in (None, 1.5, "x" if name in ("width", "depth", "heads", "layout") else 3.5):
            description = json.loads(text)
            description["source"][name] = value
            file.write_text(json.dumps(description))
            with pytest.raises(
                ValueError, match=rf"`directory`: expected \w+, got .* as '{name}' in .*config.json"
            ):
                Any2Point.from_pretrained(tmp_path)
        del description["source"][name]
        file.write_text(json.dumps(description))
        with pytest.raises(
            ValueError, match=f"`directory`: .*config.json is incomplete .'{name}' is missing"
        ):
            Any2Point.from_pretrained(tmp_path)
    description = json.loads(text)
    description["source"]["layout"]["rotary"] = True
    file.write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"`directory`: unknown layout of a source in .* 'rotary'"):
        Any2Point.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    make().save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("any2point.models.hub.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(num_classes=3).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
