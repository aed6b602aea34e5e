"""What the commands do: train by a recipe, evaluate and use a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from any2point.data import load_dataset, read_points
from any2point.data.dataset import PointDataset
from any2point.train import files
from any2point.train.config import TrainConfig
from any2point.train.engine import fit
from any2point.train.metrics import EvalResult, evaluate
from any2point.train.progress import on_terminal
from any2point.train.recipe import PUBLISHED, Recipe, build_model, load_recipe, open_source
from any2point.train.runtime import Runtime, autocast, pick_device, pick_precision

if TYPE_CHECKING:
    from any2point.models import Any2Point


def train_run(recipe: str | None, overrides: Mapping[str, Any], output: Path, resume: bool) -> None:
    """`any2point train`."""
    saved = output / files.RECIPE
    if resume:
        if not saved.exists():
            raise FileNotFoundError(f"{output}: expected a run to resume, found no {files.RECIPE} there")
        recipe = str(saved)
    elif saved.exists():
        raise ValueError(
            f"{output}: expected a new folder, got one with a run; use --resume or another --output"
        )
    options = dict(overrides)
    data = options.pop("data", None)
    stated = load_recipe(recipe) if recipe else Recipe()
    plan = stated.override(options)
    plan = _with_whole_paths(plan if data is None else point_at(plan, data))
    if plan.data is None:
        raise ValueError("--data: expected a data set or a folder, which this recipe leaves open, got none")
    if resume:
        _check_same_run(stated, plan)
    runtime = Runtime(plan.train)  # the other processes start here, before anything is read
    with runtime.ranks.together():
        first = runtime.ranks.first
        source = open_source(plan.source, plan.source_options, plan.train.seed, plan.family)
        train, test = (open_data(plan, split, show=first) for split in ("train", "test"))
        model = build_model(plan, source, train.class_names)
        if first:
            sizes = f"{len(train)} clouds to train on, {len(test)} to test, {len(train.class_names)} classes"
            print(f"{plan.data}: {sizes}\n{model.summary()}")
        result = fit(model, train, test, plan.train, output, resume=resume, recipe=plan.to_dict())
        if first and result.test is not None:
            write_pictures(model, test, result.test, {"training": result.history}, output)
            print(f"\n{report(result.test, train.class_names)}\n\nrun folder: {output}")


def _with_whole_paths(plan: Recipe) -> Recipe:
    """The recipe as it is saved: its paths hold from any working directory."""

    def whole(path: Any) -> Any:
        if not isinstance(path, str) or not Path(path).expanduser().exists():
            return path  # a name, or a mistake, which whoever opens it reports
        return str(Path(path).expanduser().absolute())

    options = {name: whole(v) if name in ("root", "cache") else v for name, v in plan.data_options.items()}
    data = plan.data if plan.data in (*PUBLISHED, "sh3d15") else whole(plan.data)
    source = plan.source if plan.source == "minilm" else whole(plan.source)
    return dataclasses.replace(plan, data=data, data_options=options, source=source)


def _check_same_run(started: Recipe, plan: Recipe) -> None:
    """A run goes on as it was started; only files may have moved. `fit` checks the training options."""

    def fixed(recipe: Recipe) -> dict[str, Any]:
        values = recipe.to_dict()
        moved = recipe.data not in (*PUBLISHED, "sh3d15")
        options = {name: v for name, v in recipe.data_options.items() if name not in ("root", "cache")}
        return values | {
            "data_options": options,
            "data": None if moved else recipe.data,
            "source": None,
            "train": None,
        }

    before, now = fixed(started), fixed(plan)
    other = [name for name in before if before[name] != now[name]]
    if other:
        name = other[0]
        raise ValueError(
            f"--resume: expected the recipe that the run was started with ({name} {before[name]}), "
            f"got {name} {now[name]}; name another --output for another run"
        )


def point_at(plan: Recipe, data: str) -> Recipe:
    """A recipe with `--data`: another data set, or the folder where the one it names lies."""
    if plan.data in PUBLISHED and data not in (*PUBLISHED, "sh3d15"):
        return plan.override({"data_options.root": data})
    return plan.override({"data": data})


def open_data(plan: Recipe, split: str, show: bool = True) -> PointDataset:
    """A recipe's training or test set; `show` counts the files on a terminal."""
    assert plan.data is not None
    options: dict[str, Any] = {"progress": _count(split) if show else None}
    if plan.data not in (*PUBLISHED, "sh3d15"):
        options |= {"num_points": plan.points, "test_fraction": plan.test_fraction, "seed": plan.train.seed}
    return load_dataset(plan.data, split, **(options | dict(plan.data_options)))


def open_tested(plan: Recipe, split: str, show: bool) -> PointDataset:
    """As `open_data`; for a recipe of a published set, a folder without its files may be one of classes."""
    try:
        return open_data(plan, split, show)
    except FileNotFoundError as missing:
        root = plan.data_options.get("root")
        if plan.data not in PUBLISHED or root is None or not Path(root).is_dir():
            raise
        try:
            return open_data(plan.override({"data": str(root)}), split, show)
        except ValueError:  # not that either
            raise missing from None


def with_classes(clouds: PointDataset, names: Sequence[str]) -> PointDataset:
    """The clouds labelled by their places among `names`, of which some may have no cloud."""
    unknown = [name for name in clouds.class_names if name not in names]
    if unknown:
        raise ValueError(f"{unknown[0]}: expected one of the classes {list(names)}")
    place = torch.tensor([list(names).index(name) for name in clouds.class_names])
    return dataclasses.replace(clouds, labels=place[clouds.labels], class_names=tuple(names))


def load_run(run: Path, source: str | None = None) -> tuple[Any2Point, Recipe | None]:
    """The model of a run (or of any folder in hub layout) and its recipe, if it has one."""
    from any2point.models import Any2Point

    if not run.exists():
        raise FileNotFoundError(f"{run}: no such run")
    if not (run / "config.json").exists():
        started = (run / files.STATE).exists()
        what = (
            "an unfinished run; any2point train --resume --output finishes it"
            if started
            else "no config.json"
        )
        raise ValueError(f"{run}: expected a trained model, found {what}")
    model = Any2Point.from_pretrained(run, source)
    recipe = load_recipe(run / files.RECIPE) if (run / files.RECIPE).exists() else None
    return model, recipe


def evaluate_run(
    run: Path,
    data: str | None,
    split: str,
    source: str | None,
    output: Path | None,
    vote: int,
    compute: Mapping[str, Any],
) -> None:
    """`any2point eval`; `compute` are the options of `TrainConfig` that say where."""
    model, recipe = load_run(run, source)
    config = TrainConfig.from_dict((recipe or Recipe()).train.to_dict() | dict(compute))
    plan = recipe or Recipe(data=None)
    plan = plan if data is None else point_at(plan, data)
    if plan.data is None:
        raise ValueError(
            "--data: expected sh3d15 or a folder, because this model does not say what to test it on"
        )
    runtime = Runtime(config)
    with runtime.ranks.together():
        first = runtime.ranks.first
        if first and output is not None:
            output.mkdir(parents=True, exist_ok=True)  # before the work rather than after it
        clouds = open_tested(plan, split, show=first)
        if model.class_names is not None:
            clouds = with_classes(clouds, model.class_names)
        names = clouds.class_names
        result = evaluate(model, clouds, config, vote=vote)
        if not first:
            return
        if output is not None:
            written = result.to_dict() | {"vote": vote, "classes": result.by_class(names)}
            files.write_json(output / files.RESULTS, {split: written})
            _write_confusion(result, names, split, output / "confusion.png")
        print(report(result, names))


def _write_confusion(result: EvalResult, names: Sequence[str], split: str, path: Path) -> None:
    try:
        from any2point.viz import confusion_picture

        title = f"{split} set, {len(result.predictions)} clouds, accuracy {100 * result.accuracy:.1f} %"
        confusion_picture(result.confusion, names, path, title)
    except ImportError as error:
        print(error)


def predict_files(
    run: Path, clouds: Sequence[Path], top: int, as_json: bool, source: str | None, device: str
) -> None:
    """`any2point predict`. All files are read before the first answer, so that a bad one gives no half
    result."""
    model, recipe = load_run(run, source)
    config = TrainConfig.from_dict((recipe or Recipe()).train.to_dict() | {"device": device})
    size, features = model.config.num_points, model.config.input_features
    if features:
        raise ValueError(f"{run}: expected a model of coordinates alone, got one of {features} features, too")
    read = [read_points(path, num_points=max(2048, size)) for path in clouds]
    for path, points in zip(clouds, read):
        if len(points) < size:
            raise ValueError(
                f"{path}: expected at least {size} points, which the model takes, got {len(points)}"
            )
    where = pick_device(config.device)
    precision = pick_precision(config.precision, where)
    model = model.to(where).eval()
    names = model.class_names or [str(i) for i in range(model.config.num_classes)]
    for path, points in zip(clouds, read):
        prepared = config.eval_transform(size)(torch.from_numpy(points)[None], None)
        with torch.inference_mode(), autocast(precision, where):
            chance = model(prepared.to(where)).float().softmax(dim=1)[0].cpu()
        best = chance.argsort(descending=True)[:top].tolist()
        scores = {names[i]: round(float(chance[i]), 4) for i in best}
        if as_json:
            print(json.dumps({"file": str(path), "class": names[best[0]], "scores": scores}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in scores.items()))


def report(result: EvalResult, class_names: Sequence[str]) -> str:
    """An evaluation as a table of classes and two totals."""
    width = max(map(len, class_names))
    lines = [f"{'class':{width}}   right     of"]
    for name, row in result.by_class(class_names).items():
        lines.append(f"{name:{width}}  {row['right']:6} {row['clouds']:6}  {100 * row['accuracy']:5.1f} %")
    totals = f"accuracy {100 * result.accuracy:.1f} %, mean over classes {100 * result.class_accuracy:.1f} %"
    return "\n".join([*lines, f"\n{totals}"])


def write_pictures(
    model: Any,
    test: PointDataset,
    result: EvalResult,
    histories: Mapping[str, Any],
    folder: Path,
    row: int = 0,
) -> None:
    """Write confusion.png, curves.png and, of cloud `row`, projection.png; without matplotlib, say so."""
    try:
        from any2point.viz import confusion_picture, curves_picture, projection_picture

        paths = [folder / f"{name}.png" for name in ("confusion", "curves", "projection")]
        title = f"{len(test)} held-out clouds, accuracy {100 * result.accuracy:.1f} %"
        confusion_picture(result.confusion, test.class_names, paths[0], title)
        curves_picture(histories, paths[1])
        if hasattr(model, "projection"):
            from any2point.train.metrics import input_size

            transform = TrainConfig().eval_transform(input_size(model, test))
            cloud = transform(test.inputs(slice(row, row + 1)))[0]
            name = test.class_names[int(test.labels[row])]
            what = f"a held-out {name} as the {model.source_info.modality} model sees it"
            projection_picture(model, cloud, paths[2], f"Virtual projection: {what}")
    except ImportError as error:
        print(error)


def _count(split: str) -> Any:
    if not on_terminal():
        return None

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else "\r"
        print(f"reading {split} set: {done} of {total}", end=end, flush=True)

    return show
