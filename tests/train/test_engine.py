"""The engine: it learns, its runs repeat bit for bit, its files are whole, mistakes are named."""

from __future__ import annotations

import errno
import json
import os
import sys
import types
from pathlib import Path

import pytest
import tiny
import torch
from poison import poison
from torch import nn

from any2point import Any2Point, Any2PointConfig
from any2point.data import PointDataset
from any2point.train import Recipe, TrainConfig, evaluate, fit, load_recipe
from any2point.train.files import METRICS, RECIPE, RESULTS, STATE
from any2point.train.metrics import confusion_matrix, summarize
from any2point.train.progress import SilentReporter
from any2point.train.recipe import RECIPES
from any2point.train.runtime import import_fabric


def run(folder: Path | None = None, **options: object) -> tuple[Any2Point, object]:
    model = tiny.model()
    resume = bool(options.pop("resume", False))
    result = fit(
        model,
        tiny.dataset(),
        tiny.dataset(9, 1),
        tiny.config(**options),
        folder,
        resume=resume,
        reporter=SilentReporter(),
    )
    return model, result


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_it_learns(tmp_path: Path) -> None:
    model, result = run(tmp_path, epochs=40)
    losses = [record["loss"] for record in result.history]
    assert sum(losses[-10:]) / 10 < 0.65 * losses[0]
    assert result.test.accuracy > 0.6
    assert result.test.confusion.sum() == 9
    assert not model.training
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == result.history
    assert [line["epoch"] for line in lines] == list(range(1, 41))
    assert {"lr", "loss", "train_accuracy", "seconds", "clouds_per_second"} <= lines[0].keys()
    stored = json.loads((tmp_path / RESULTS).read_text())
    assert stored["test"]["accuracy"] == result.test.accuracy
    assert load_recipe(tmp_path / RECIPE).train == tiny.config(epochs=40)
    assert not list(tmp_path.glob(".*"))
    again = Any2Point.from_pretrained(tmp_path)
    assert again.class_names == list(tiny.CLASSES)
    assert evaluate(again, tiny.dataset(9, 1), tiny.config()).accuracy == result.test.accuracy


def test_only_trained_parameters_change_and_runs_repeat() -> None:
    fresh, (model, _), (twin, _) = tiny.model(), run(epochs=2), run(epochs=2)
    frozen = {name for name, p in fresh.named_parameters() if not p.requires_grad}
    before, after = weights(fresh), weights(model)
    assert frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert all(torch.equal(value, weights(twin)[name]) for name, value in after.items())
    other, _ = run(epochs=2, seed=1)
    assert any(not torch.equal(value, weights(other)[name]) for name, value in after.items())


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    model = tiny.model()
    torch.manual_seed(5)
    fit(model, tiny.dataset(), None, tiny.config(epochs=1), reporter=SilentReporter())
    assert torch.equal(torch.rand(1), expected)
    assert not torch.are_deterministic_algorithms_enabled()


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    model, result = run(tmp_path, epochs=2)
    again, repeated = run(tmp_path, epochs=2, resume=True)
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(model).items())
    assert repeated.history == result.history


def test_a_failed_write_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = os.replace

    def fail_third_state(source: str, target: Path, *, seen: list[int] = [0]) -> None:  # noqa: B006
        seen[0] += Path(target).name == STATE
        if seen[0] == 3:
            raise OSError(errno.ENOSPC, "disk full")
        replaced(source, target)

    monkeypatch.setattr(os, "replace", fail_third_state)
    with pytest.raises(OSError, match=f"disk full: .*{STATE}"):
        run(tmp_path)
    monkeypatch.undo()
    assert torch.load(tmp_path / STATE, weights_only=True)["epoch"] == 2
    assert not list(tmp_path.glob(".*"))
    _, result = run(tmp_path, resume=True)
    assert len(result.history) == 6


def test_refused_folders_and_states(tmp_path: Path) -> None:
    run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match="expected a new folder"):
        run(tmp_path, epochs=1)
    with pytest.raises(ValueError, match=r"options that the run was started with \(lr 0.005\), got lr 0.001"):
        run(tmp_path, epochs=1, lr=1e-3, resume=True)
    (tmp_path / STATE).write_bytes(b"foreign")
    with pytest.raises(ValueError, match="expected the state of a run"):
        run(tmp_path, epochs=1, resume=True)


def test_selection_by_validation_never_sees_the_test_set() -> None:
    _, result = run(epochs=4, select="validation")
    assert all("test_accuracy" not in record for record in result.history)
    best = max(result.history, key=lambda record: record["validation_accuracy"])
    assert result.epoch == best["epoch"]
    _, result = run(epochs=4, select="test")
    assert result.test.accuracy == max(record["test_accuracy"] for record in result.history)


def test_bad_calls() -> None:
    data, model = tiny.dataset(), tiny.model()
    other = PointDataset(data.points, data.labels, ("a", "b", "c"))
    with pytest.raises(ValueError, match="`test`: expected classes"):
        fit(model, data, other, tiny.config())
    with pytest.raises(ValueError, match="at least 64 points, got 32"):
        fit(model, PointDataset(data.points[:, :32], data.labels, data.class_names), None, tiny.config())
    with pytest.raises(ValueError, match="at least 2 clouds per batch"):
        fit(model, data.subset([0]), None, tiny.config())
    with pytest.raises(ValueError, match="without a test set"):
        fit(model, data, None, tiny.config(select="test"))
    with pytest.raises(ValueError, match="at least 1 cloud"):
        evaluate(model, data.subset([]), tiny.config())
    with pytest.raises(ValueError, match="no longer finite"):
        fit(model, data, None, tiny.config(lr=1e30, clip_norm=0.0), reporter=SilentReporter())
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="`device`: expected one of 0 GPUs"):
            fit(model, data, None, tiny.config(device="cuda"))
    with pytest.raises(ValueError, match="`device`"):
        fit(model, data, None, tiny.config(device="abacus"))


def test_any_module_can_be_trained() -> None:
    config = tiny.config(pool=0)
    result = fit(tiny.Moments(), tiny.dataset(), tiny.dataset(9, 1), config, reporter=SilentReporter())
    assert result.history[-1]["loss"] < result.history[0]["loss"]


@pytest.mark.parametrize("tuning", ["full", "probe"])
def test_whatever_requires_a_gradient_is_trained_saved_and_restored(tmp_path: Path, tuning: str) -> None:
    model = tiny.model(tuning=tuning)
    before = weights(model)
    options = {"epochs": 2, "select": "validation"}
    result = fit(model, tiny.dataset(), tiny.dataset(9, 1), tiny.config(**options), tmp_path,
        reporter=SilentReporter())  # fmt: skip
    after = weights(model)
    changed = {name for name, _ in model.named_parameters() if not torch.equal(before[name], after[name])}
    source = {name for name in changed if name.startswith("encoder.source.blocks.")}
    assert bool(source) == (tuning == "full")
    again = Any2Point.from_pretrained(tmp_path)
    assert all(torch.equal(value, weights(again)[name]) for name, value in after.items())
    resumed = tiny.model(tuning=tuning)
    repeated = fit(resumed, tiny.dataset(), tiny.dataset(9, 1), tiny.config(**options), tmp_path, resume=True,
        reporter=SilentReporter())  # fmt: skip
    assert repeated.history == result.history
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in after.items())


def test_features_beside_the_coordinates() -> None:
    """The label is only in the features, and they have to stay with their points."""
    clouds = torch.rand(24, 96, 3)
    labels = torch.arange(24) % 3
    features = clouds[..., :1] * (labels - 1.0)[:, None, None]
    data = PointDataset(clouds, labels, tiny.CLASSES, features=features, feature_names=("a",))

    class Slope(tiny.Moments):
        """Sees how coordinate and feature vary together."""

        config = Any2PointConfig(num_points=64, num_tokens=8, neighbors=4, input_features=1)

        def forward(self, points: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
            assert features.shape == (*points.shape[:2], 1)
            both = points[..., :1] * features
            return self.layer(torch.cat([both.mean(1), features.mean(1), features.std(1)] * 2, dim=1))

    options = {"scale": (1.0, 1.0), "shift": 0.0, "yaw": 0.0, "jitter": 0.0, "normalize": "none"}
    result = fit(Slope(), data, data, tiny.config(epochs=60, lr=0.1, pool=0, **options),
        reporter=SilentReporter())  # fmt: skip
    assert result.test is not None
    assert result.test.accuracy == 1
    with pytest.raises(ValueError, match=r"expected 1 features per point \(`input_features`\), got 0"):
        fit(Slope(), tiny.dataset(), None, tiny.config(), reporter=SilentReporter())


def test_a_vote_is_the_sum_of_seeded_passes() -> None:
    model, _ = run(epochs=2)
    data = tiny.dataset(9, 1)
    plain = evaluate(model, data, tiny.config())
    again = evaluate(model, data, tiny.config(), vote=1)
    assert plain.loss == again.loss
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    vote = evaluate(model, data, tiny.config(), vote=3)
    assert len(seen) == 3
    assert vote.loss != plain.loss
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(
        vote.predictions, evaluate(model, data, tiny.config(eval_batch_size=4), vote=3).predictions
    )
    assert vote.loss == evaluate(model, data, tiny.config(), vote=3).loss
    assert vote.loss != evaluate(model, data, tiny.config(seed=1), vote=3).loss
    with pytest.raises(ValueError, match="`vote`"):
        evaluate(model, data, tiny.config(), vote=0)


def test_fabric_is_found_in_either_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(
        ImportError, match=r"training needs Lightning Fabric: pip install 'any2point\[train\]'"
    ):
        import_fabric()
    large, fabric = types.ModuleType("lightning"), types.ModuleType("lightning.fabric")
    monkeypatch.setitem(sys.modules, "lightning", large)
    monkeypatch.setitem(sys.modules, "lightning.fabric", fabric)
    assert import_fabric() is fabric


def test_bf16_trains() -> None:
    _, result = run(epochs=3, precision="bf16")
    assert result.history[-1]["loss"] < 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_gpu_run_repeats(precision: str) -> None:
    options = {"device": "cuda", "precision": precision, "epochs": 30}
    (model, result), (twin, _) = run(**options), run(**options)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(model).items())


@pytest.mark.gpu
def test_captured_step_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph's losses, weights and buffers are those of eager steps, dropout left out."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *args, **kwargs: x)
    options = {"device": "cuda", "precision": "fp32", "epochs": 3}
    (model, result), (eager, expected) = run(**options), run(**options, cuda_graph=False)
    losses = [record["loss"] for record in result.history]
    assert losses == pytest.approx([record["loss"] for record in expected.history], rel=1e-4)
    for name, value in weights(eager).items():
        torch.testing.assert_close(weights(model)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_no_number_comes_from_old_memory(precision: str, captured: bool) -> None:
    options = {"device": "cuda", "precision": precision, "epochs": 2, "cuda_graph": captured}
    (model, result) = run(**options)
    for _ in range(3):
        poison()
        twin, again = run(**options)
        assert [e["loss"] for e in again.history] == [e["loss"] for e in result.history]
        assert all(torch.equal(value, weights(twin)[name]) for name, value in weights(model).items())


def test_learning_rate() -> None:
    config = TrainConfig(epochs=300, warmup_epochs=10, lr=5e-4, min_lr=1e-6)
    assert config.learning_rate(0) == 1e-6
    assert config.learning_rate(5.9) == pytest.approx(1e-6 + 5 * 4.99e-5)
    assert config.learning_rate(10) == pytest.approx(1e-6 + 0.5 * 4.99e-4 * (1 + 0.994521895368), rel=1e-6)
    assert config.learning_rate(300) == pytest.approx(1e-6)
    assert TrainConfig(schedule="step").learning_rate(5.9) > config.learning_rate(5.9)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("batch_size", -1), ("lr", 0), ("lr", float("nan")), ("lr", "fast"),
        ("label_smoothing", 1), ("select", "best"), ("precision", "fp8"), ("scale", (2, 1)), ("up", 3),
        ("validation_fraction", 1.0), ("yaw", -1), ("normalize", True),
    ],
)  # fmt: skip
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"`{option}`: expected .*, got "):
        TrainConfig(**{option: value})


def test_metrics_on_a_hand_made_case() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 3])
    predictions = torch.tensor([0, 0, 1, 1, 0, 3])
    confusion = confusion_matrix(labels, predictions, 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    result = summarize(labels, nn.functional.one_hot(predictions, 4).float(), 1.0)
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.class_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert torch.equal(result.predictions, predictions)


def test_evaluation_does_not_depend_on_batches() -> None:
    model, _ = run(epochs=2)
    one = evaluate(model, tiny.dataset(9, 1), tiny.config(eval_batch_size=1))
    all_at_once = evaluate(model, tiny.dataset(9, 1), tiny.config(eval_batch_size=9))
    assert torch.equal(one.predictions, all_at_once.predictions)
    assert one.loss == pytest.approx(all_at_once.loss, rel=1e-4)


def test_recipes(tmp_path: Path) -> None:
    for file in RECIPES.rglob("*.yaml"):
        recipe = load_recipe(file.relative_to(RECIPES).with_suffix("").as_posix())
        assert Recipe.from_dict(recipe.to_dict()) == recipe
    changed = recipe.override({"train.lr": 0.1, "model.views": 3, "data": "folder"})
    assert (changed.train.lr, changed.model["views"], changed.data) == (0.1, 3, "folder")
    with pytest.raises(ValueError, match=r"`optimizer\.lr`"):
        recipe.override({"optimizer.lr": 1})
    with pytest.raises(FileNotFoundError, match="the package has"):
        load_recipe("nothing")
    for text, message in {
        "train: {lr: [1}": "expected YAML",
        "- 1": "expected a recipe",
        "speed: 3": "got speed",
        "train: {speed: 3}": "got speed",
        "train: 3": "`train`: expected options",
        "train: {lr: fast}": "`lr`: expected a number above 0, got 'fast'",
    }.items():
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            load_recipe(tmp_path / "bad.yaml")
        assert str(tmp_path) in str(caught.value)
