"""The same training runs in fp32 and in bf16: do they end alike?

    python scripts/compare_precision.py [--seeds 6] [--jobs 4] [--source FOLDER] [--csv FILE] [name=value ...]

Trains the shipped recipe (with `name=value` overrides) once per precision and seed on the sample set, some at
the same time, and prints test accuracy and final losses. Exit code 1 if the mean accuracies are further apart
than the seeds of one precision are: the largest distance of a run from its precision's mean.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from any2point.bench.table import commit
from any2point.data import sample_set
from any2point.train import fit
from any2point.train.progress import SilentReporter
from any2point.train.recipe import Recipe, build_model, load_recipe, open_source

PRECISIONS = ("fp32", "bf16")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="sh3d15-minilm")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, on the same device")
    parser.add_argument("--source", help="checkpoint folder, or random:bert")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as train.epochs=4")
    arguments = parser.parse_args()
    named = (item.split("=", 1) for item in arguments.overrides)
    recipe = load_recipe(arguments.recipe).override({name: yaml.safe_load(value) for name, value in named})
    if arguments.source:
        recipe = recipe.override({"source": arguments.source})
    runs = [(recipe, precision, seed) for precision in PRECISIONS for seed in range(arguments.seeds)]
    rows: list[dict[str, object]] = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(run, *zip(*runs)):
            print(*(f"{name} {value}" for name, value in row.items()), sep="  ", flush=True)
            rows.append(row)
    if arguments.csv:
        new = not arguments.csv.exists()
        with arguments.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            if new:
                writer.writeheader()
            writer.writerows(rows)
    return report(rows)


def run(recipe: Recipe, precision: str, seed: int) -> dict[str, object]:
    """One training run."""
    train, test = sample_set("train"), sample_set("test")
    plan = recipe.override({"train.seed": seed, "train.precision": precision})
    source = open_source(plan.source, plan.source_options, plan.train.seed, plan.family)
    model = build_model(plan, source, train.class_names)
    result = fit(model, train, test, plan.train, reporter=SilentReporter())
    assert result.test is not None
    return {
        "precision": precision,
        "seed": seed,
        "accuracy": round(result.test.accuracy, 4),
        "test_loss": round(result.test.loss, 4),
        "train_loss": round(result.history[-1]["loss"], 4),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "commit": commit(),
    }


def report(rows: list[dict[str, object]]) -> int:
    """Print mean and spread per precision; 1 if the means differ by more than the seeds do."""
    means, spread = [], 0.0
    for precision in PRECISIONS:
        values = [float(str(row["accuracy"])) for row in rows if row["precision"] == precision]
        mean = statistics.mean(values)
        means.append(mean)
        spread = max(spread, *(abs(value - mean) for value in values))
        print(f"{precision}: accuracy {mean:.4f}, seeds from {min(values):.4f} to {max(values):.4f}")
    apart = abs(means[0] - means[1])
    print(f"means apart by {apart:.4f}, largest distance of a seed from its mean {spread:.4f}")
    return int(apart > spread)


if __name__ == "__main__":
    raise SystemExit(main())
