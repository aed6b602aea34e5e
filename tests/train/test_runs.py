"""Runs as folders: what is in them, what they are continued with, and who may write into them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from published_layouts import write_scanobjectnn

from any2point import Any2Point, Source
from any2point.cli import main
from any2point.data import PointDataset, checksum, load_dataset
from any2point.train import Recipe, TrainConfig, evaluate, files, fit, load_recipe
from any2point.train.progress import SilentReporter

SMALL = """
source: random:bert
source_options: {width: 48, depth: 1, heads: 4, positions: [16]}
data: scanobjectnn
model: {num_points: 64, num_tokens: 8, neighbors: 4, views: 2, adapter_dim: 4, head_width: 16}
train: {epochs: 2, batch_size: 3, warmup_epochs: 0, lr: 1e-3, pool: 0, device: cpu, precision: fp32,
        tensorboard: false}
"""
pytestmark = pytest.mark.filterwarnings("ignore:.*clouds of the published file")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ScanObjectNN in data, its recipe, and in run what the command made with relative paths."""
    root = tmp_path_factory.mktemp("scene")
    write_scanobjectnn(root / "data", 2, classes=3, num_points=128)
    (root / "recipe.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["train", "--recipe", "recipe.yaml", "--data", "data", "--output", "run"]) == 0
    return root


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for part in ("any2point: ", *parts):
        assert part in line


def test_a_run_is_found_from_any_folder(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(scene / "run" / "recipe.yaml").data_options == {"root": str(scene / "data")}
    assert main(["eval", str(scene / "run")]) == 0
    assert main(["train", "--resume", "--output", str(scene / "run")]) == 0
    assert not list(tmp_path.iterdir())
    assert "Warning" not in capsys.readouterr().err


def test_links_in_a_cache_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's cache holds links to files without names, next to which there is no configuration."""
    from any2point.train import demo

    (tmp_path / "blob").write_bytes(b"")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    monkeypatch.setattr(demo, "open_source", lambda name: name)
    _, recipe = demo._open(str(tmp_path / "model.safetensors"), Recipe())
    assert recipe.source == str(tmp_path / "model.safetensors")


def test_checksums_of_the_data(scene: Path) -> None:
    sets = [load_dataset("scanobjectnn", split, scene / "data") for split in ("train", "test")]
    sums = json.loads((scene / "run" / "results.json").read_text())["files"]
    assert sums == checksum([file for data in sets for file in data.files])
    assert len(sums) == 2


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--set", "model.views=3"], ["'views': 2", "'views': 3"]),
        (["--set", "model.dropout=0.1"], ["model", "'dropout': 0.1"]),
        (["--data", "sh3d15"], ["data scanobjectnn", "data sh3d15"]),
        (["--set", "data_options.variant=OBJ_BG"], ["data_options", "OBJ_BG"]),
        (["--set", "source_options.depth=2"], ["'depth': 1", "'depth': 2"]),
        (["--precision", "bf16"], ["precision 'fp32'", "precision 'bf16'"]),
        (["--epochs", "9"], ["epochs 2", "epochs 9"]),
    ],
)
def test_a_run_is_continued_as_it_was_started(
    scene: Path, capsys: pytest.CaptureFixture[str], more: list[str], parts: list[str]
) -> None:
    before = {path: path.read_bytes() for path in (scene / "run").iterdir()}
    refused(capsys, ["train", "--resume", "--output", str(scene / "run"), *more], *parts)
    assert before == {path: path.read_bytes() for path in (scene / "run").iterdir()}


def test_the_same_files_elsewhere(scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = ["train", "--resume", "--output", str(scene / "run"), "--data", str(tmp_path)]
    write_scanobjectnn(tmp_path, 2, classes=3, num_points=128, seed=1)
    refused(capsys, resume, "expected the training set that the run was started with, got another")
    write_scanobjectnn(tmp_path, 2, classes=3, num_points=128)
    assert main(resume) == 0


def test_other_models_are_refused(tmp_path: Path) -> None:
    def train(model: Any) -> None:
        config = tiny.config(epochs=1)
        fit(model, tiny.dataset(), None, config, tmp_path, resume=True, reporter=SilentReporter())

    model = tiny.model()
    train(model)
    with pytest.raises(ValueError, match="expected the state of this model, got another's"):
        train(tiny.model(adapter_dim=3))
    other = Source.random("bert", seed=1, width=48, depth=2, heads=4, positions=(16,))
    with pytest.raises(ValueError, match="expected the frozen transformer that the run was started with"):
        train(Any2Point(model.config, other))


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    """A second process is refused at once; afterwards, and after an error, the folder is free."""

    def train(data: PointDataset) -> None:
        config = tiny.config(epochs=1)
        fit(tiny.model(), data, None, config, tmp_path / "run", reporter=SilentReporter())

    in_use = pytest.raises(ValueError, match="expected a folder of its own, got one that a run is using")
    with files.reserved(tmp_path / "run"), in_use:
        train(tiny.dataset())
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="at least 64 points"):
        train(tiny.dataset().with_inputs(tiny.dataset().points[:, :32]))
    assert not (tmp_path / "run").exists()
    train(tiny.dataset())


def test_evaluation_is_as_precise_as_training(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []

    def recording(*arguments: Any, **options: Any) -> Any:
        used.append(arguments[2].precision)
        return evaluate(*arguments, **options)

    monkeypatch.setattr("any2point.train.run.evaluate", recording)
    assert main(["eval", str(scene / "run")]) == 0
    assert main(["eval", str(scene / "run"), "--precision", "bf16"]) == 0
    assert used == ["fp32", "bf16"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("yaml", "recipes need PyYAML: pip install 'any2point[train]'"),
        ("safetensors.torch", "saving a model needs safetensors: pip install 'any2point[sources]'"),
        ("h5py", "reading .h5 files takes h5py"),
        ("torch.utils.tensorboard", "`tensorboard`: not installed; pip install 'any2point[train]'"),
    ],
)
def test_missing_packages_are_told_before_the_work(
    scene: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    missing: str,
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr("any2point.train.engine._Run.run", lambda run: pytest.fail("the work was begun"))
    recipe, data = str(scene / "recipe.yaml"), str(scene / "data")
    train = ["train", "--recipe", recipe, "--data", data, "--output", str(tmp_path / "run")]
    refused(capsys, [*train, "--set", "train.tensorboard=true"], message)
    assert not (tmp_path / "run").exists()


def test_nothing_to_hold_out(tmp_path: Path) -> None:
    one_of_each = tiny.dataset(3)
    with pytest.raises(ValueError, match=r"`select`: expected .last. where no class has two clouds"):
        fit(tiny.model(), one_of_each, None, tiny.config(select="validation"), tmp_path / "run")


def test_a_run_on_a_published_set_is_tested_on_a_folder(
    scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some of its classes, in another order than the alphabet's."""
    run, folder = str(scene / "run"), tmp_path / "mine"
    rng = np.random.default_rng(0)
    for name in ("box", "bag"):
        (folder / "test" / name).mkdir(parents=True)
        (folder / "train" / name).mkdir(parents=True)
        np.save(folder / "test" / name / "a.npy", rng.random((200, 3), dtype=np.float32))
    assert main(["eval", run, "--data", str(folder), "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())["test"]
    assert {name: row["clouds"] for name, row in result["classes"].items()} == {"bag": 1, "box": 1}
    assert sum(result["confusion"][0]) == sum(result["confusion"][2]) == 1  # bag, bin, box
    (folder / "test" / "box").rename(folder / "test" / "rocket")
    (folder / "train" / "box").rename(folder / "train" / "rocket")
    refused(capsys, ["eval", run, "--data", str(folder)], "rocket: expected one of the classes ['bag'")
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    assert main(["eval", run, "--data", str(tmp_path / "empty")]) == 2
    assert "h5_files" in capsys.readouterr().err  # what is missing of the published set


def test_evaluation_without_matplotlib_keeps_its_numbers(
    scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["eval", str(scene / "run"), "--output", str(tmp_path / "out")]) == 0
    assert "pip install" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_an_output_that_cannot_be_is_told_before_the_work(
    scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("any2point.train.run.evaluate", lambda *_, **__: pytest.fail("the work was done"))
    refused(capsys, ["eval", str(scene / "run"), "--output", str(scene / "recipe.yaml")], "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: null", "--data: expected a data set or a folder"),
        ("data: [1]", "`data`: expected a name or a path, got [1]"),
        ("source: 3", "`source`: expected a name or a path, got 3"),
        ("points: many", "`points`: expected a whole number of 1 or more, got 'many'"),
        ("test_fraction: 2", "`test_fraction`: expected a number between 0 and 1, got 2"),
        ("train: {scale: 3}", "`scale`: expected two numbers above 0, the smaller first, got 3"),
        ("train: {seed: x}", "`seed`: expected a whole number of 0 or more, got 'x'"),
        ("train: {pool: 1.5}", "`pool`: expected a whole number of 0 or more, got 1.5"),
        ("train: {epoch: 3}", "got epoch"),
        ("trian: {}", "got trian"),
        ("model: {view: 3}", "view"),
        ("train: {lr: 1, seed: 1, lr: 2}", "expected YAML: `lr` stands there twice, from line 3"),
        ("data: scanobjectnn", "`root`: expected the folder of scanobjectnn (on the command line --data"),
        ("train: {select: best}", "`select`: expected one of ('last', 'validation', 'test'), got 'best'"),
    ],
)
def test_mistakes_in_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    recipe = tmp_path / "r.yaml"
    source = "" if "source" in text else "source: random:bert\n"
    recipe.write_text(f"source_options: {{width: 48, depth: 1}}\n{source}{text}\n")
    refused(capsys, ["train", "--recipe", str(recipe), "--output", str(tmp_path / "run")], message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "5.0e-4", "0.5e-3", "+.5e-3", "0.0005"])
def test_numbers_as_people_write_them(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(f"train: {{lr: {text}}}\n")
    assert load_recipe(tmp_path / "r.yaml").train == TrainConfig(lr=5e-4)


def test_warnings_are_one_line(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        assert main(["eval", str(scene / "run")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("any2point: warning: ")
    assert line.endswith("expected the 2882 clouds of the published file, got 6")
