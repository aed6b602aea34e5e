"""The pictures: whole PNG files, for lines and for images, without pyplot's global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from any2point import Any2Point, Any2PointConfig, Source

viz = pytest.importorskip("any2point.viz")
pytest.importorskip("matplotlib")


def is_png(path: Path) -> bool:
    data = path.read_bytes()
    return data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND" and len(data) > 5000


@pytest.mark.parametrize("family", ["bert", "dinov2", "features"])
def test_projection(tmp_path: Path, family: str) -> None:
    model = tiny.model(input_features=1 if family == "features" else 0)
    points = tiny.dataset().points[1]
    if family == "features":
        points = torch.cat([points, points[:, :1]], dim=1)
    if family == "dinov2":
        source = Source.random("dinov2", width=48, depth=1, heads=4, positions=(5, 5))
        config = Any2PointConfig(num_points=64, num_tokens=8, neighbors=4, views=5, adapter_dim=4, cell=1.0)
        model = Any2Point(config, source)
    model.train()
    viz.projection_picture(model, points, tmp_path / "a.png")
    assert is_png(tmp_path / "a.png")
    assert model.training
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_confusion_and_curves(tmp_path: Path) -> None:
    viz.confusion_picture(torch.tensor([[5, 1], [0, 0]]), ("a", "b"), tmp_path / "a.png")
    record = {"epoch": 1, "loss": 1.0, "train_accuracy": 0.5}
    histories = {"one": [record, record | {"epoch": 2, "test_accuracy": 0.5}], "two": [record]}
    viz.curves_picture(histories, tmp_path / "b.png")
    assert is_png(tmp_path / "a.png")
    assert is_png(tmp_path / "b.png")
    with pytest.raises(ValueError, match="`confusion`"):
        viz.confusion_picture(torch.zeros(2, 3), ("a", "b"), tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_import_is_lazy() -> None:
    code = "import any2point.viz, any2point.train, sys; print({'matplotlib', 'rich'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert result.stdout == "set()\n"
