"""`any2point demo`: a frozen language model learns furniture, next to two controls that say what it is worth.

Three runs on one schedule: the pretrained encoder, the same encoder with random weights, and the tokenizer
alone with a linear layer. If the pretrained weights cannot be had, that is said, and no run is called
pretrained.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from any2point.data import sample_set
from any2point.data.dataset import PointDataset
from any2point.data.points import write_ply
from any2point.train import files
from any2point.train.engine import RunResult, fit
from any2point.train.pretrained import find_pretrained
from any2point.train.progress import default_reporter
from any2point.train.recipe import Recipe, build_model, load_recipe, open_source
from any2point.train.run import write_pictures
from any2point.train.runtime import Runtime, pick_device, pick_precision, pick_processes

if TYPE_CHECKING:
    from any2point.sources import Source

RECIPE = "sh3d15-minilm"
# Seconds that the training of one seed may take on a CPU before epochs are left out.
BUDGET = 300.0


@dataclass(frozen=True)
class Contender:
    """One of the three runs.

    Attributes:
        title: as in the table.
        folder: below the run folder, "" for the folder itself.
        build: recipe -> model.
    """

    title: str
    folder: str
    build: Callable[[Recipe], Any]


def run_demo(
    *,
    source: str | None = None,
    output: Path | None = None,
    seeds: int = 1,
    quick: bool = False,
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Run the demo and print what came of it.

    Args:
        source: checkpoint instead of the installed MiniLM, or "random:bert".
        output: run folder; by default the first of runs/demo, runs/demo-2, ... that is free.
        seeds: repetitions, with the spread in the table.
        quick: a small part of everything, to see that it works; the accuracies mean nothing then.
        device: as in `TrainConfig`.
        precision: as in `TrainConfig`.

    Returns:
        The run folder.
    """
    start = time.perf_counter()
    processes = math.prod(pick_processes(1, pick_device(device)))
    if processes > 1:
        raise ValueError(f"demo: expected one process, got {processes}; any2point train shares its work")
    recipe = load_recipe(RECIPE).override({"train.device": device, "train.precision": precision})
    train, test = sample_set("train"), sample_set("test")
    if quick:
        recipe = recipe.override({"train.epochs": 1, "train.warmup_epochs": 0, "train.batch_size": 16})
        train, test = train.split(0.1)[1], test.split(0.15)[1]
    folder = _new_folder(output)
    pretrained, recipe = _open(source, recipe)
    contenders = _contenders(pretrained, train)
    if not quick:
        recipe = _fit_machine(recipe, contenders, train)
    _introduce(train, test, pretrained, recipe)

    results: dict[str, list[RunResult]] = {contender.title: [] for contender in contenders}
    parameters: dict[str, int] = {}
    models: dict[str, Any] = {}
    for seed in range(seeds):
        for number, contender in enumerate(contenders):
            plan = recipe.override({"train.seed": recipe.train.seed + seed})
            model = contender.build(plan)
            summary = model.summary()
            parameters[contender.title] = summary.trained
            if seed == 0:
                step = f"[{number + 1}/{len(contenders)}]"
                print(f"\n{step} {contender.title}: {summary.trained:,} parameters to train")
            place = folder / contender.folder if contender.folder else folder
            place = place if seed == 0 else place / f"seed{seed}"
            reporter = default_reporter(contender.title if seeds == 1 else f"{contender.title}, seed {seed}")
            result = fit(model, train, test, plan.train, place, reporter=reporter, recipe=plan.to_dict())
            results[contender.title].append(result)
            models.setdefault(contender.title, model)

    first = contenders[0].title
    outcome = results[first][0].test
    assert outcome is not None
    histories = {title: runs[0].history for title, runs in results.items()}
    row = int((test.labels == test.class_names.index("chair")).nonzero()[0])
    write_pictures(models[first], test, outcome, histories, folder, row)
    example = folder / "chair.ply"
    write_ply(example, test.points[row].numpy())
    answer = test.class_names[int(outcome.predictions[row])]
    seconds = time.perf_counter() - start
    files.write_json(folder / "demo.json", _record(results, parameters, pretrained, seconds))
    _conclude(results, parameters, train, test, quick)
    _say_where(folder, example, answer, seconds)
    return folder


def _open(source: str | None, recipe: Recipe) -> tuple[Source | None, Recipe]:
    """The pretrained source, or None; and the recipe with its name in it."""
    reason = "--source asks for random weights"
    if source is None:
        folder, reason = find_pretrained()
        if folder is not None:
            print(f"pretrained weights: {reason}")
            return open_source("minilm"), recipe.override({"source": "minilm"})
    elif not source.startswith("random:"):
        return open_source(source), recipe.override({"source": str(Path(source).expanduser().absolute())})
    print(f"NO PRETRAINED WEIGHTS: {reason}.\nThe encoder has random weights in all that follows.")
    return None, recipe.override({"source": source or "random:bert"})


def _contenders(pretrained: Source | None, train: PointDataset) -> list[Contender]:
    from any2point.models import Any2PointConfig, TokenizerProbe
    from any2point.sources import Source

    shape: dict[str, Any] = {"width": 384, "depth": 6, "heads": 12}
    if pretrained is not None:
        shape = {name: getattr(pretrained, name) for name in shape}
        shape["positions"] = tuple(pretrained.position_table.shape[:-1])
    family = pretrained.name if pretrained is not None else "bert"

    def with_random(plan: Recipe) -> Any:
        return build_model(plan, Source.random(family, seed=plan.train.seed, **shape), train.class_names)

    def tokenizer_only(plan: Recipe) -> Any:
        config = Any2PointConfig.from_dict({**plan.model, "num_classes": len(train.class_names)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.train.seed)
            return TokenizerProbe(config, shape["width"], train.class_names)

    random = Contender("encoder with random weights", "control-random", with_random)
    probe = Contender("tokenizer and linear layer, no encoder", "control-tokenizer", tokenizer_only)
    if pretrained is None:
        return [dataclasses.replace(random, folder=""), probe]

    def with_pretrained(plan: Recipe) -> Any:
        return build_model(plan, pretrained, train.class_names)

    return [Contender("pretrained encoder", "", with_pretrained), random, probe]


def _fit_machine(recipe: Recipe, contenders: list[Contender], train: PointDataset) -> Recipe:
    """On a CPU: choose the number of threads by timing, and leave out epochs if all would take too long.

    On a machine with other work, threads that wait for each other can be many times slower than one alone.
    """
    config = recipe.train
    runtime = Runtime(config)
    if runtime.device.type != "cpu":
        return recipe
    rows = torch.arange(min(config.batch_size, len(train)))
    points = config.train_transform(recipe.model["num_points"])(train.points[rows], None)

    def seconds(model: Any, repeats: int) -> list[float]:
        times = []
        with runtime.session():
            for _ in range(repeats + 1):
                start = time.perf_counter()
                with runtime.autocast():
                    logits = model(points)
                torch.nn.functional.cross_entropy(logits.float(), train.labels[rows]).backward()
                times.append(time.perf_counter() - start)
        return times[1:]  # the first step warms caches up

    models = [contender.build(recipe) for contender in contenders]
    available = torch.get_num_threads()
    timed = {}
    for threads in {max(1, available // part) for part in (1, 2, 4, 8)}:
        torch.set_num_threads(threads)
        timed[threads] = statistics.median(seconds(models[0], 3))
    torch.set_num_threads(min(timed, key=lambda threads: timed[threads]))
    steps = max(1, len(train) // config.batch_size)
    per_epoch = steps * sum(min(seconds(model, 2)) for model in models)
    epochs = min(config.epochs, max(4, int(BUDGET / per_epoch)))
    if epochs == config.epochs:
        return recipe
    print(f"slow machine:       {epochs} epochs instead of {config.epochs}, so accuracies will be lower")
    warmup = config.warmup_epochs * epochs / config.epochs
    return recipe.override({"train.epochs": epochs, "train.warmup_epochs": warmup})


def _introduce(train: PointDataset, test: PointDataset, pretrained: Source | None, recipe: Recipe) -> None:
    device = pick_device(recipe.train.device)
    where = f"CPU, {torch.get_num_threads()} thread(s)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    if pretrained is not None:
        count = sum(tensor.numel() for tensor in pretrained.tensors.values()) / 1e6
        what = f"{pretrained.depth} {pretrained.modality} blocks of width {pretrained.width}"
        print(f"frozen encoder:     {what}, {count:.1f} M parameters")
    print(f"shapes:             SH3D-15, {len(train)} to train on, {len(test)} held out, 15 classes")
    print(f"machine:            {where}, {pick_precision(recipe.train.precision, device)}")


def _new_folder(output: Path | None) -> Path:
    if output is not None:
        if (output / files.STATE).exists():
            raise ValueError(f"--output: expected a new folder, got {output}, which holds a run")
        return output
    number = 1
    while True:
        folder = Path("runs", "demo" if number == 1 else f"demo-{number}")
        if not folder.exists():
            return folder
        number += 1


def _record(
    results: dict[str, list[RunResult]], parameters: dict[str, int], pretrained: Source | None, seconds: float
) -> dict[str, Any]:
    return {
        "pretrained": pretrained is not None,
        "seconds": seconds,
        "runs": {
            title: {
                "trained_parameters": parameters[title],
                "accuracy": [run.test.accuracy for run in runs if run.test],
                "class_accuracy": [run.test.class_accuracy for run in runs if run.test],
                "clouds_per_second": [run.clouds_per_second for run in runs],
            }
            for title, runs in results.items()
        },
    }


def _conclude(
    results: dict[str, list[RunResult]],
    parameters: dict[str, int],
    train: PointDataset,
    test: PointDataset,
    quick: bool,
) -> None:
    width = max(map(len, results))
    print(f"\n{'':{width}}  accuracy       class mean     trained    clouds/s")
    for title, runs in results.items():
        right = [100 * run.test.accuracy for run in runs if run.test]
        mean = [100 * run.test.class_accuracy for run in runs if run.test]
        speed = statistics.mean(run.clouds_per_second for run in runs)
        print(f"{title:{width}}  {_spread(right)}  {_spread(mean)}  {parameters[title]:9,}  {speed:8.0f}")
    frequent = int(torch.bincount(train.labels).argmax())
    guess = 100 * float((test.labels == frequent).float().mean())
    print(f"{'always the most frequent class':{width}}  {guess:5.1f} %\n")
    if quick:
        print("--quick: next to no training, so these accuracies mean nothing.")
        return
    (first, ours), *controls = results.items()
    for title, runs in controls:
        points, error = _difference(ours, runs, test.labels)
        print(f"{first} against {title}: {points:+.1f} points, standard error {error:.1f}")
    if len(ours) == 1:
        print(f"(one seed, {len(test)} shapes, so one shape is {100 / len(test):.1f} %; --seeds 3 says more)")


def _difference(ours: list[RunResult], theirs: list[RunResult], labels: torch.Tensor) -> tuple[float, float]:
    """Difference in accuracy in points, and its standard error over the shapes, which both were tested on."""
    gained = torch.zeros(len(labels))
    for one, other in zip(ours, theirs):
        if one.test and other.test:
            gained += (one.test.predictions == labels).float() - (other.test.predictions == labels).float()
    gained = 100 * gained / len(ours)
    return float(gained.mean()), float(gained.std() / len(labels) ** 0.5)


def _say_where(folder: Path, example: Path, answer: str, seconds: float) -> None:
    print(f"\ntook {seconds:.0f} s; run folder: {folder}")
    print("  model (config.json, model.safetensors), metrics.jsonl, recipe.yaml, results.json")
    print("  confusion.png, curves.png, projection.png")
    print(f"try it: any2point predict {folder} {example}   (the model says {answer})")


def _spread(values: list[float]) -> str:
    text = f"{statistics.mean(values):5.1f} %"
    return f"{text} ± {statistics.stdev(values):3.1f}" if len(values) > 1 else f"{text}      "
