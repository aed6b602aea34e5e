"""Fine-tuning: one small engine on Lightning Fabric, its configuration, its metrics, and the demo.

fit(model, train, test, TrainConfig(epochs=30), run_dir="runs/first")
evaluate(model, test).accuracy
"""

from __future__ import annotations

from any2point.train.config import TrainConfig
from any2point.train.engine import RunResult, fit
from any2point.train.metrics import EvalResult, evaluate
from any2point.train.progress import PlainReporter, Reporter, default_reporter
from any2point.train.recipe import Recipe, build_model, load_recipe, open_source

__all__ = [
    "EvalResult",
    "PlainReporter",
    "Recipe",
    "Reporter",
    "RunResult",
    "TrainConfig",
    "build_model",
    "default_reporter",
    "evaluate",
    "fit",
    "load_recipe",
    "open_source",
]
