"""The command line: what it prints, what it writes, and that every mistake is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("typer")

from any2point import info
from any2point.cli import main
from any2point.data import sample_set
from any2point.data.points import write_ply

RECIPE = """
source: random:bert
source_options: {width: 48, depth: 2, heads: 4, positions: [16]}
model: {num_points: 64, num_tokens: 8, neighbors: 4, views: 2, adapter_dim: 4, head_width: 16}
train: {epochs: 2, batch_size: 8, warmup_epochs: 0, pool: 0, device: cpu, precision: fp32}
points: 128
test_fraction: 0.5
"""


def write_text(
    path: Path, points: np.ndarray, separator: str = " ", head: str = "", prefix: str = ""
) -> None:
    rows = (prefix + separator.join(f"{value:.6f}" for value in point) + "\n" for point in points)
    path.write_text(head + "".join(rows))


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    ".ply": write_ply,
    ".xyz": write_text,
    ".txt": lambda path, points: write_text(path, points, ","),
    ".csv": lambda path, points: write_text(path, points, ",", "x,y,z\n"),
    ".npy": np.save,
    ".obj": lambda path, points: write_text(path, points, " ", prefix="v "),
    ".off": lambda path, points: write_text(path, points, " ", f"OFF\n{len(points)} 0 0\n"),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of clouds in two classes and a run that was trained on it by the command."""
    root = tmp_path_factory.mktemp("world")
    shapes = sample_set("train")
    for name in ("person", "table"):
        (root / "clouds" / name).mkdir(parents=True)
        rows = (shapes.labels == shapes.class_names.index(name)).nonzero()[:, 0][:8].tolist()
        for row in rows:
            write_ply(root / "clouds" / name / f"{row}.ply", shapes.points[row, :256].numpy())
    (root / "recipe.yaml").write_text(RECIPE)
    assert main(train(root, root / "run")) == 0
    return root


def train(root: Path, output: Path, *more: str) -> list[str]:
    data, recipe = str(root / "clouds"), str(root / "recipe.yaml")
    return ["train", "--data", data, "--recipe", recipe, "--output", str(output), *more]


@pytest.fixture
def scene(world: Path, tmp_path: Path) -> Path:
    """A copy of the world that a test may break."""
    shutil.copytree(world, tmp_path / "scene")
    return tmp_path / "scene"


def test_train_writes_a_whole_run(world: Path) -> None:
    names = {"config.json", "model.safetensors", "recipe.yaml", "metrics.jsonl", "results.json", "state.pt"}
    pictures = {"confusion.png", "curves.png", "projection.png"}
    found = {path.name for path in (world / "run").iterdir()}
    (events,) = found - names - pictures
    assert found >= names | pictures
    assert events.startswith("events.out.tfevents.")
    assert all((world / "run" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)


def test_flags_override_the_recipe(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--epochs", "1", "--seed", "3", "--set", "model.views=3", "--set", "train.select=validation"]
    assert main(train(world, tmp_path / "run", *more)) == 0
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "views: 3" in recipe
    assert "select: validation" in recipe
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    out = capsys.readouterr().out
    assert "total without head" in out
    assert f"run folder: {tmp_path / 'run'}" in out


def test_eval(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(world / "run"), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    accuracy = json.loads((world / "run" / "results.json").read_text())["test"]["accuracy"]
    assert f"accuracy {100 * accuracy:.1f} %" in out
    written = json.loads((tmp_path / "out" / "results.json").read_text())["test"]
    assert written["accuracy"] == accuracy
    assert sum(row["right"] for row in written["classes"].values()) == accuracy * written["clouds"]
    assert (tmp_path / "out" / "confusion.png").exists()
    assert main(["eval", str(world / "run"), "--output", str(tmp_path / "vote"), "--vote", "3"]) == 0
    vote = json.loads((tmp_path / "vote" / "results.json").read_text())["test"]
    assert vote["vote"] == 3
    assert vote["loss"] != written["loss"]
    assert main(["eval", str(world / "run"), "--vote", "0"]) == 2


@pytest.mark.parametrize("suffix", WRITERS)
def test_predict_reads_every_format(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    cloud = tmp_path / f"cloud{suffix}"
    WRITERS[suffix](cloud, sample_set("test").points[0, :512].numpy())
    assert main(["predict", str(world / "run"), str(cloud), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == str(cloud)
    assert answer["class"] in ("person", "table")
    assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-3)
    assert main(["predict", str(world / "run"), str(cloud), "--top", "1"]) == 0
    assert capsys.readouterr().out.startswith(f"{cloud}: {answer['class']} ")


def one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.startswith("any2point: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    for part in parts:
        assert part in captured.err


CLOUDS = {
    "none.ply": (None, "no such file"),
    "empty.ply": (b"", "got an empty file"),
    "picture.ply": (b"\x89PNG\r\n" + bytes(99), "expected a PLY file"),
    "cut.npy": (b"\x93NUMPY\x01\x00v\x00{'descr'", "expected a .npy file"),
    "nan.xyz": (b"0 0 nan\n" * 99, "NaN or infinity in 99"),
    "few.xyz": (b"0 0 0\n1 1 1\n", "expected at least 64 points, which the model takes, got 2"),
    "flat.obj": (b"v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n", "zero area"),
    "scan.las": (b"LASF", "expected one of .ply"),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_predict_refuses(scene: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    content, message = CLOUDS[name]
    if content is not None:
        (scene / name).write_bytes(content)
    good = scene / "clouds" / "person"
    arguments = [str(next(good.iterdir())), str(scene / name)]
    assert main(["predict", str(scene / "run"), *arguments]) == 2
    assert capsys.readouterr().out == ""
    assert main(["predict", str(scene / "run"), *arguments]) == 2
    one_line(capsys, str(scene / name), message)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda run: shutil.rmtree(run), "no such run"),
        (lambda run: (run / "config.json").unlink(), "expected a trained model, found an unfinished run"),
        (lambda run: cut_in_half(run / "config.json"), "config.json"),
        (lambda run: (run / "config.json").write_text('{"model_type": "llama"}'), "model_type"),
        (lambda run: (run / "model.safetensors").unlink(), "model.safetensors"),
        (lambda run: cut_in_half(run / "model.safetensors"), "model.safetensors"),
        (lambda run: (run / "model.safetensors").write_bytes(b"PK\3\4"), "model.safetensors"),
        (lambda run: (run / "recipe.yaml").write_text("{"), "recipe.yaml: expected YAML"),
    ],
)
def test_broken_runs(
    scene: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object], message: str
) -> None:
    harm(scene / "run")
    assert main(["predict", str(scene / "run"), str(next((scene / "clouds" / "person").iterdir()))]) == 2
    one_line(capsys, message)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data", "/nowhere"], "/nowhere: no such folder"),
        (["--data", "broken"], "bad.ply: expected a PLY file"),
        (["--data", "single"], "2 or more classes, got 1"),
        (["--source", "/nowhere"], "/nowhere: no such checkpoint"),
        (["--source", "random:llama"], "llama"),
        (["--set", "source_options.tall=3"], "tall"),
        (["--recipe", "/nowhere.yaml"], "no such file, and no recipe of this name"),
        (["--epochs", "0"], "`epochs`: expected a whole number of 1 or more, got 0"),
        (["--epochs", "many"], "--epochs"),
        (["--lr", "-1"], "`lr`"),
        (["--device", "abacus"], "`device`"),
        (["--set", "model.views"], "expected NAME=VALUE"),
        (["--set", "model.speed=3"], "speed"),
        (["--set", "model.num_points=4096"], "at least 4096 points, got 128"),
        (["--nonsense"], "No such option"),
    ],
)
def test_train_refuses_and_writes_nothing(
    scene: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(scene)
    (scene / "single" / "a").mkdir(parents=True)
    shutil.copytree(scene / "clouds", scene / "broken")
    (scene / "broken" / "person" / "bad.ply").write_text("hello")
    assert main(train(scene, scene / "new", *more)) == 2
    one_line(capsys, message)
    assert not (scene / "new").exists()


def test_missing_files_are_shown_as_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["--recipe", "clip-text/scanobjectnn", "--source", "random:clip-text", "--device", "cpu"]
    small = ["--set", "source_options.width=48", "--set", "source_options.depth=1"]
    options = [*recipe, *small, "--data", "/nowhere", "--output", str(tmp_path / "run")]
    assert main(["train", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["any2point: /nowhere: no such folder; expected", "", "ScanObjectNN/"]
    assert lines[4].startswith("    main_split/")
    assert not (tmp_path / "run").exists()


def test_train_does_not_touch_an_old_run(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in (scene / "run").iterdir()}
    assert main(train(scene, scene / "run")) == 2
    one_line(capsys, "use --resume")
    assert before == {path: path.read_bytes() for path in (scene / "run").iterdir()}
    assert main(["train", "--resume", "--output", str(scene / "nothing")]) == 2
    one_line(capsys, "expected a run to resume")


def test_resume_uses_the_saved_recipe(scene: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (scene / "run" / "model.safetensors").read_bytes()
    (scene / "run" / "model.safetensors").unlink()
    assert main(["train", "--resume", "--output", str(scene / "run")]) == 0
    assert (scene / "run" / "model.safetensors").read_bytes() == before
    assert main(["train", "--resume", "--output", str(scene / "run"), "--lr", "0.5"]) == 2
    one_line(capsys, "options that the run was started with")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "/nowhere.pth", "out"], "/nowhere.pth: no such file"),
        (["eval", "/nowhere"], "/nowhere: no such run"),
        (["frobnicate"], "No such command"),
        (["predict"], "Missing argument"),
        (["demo", "--source", "/nowhere"], "/nowhere: no such checkpoint"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--device", "abacus"], "`device`"),
    ],
)
def test_other_mistakes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    one_line(capsys, message)
    assert not list(tmp_path.iterdir())


def test_convert_refuses_foreign_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.pth").write_bytes(b"not a checkpoint at all")
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "out")]) == 2
    one_line(capsys, "a.pth")
    assert not (tmp_path / "out").exists()


def test_interrupt(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("any2point.train.run.load_run", interrupted)
    assert main(["predict", str(world / "run"), "a.ply"]) == 130
    assert capsys.readouterr().err == "any2point: interrupted\n"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=root, check=False
    )


def test_info_needs_nothing() -> None:
    """With torch, NumPy and typer blocked, `info` still reports."""
    block = "import sys\nfor name in ('torch', 'numpy', 'typer', 'rich', 'yaml'): sys.modules[name] = None\n"
    result = python(block + "from any2point.cli import main; sys.exit(main(['info', '--json']))")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    keys = {"any2point", "python", "packages", "extension", "cpu", "driver", "gpus", "problems"}
    assert keys <= report.keys()
    assert report["cpu"]["simd"] in ("scalar", "avx2", "avx512")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python` with arguments, in an environment without ranks and with one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NCCL_NVLS_ENABLE": "0"}
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=root, env=environment, check=False
    )


def test_two_processes(world: Path, tmp_path: Path) -> None:
    """`--devices 2`: everything is said once."""
    trained = command("-m", "any2point", *train(world, tmp_path / "run", "--devices", "2"))
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("total without head") == 1
    assert trained.stdout.count("run folder: ") == 1
    assert "Traceback" not in trained.stderr
    assert json.loads((tmp_path / "run" / "results.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_torchrun(world: Path, tmp_path: Path) -> None:
    """Evaluation by two processes is that of one, and is printed once."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "any2point"]
    evaluated = command(*launcher, "eval", str(world / "run"), "--device", "cpu", "--precision", "fp32")
    assert evaluated.returncode == 0, evaluated.stderr
    accuracy = json.loads((world / "run" / "results.json").read_text())["test"]["accuracy"]
    assert evaluated.stdout.count(f"accuracy {100 * accuracy:.1f} %") == 1
    assert "Traceback" not in evaluated.stderr


@pytest.mark.slow
def test_a_mistake_of_two_processes_is_one_line(world: Path, tmp_path: Path) -> None:
    result = command(
        "-m", "any2point", *train(world, tmp_path / "run", "--devices", "2", "--batch-size", "3")
    )
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line.endswith("`batch_size`: expected a multiple of the 2 processes, got 3")


def test_one_of_several_processes_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first one what all run into, and the one that fails alone what it has run into."""
    monkeypatch.setattr("any2point.cli.time.sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    assert main(["eval", "/nowhere"]) == 2
    assert capsys.readouterr().err == ""

    def fail(*_: object, **__: object) -> None:
        error = ValueError("its own mistake")
        error.rank = 1  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr("any2point.train.run.load_run", fail)
    assert main(["eval", "/nowhere"]) == 2
    assert capsys.readouterr().err == "any2point: process 1: its own mistake\n"


def test_help_does_not_import_torch() -> None:
    code = "import sys; from any2point.cli import main; main(['train', '--help'])\n"
    assert python(code + "print('torch' in sys.modules)").stdout.endswith("False\n")


def test_missing_extras_are_named() -> None:
    code = (
        "import sys; sys.modules['typer'] = None; from any2point.cli import main; sys.exit(main(['train']))"
    )
    result = python(code)
    assert result.returncode == 2
    assert result.stderr == "any2point: the command line needs typer: pip install 'any2point[train]'\n"


def test_info_names_problems_and_remedies() -> None:
    report = info.collect()
    gpu = {"name": "H200", "memory": "141 GiB", "compute_capability": "9.0"}
    broken = report | {
        "packages": dict.fromkeys(info.PACKAGES) | {"torch": "2.9.1+cpu"},
        "extension": {"path": "x", "build": {"cuda": True, "archs": ["sm_80", "compute_100"]}},
        "numpy_module": None,
        "gpus": [gpu],
    }
    text = "\n".join(info.problems(broken))
    for part in (
        "older than 2.10",
        "numpy is not installed",
        "no code for H200",
        "CPU build",
        "tensorboard, lightning-fabric not installed: pip install 'any2point[train]'",
    ):
        assert part in text
    assert "! torch 2.9.1" in info.render(broken | {"problems": info.problems(broken)})
    fine = broken | {"extension": {"path": "x", "build": {"cuda": True, "archs": ["sm_75", "compute_75"]}}}
    assert "no code" not in "\n".join(info.problems(fine))


def test_demo_says_when_there_are_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from any2point.train import demo

    monkeypatch.setattr(demo, "find_pretrained", lambda: (None, "the package is not installed"))
    assert main(["demo", "--quick", "--device", "cpu", "--output", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "NO PRETRAINED WEIGHTS: the package is not installed" in out
    assert "pretrained encoder" not in out
    assert "encoder with random weights" in out
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["pretrained"] is False
    cloud = tmp_path / "demo" / "chair.ply"
    assert main(["predict", str(tmp_path / "demo"), str(cloud)]) == 0
    assert capsys.readouterr().out.startswith(f"{cloud}: ")
