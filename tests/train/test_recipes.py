"""The six published recipes: what they set, the official switch, and a whole run of one on tiny files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from published_layouts import write_scanobjectnn

from any2point import Any2PointConfig, Source
from any2point.cli import main
from any2point.models.official import SETTINGS, VARIANTS
from any2point.train import Recipe, TrainConfig, build_model, load_recipe, open_source
from any2point.train.recipe import RECIPES, shipped_recipes

# What the paper's scripts set for a data set; the rest of the official configuration are habits of the code.
PAPER = (
    *("epochs", "hold_epochs", "warmup_epochs", "batch_size", "lr", "min_lr", "weight_decay", "clip_norm"),
    *("label_smoothing", "schedule", "eval_batch_size", "normalize", "pool", "pool_start", "scale", "mirror"),
    *("shift", "yaw", "up", "jitter"),
)


@pytest.mark.parametrize("name", VARIANTS)
def test_shipped(name: str) -> None:
    recipe, dataset = load_recipe(name), name.split("/")[1]
    assert (recipe.variant, recipe.data, recipe.source, recipe.parity) == (name, dataset, None, None)
    assert recipe.train.select == "validation"
    official = TrainConfig.official(dataset)
    for field in PAPER:
        assert getattr(recipe.train, field) == getattr(official, field), field
    if dataset == "scanobjectnn":
        assert recipe.data_options == {"variant": "PB_T50_RS"}
    # The model's settings stand in one place: the file only names it.
    assert set(yaml.safe_load((RECIPES / f"{name}.yaml").read_text())) <= {
        *("variant", "source", "data", "data_options", "train"),
    }
    assert recipe.model_options() == SETTINGS[name]
    assert Any2PointConfig(**recipe.model_options()).parity is None
    assert SETTINGS[name].keys() <= VARIANTS[name].keys()
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clip-text" / "modelnet40").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert load_recipe("clip-text/modelnet40").data == "modelnet40"  # a folder of that name is no recipe
    assert set(shipped_recipes()) == {"sh3d15-minilm", *VARIANTS}
    with pytest.raises(
        FileNotFoundError, match="the package has clip-text/modelnet40, clip-text/scanobjectnn"
    ):
        load_recipe("clip-text")


@pytest.mark.parametrize("name", VARIANTS)
def test_official_switch(name: str) -> None:
    recipe, dataset = load_recipe(name), name.split("/")[1]
    official = recipe.override({"parity": "official"})
    assert official.train == TrainConfig.official(dataset)
    assert official.train.select == "test"
    assert official.model_options() == {"parity": "official"} | VARIANTS[name]
    assert official.data_options == recipe.data_options
    # What is stated wins, in whatever order; and a saved run is read back as it was.
    changed = recipe.override(
        {"train.epochs": 7, "model.views": 6, "train.select": "last", "parity": "official"}
    )
    assert (changed.train.epochs, changed.train.select, changed.train.subset) == (7, "last", "shared")
    assert changed.model_options()["views"] == 6
    assert Recipe.from_dict(changed.to_dict()) == changed
    written = Recipe.from_dict({"variant": name, "parity": "official", "train": {"epochs": 5}})
    assert written.train == TrainConfig.official(dataset, epochs=5)


def test_learning_rates() -> None:
    """By epoch: ScanObjectNN counts 1 to 300 and steps after each, ModelNet40 0 to 300 and starts twice."""

    def rate(t: float) -> float:
        if t < 10:
            return 1e-6 + 4.99e-5 * t
        return 1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + math.cos(math.pi * t / 300))

    scan, modelnet = (load_recipe(f"dinov2/{name}").train for name in ("scanobjectnn", "modelnet40"))
    assert [scan.epochs, modelnet.epochs] == [300, 301]
    for epoch in range(300):
        assert scan.learning_rate(epoch + 0.5) == pytest.approx(rate(epoch), rel=1e-9)
    for epoch in range(301):
        assert modelnet.learning_rate(epoch + 0.5) == pytest.approx(rate(max(epoch - 1, 0)), rel=1e-9)
    with pytest.raises(ValueError, match="`hold_epochs`: expected less than `epochs`"):
        TrainConfig(epochs=3, hold_epochs=3)


def test_overrides() -> None:
    recipe = load_recipe("clip-text/scanobjectnn")
    placed = recipe.override({"data_options.root": "/data"})
    assert placed.data_options == {"variant": "PB_T50_RS", "root": "/data"}
    assert placed.override({"data": "sh3d15"}).data_options == {}
    other = placed.override({"data_options.layout": "h5", "data": "modelnet40"})
    assert other.data_options == {"layout": "h5"}
    assert placed.override({"data": "scanobjectnn"}).data_options == placed.data_options
    for options, message in (
        ({"parity": "exact"}, "`parity`: expected official or none, got 'exact'"),
        ({"variant": "clip"}, "`variant`: expected one of clip-text/scanobjectnn"),
        ({"data_options": {}}, "`data_options`: expected data, source"),
        ({"optimizer": "sgd"}, "`optimizer`: expected data, source"),
    ):
        with pytest.raises(ValueError, match=message):
            recipe.override(options)
    with pytest.raises(ValueError, match="`parity`: expected a recipe with a variant"):
        Recipe().override({"parity": "official"})


def test_other_sources_are_refused() -> None:
    recipe = load_recipe("dinov2/modelnet40")
    with pytest.raises(ValueError, match=r"expected a checkpoint of the family dinov2, which .* got none"):
        open_source(recipe.source, recipe.source_options, 0, recipe.family)
    with pytest.raises(
        ValueError, match="`source`: expected one of the family dinov2, as the recipe, got bert"
    ):
        open_source("random:bert", {"width": 48, "depth": 1}, 0, recipe.family)
    with pytest.raises(ValueError, match="expected one of the family dinov2"):
        build_model(recipe, Source.random("bert", width=48, depth=1), ("a", "b"))


def test_official_start() -> None:
    source = Source.random("dinov2", width=64, depth=1, positions=(37, 37))
    names = tuple("abcde")
    models = {
        (dataset, parity): build_model(load_recipe(f"dinov2/{dataset}").override(options), source, names)
        for dataset in ("scanobjectnn", "modelnet40")
        for parity, options in ((None, {}), ("official", {"parity": "official"}))
    }
    for (dataset, parity), model in models.items():
        official = parity == "official"
        assert torch.equal(model.cls_token.flatten(), source.cls_token)  # type: ignore[arg-type]
        assert torch.equal(model.cls_position.flatten(), source.cls_position) != official  # type: ignore[arg-type]
        assert model.cls_position.std() < 0.05
        weights = [
            model.head[0].weight,
            model.encoder.adapters[0].adapter.down.weight,
            model.tokenizer.embed.weight,
        ]
        spread = [float(weight.detach().std()) for weight in weights]
        fan = 2 * 64
        kaiming, xavier = (1 / 3 / fan) ** 0.5, (2 / (fan + 256)) ** 0.5
        if official and dataset == "modelnet40":
            assert spread == pytest.approx([0.02] * 3, rel=0.25)
            assert not model.head[0].bias.any()
        else:
            assert spread[0] == pytest.approx(kaiming if official else xavier, rel=0.05)
            assert spread[1] == pytest.approx((2 / (64 + 8)) ** 0.5, rel=0.1)
            assert spread[2] == pytest.approx(1 / 3, rel=0.3)
        assert model.config.parity == parity
        decayed = {id(p) for p in model.parameter_groups()[0]["params"]}
        assert (id(model.cls_token) in decayed) == (not (official and dataset == "modelnet40"))
        assert id(model.cls_position) in decayed


def clip_checkpoint(path: Path, width: int = 64, depth: int = 2) -> Path:
    """A text tower as OpenAI names it, in half precision."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, generator=generator)).half()

    shapes = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    shapes |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    shapes |= {"mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,)}
    shapes |= {"mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,)}
    state = {
        f"transformer.resblocks.{i}.{name}": normal(*shape)
        for i in range(depth)
        for name, shape in shapes.items()
    }
    norms = [f"transformer.resblocks.{i}.ln_{k}" for i in range(depth) for k in (1, 2)]
    for norm in (*norms, "ln_final"):
        state |= {f"{norm}.weight": torch.ones(width).half(), f"{norm}.bias": normal(width)}
    state |= {"positional_embedding": normal(77, width), "token_embedding.weight": normal(20, width)}
    state |= {"text_projection": normal(width, width), "logit_scale": torch.tensor(4.6)}
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """ScanObjectNN in its published layout with 4 clouds in each file, and a tiny CLIP."""
    root = tmp_path_factory.mktemp("published")
    return write_scanobjectnn(root / "data", 2, classes=2), clip_checkpoint(root / "ViT-L-14.pt")


@pytest.mark.filterwarnings("ignore:.*clouds of the published file")
@pytest.mark.parametrize("parity", [None, "official"])
def test_train_command(
    files: tuple[Path, Path], parity: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, clip = map(str, files)
    run = tmp_path / "run"
    arguments = ["--data", data, "--source", clip, "--epochs", "1", "--batch-size", "2", "--device", "cpu"]
    switch = ["--parity", "official"] if parity else []
    assert (
        main(["train", "--recipe", "clip-text/scanobjectnn", *arguments, *switch, "--output", str(run)]) == 0
    )
    assert "15 classes" in capsys.readouterr().out
    saved = load_recipe(run / "recipe.yaml")
    assert (saved.variant, saved.parity) == ("clip-text/scanobjectnn", parity)
    assert saved.data_options == {"root": data, "variant": "PB_T50_RS"}
    assert saved.train.select == ("test" if parity else "validation")
    config = json.loads((run / "config.json").read_text())["config"]
    assert (config["attention_axis"], config["neighbors"]) == ("batch" if parity else "tokens", 81)
    if parity:
        assert main(["train", "--resume", "--output", str(run)]) == 0  # its recipe is read as it was written
        assert main(["eval", str(run), "--device", "cpu"]) == 0
        assert "accuracy" in capsys.readouterr().out


def test_train_refuses_other_sources(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, clip = map(str, files)
    common = ["train", "--data", data, "--output", str(tmp_path / "run"), "--device", "cpu"]
    for more, message in (
        (["--recipe", "clip-text/scanobjectnn"], "expected a checkpoint of the family clip-text"),
        (
            ["--recipe", "clip-text/scanobjectnn", "--source", "random:bert"],
            "expected one of the family clip-text",
        ),
        (["--recipe", "dinov2/scanobjectnn", "--source", clip], "expected a DINOv2"),
        (["--parity", "official"], "`parity`: expected a recipe with a variant"),
    ):
        assert main([*common, *more]) == 2
        assert message in capsys.readouterr().err
