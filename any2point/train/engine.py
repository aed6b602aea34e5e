"""`fit`: train a point-cloud classifier, so that a run can be stopped anywhere and continued bit for bit.

All randomness of an epoch follows from (seed, epoch), so the state to resume from is the weights, the
optimiser and
the number of the epoch: nothing about random generators can be lost.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from any2point.data.dataset import PointDataset
from any2point.train import files
from any2point.train.captured import Step, capture
from any2point.train.config import TrainConfig
from any2point.train.metrics import EvalResult, evaluate_prepared, input_size, prepare
from any2point.train.progress import Reporter, default_reporter
from any2point.train.runtime import Runtime


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        test: evaluation of the final weights on the test set, or None without one.
        history: one record per epoch: epoch, lr, loss, train_accuracy, seconds, clouds_per_second, and where
            an evaluation took place test_accuracy (validation_accuracy).
        epoch: whose weights these are, counted from 1.
        clouds_per_second: training clouds over training time, without evaluations.
        run_dir: the folder, or None.
    """

    test: EvalResult | None
    history: list[dict[str, Any]]
    epoch: int
    clouds_per_second: float
    run_dir: Path | None


def fit(
    model: nn.Module,
    train: PointDataset,
    test: PointDataset | None,
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    reporter: Reporter | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> RunResult:
    """Train a model.

    Args:
        model: points [B, N, 3] -> logits [B, classes]. Only parameters with `requires_grad` are trained; its
            `parameter_groups(weight_decay)` are used if it has them. Left in evaluation mode on the run's
            device.
        train: training set.
        test: test set, or None. Unless `config.select` is "test" nothing is chosen by it.
        config: how to train.
        run_dir: folder for the run: recipe.yaml, metrics.jsonl, state.pt (to resume from), results.json, and
            the model in hub layout (config.json, model.safetensors). None writes nothing.
        resume: continue from the folder's state.pt; without one, start from the beginning.
        reporter: shows progress; by default a bar on a terminal and plain lines elsewhere.
        recipe: what to write to recipe.yaml beside the training options.

    Returns:
        `RunResult`.

    Raises:
        ValueError: a folder that already holds a run (and `resume` is False) or whose run was configured
            otherwise, sets of different classes, too few clouds, or a loss that is no longer finite.
    """
    return _Run(model, train, test, config, run_dir, resume, reporter, recipe).run()


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: PointDataset,
        test: PointDataset | None,
        config: TrainConfig,
        run_dir: str | Path | None,
        resume: bool,
        reporter: Reporter | None,
        recipe: Mapping[str, Any] | None,
    ) -> None:
        if test is not None and test.class_names != train.class_names:
            raise ValueError(f"`test`: expected classes {train.class_names}, got {test.class_names}")
        self.config, self.runtime = config, Runtime(config)
        size = input_size(model, train)
        self.validation: PointDataset | None = None
        if config.select == "validation":
            train, held_out = train.split(config.validation_fraction, config.seed)
            self.validation = prepare(held_out, config, size)
        if config.select == "test" and test is None:
            raise ValueError('`select`: expected "last" or "validation" without a test set, got "test"')
        self.batch = min(config.batch_size, len(train))
        if self.batch < 2:
            raise ValueError(f"`train`: expected at least 2 clouds per batch, got {self.batch}")
        self.train, self.transform = train, config.train_transform(size)
        self.test = None if test is None else prepare(test, config, size)
        self.model = model.to(self.runtime.device)
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr)
        self.reporter = reporter or default_reporter()
        self.folder = None if run_dir is None else Path(run_dir)
        self.captured: Step | None = None
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0, "weights": None}
        self.recipe = {**(recipe or {}), "train": config.to_dict()}
        if self.folder is not None:
            self._open_folder(self.folder, resume)

    def run(self) -> RunResult:
        config = self.config
        steps = len(self.train) // self.batch
        with self.runtime.session():
            self.reporter.start(config.epochs, steps, self.epoch)
            try:
                while self.epoch < config.epochs:
                    start = time.perf_counter()
                    record = self._epoch(steps)
                    record["seconds"] = time.perf_counter() - start
                    record["clouds_per_second"] = steps * self.batch / record["seconds"]
                    self._evaluate_epoch(record)
                    self.history.append(record)
                    self.reporter.epoch(record)
                    self._save_state()
            finally:
                self.reporter.stop()
            seconds = sum(record["seconds"] for record in self.history)
            return self._finish(len(self.history) * steps * self.batch / seconds)

    def _epoch(self, steps: int) -> dict[str, Any]:
        config, device = self.config, self.runtime.device
        self._capture()
        generator = torch.Generator().manual_seed(_seed(config.seed, self.epoch, "data"))
        torch.manual_seed(_seed(config.seed, self.epoch, "model"))
        order = torch.randperm(len(self.train), generator=generator)
        self.model.train()
        total = torch.zeros((), device=device)
        right = torch.zeros((), dtype=torch.int64, device=device)
        rate = 0.0
        for step in range(steps):
            rows = order[step * self.batch : (step + 1) * self.batch]
            points = self.transform(self.train.points[rows].to(device), generator)
            labels = self.train.labels[rows].to(device)
            rate = config.learning_rate(self.epoch + step / steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, logits = self._gradients(points, labels)
            self.runtime.update(self.optimizer, self.params, config.clip_norm)
            total += loss
            right += (logits.argmax(dim=1) == labels).sum()
            self.reporter.step(step + 1)
        self.epoch += 1
        loss_mean = float(total) / steps
        if not loss_mean < float("inf"):
            raise ValueError(
                f"`lr`: the loss is no longer finite after epoch {self.epoch}; try less than {config.lr}"
            )
        accuracy = int(right) / (steps * self.batch)
        return {"epoch": self.epoch, "lr": rate, "loss": loss_mean, "train_accuracy": accuracy}

    def _gradients(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward of a batch; loss [] and logits [B, classes]."""
        if self.captured is not None:
            return self.captured(points, labels)
        self.optimizer.zero_grad(set_to_none=True)
        return self._eager(points, labels)

    def _eager(self, points: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.runtime.autocast():
            logits = self.model(points)
        smoothing = self.config.label_smoothing
        loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
        self.runtime.backward(loss)
        return loss.detach(), logits.detach()

    def _capture(self) -> None:
        """Before the first step, so that the random numbers it draws are drawn before the epoch's seed."""
        if self.captured is not None or not self.config.cuda_graph or self.runtime.device.type != "cuda":
            return
        self.model.train()
        rows = torch.arange(self.batch)
        points = self.transform(self.train.points[rows].to(self.runtime.device), torch.Generator())
        labels = self.train.labels[rows].to(self.runtime.device)
        self.captured = capture(self._eager, self.model, points, labels)

    def _evaluate_epoch(self, record: dict[str, Any]) -> None:
        config = self.config
        chooser = {"validation": self.validation, "test": self.test}.get(config.select)
        last = self.epoch == config.epochs
        if self.epoch % config.eval_every and not last:
            return
        if chooser is not None:
            accuracy = evaluate_prepared(self.model, chooser, config, self.runtime).accuracy
            record[f"{config.select}_accuracy"] = accuracy
            if accuracy > self.best["accuracy"]:
                self.best = {"epoch": self.epoch, "accuracy": accuracy, "weights": _clone(self._weights())}
        elif self.test is not None and not last:
            record["test_accuracy"] = evaluate_prepared(self.model, self.test, config, self.runtime).accuracy

    def _finish(self, clouds_per_second: float) -> RunResult:
        epoch = self.epoch
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"], strict=False)
            epoch = self.best["epoch"]
        self.model.eval()
        result = None
        if self.test is not None:
            result = evaluate_prepared(self.model, self.test, self.config, self.runtime)
            if self.config.select == "last" and self.history:
                self.history[-1]["test_accuracy"] = result.accuracy
        if self.folder is not None:
            files.write_lines(self.folder / files.METRICS, self.history)
            model: Any = self.model
            if hasattr(model, "save_pretrained"):
                model.class_names = list(self.train.class_names)
                model.save_pretrained(self.folder)
            summary = {"epoch": epoch, "select": self.config.select, "precision": self.runtime.precision}
            summary |= {"device": str(self.runtime.device), "clouds_per_second": clouds_per_second}
            summary |= {"test": None if result is None else result.to_dict()}
            files.write_json(self.folder / files.RESULTS, summary)
        return RunResult(result, self.history, epoch, clouds_per_second, self.folder)

    def _open_folder(self, folder: Path, resume: bool) -> None:
        state = folder / files.STATE
        if state.exists() and not resume:
            raise ValueError(
                f"{folder}: expected a new folder, got one with a run in it; resume it or name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder)
        if state.exists():
            self._load_state(state)
        files.write_yaml(folder / files.RECIPE, self.recipe)
        files.write_lines(folder / files.METRICS, self.history)

    def _weights(self) -> dict[str, Tensor]:
        """Everything that training changes: trained parameters and buffers."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: value for name, value in self.model.state_dict().items() if name not in frozen}

    def _save_state(self) -> None:
        if self.folder is None:
            return
        files.append_line(self.folder / files.METRICS, self.history[-1])
        if self.epoch % self.config.save_every and self.epoch != self.config.epochs:
            return
        state = {
            "config": self.config.to_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "weights": self._weights(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.runtime.scaler.state_dict(),
            "best": self.best,
        }
        files.write_state(self.folder / files.STATE, state)

    def _load_state(self, path: Path) -> None:
        try:
            state = torch.load(path, map_location=self.runtime.device, weights_only=True)
            saved = state["config"]
        except Exception as error:  # torch.load fails in many ways on a file that is not its own
            raise ValueError(
                f"{path}: expected the state of a run, got {str(error).splitlines()[0][:80]}"
            ) from None
        given = self.config.to_dict()
        other = [name for name in given if name != "device" and given[name] != saved.get(name)]
        if other:
            was = ", ".join(f"{name} {saved.get(name)!r}" for name in other)
            now = ", ".join(f"{name} {given[name]!r}" for name in other)
            raise ValueError(f"{path}: expected the options that the run was started with ({was}), got {now}")
        missing = set(self._weights()) ^ set(state["weights"])
        if missing:
            raise ValueError(
                f"{path}: expected the state of this model, got another's ({sorted(missing)[0]})"
            )
        self.model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        self.runtime.scaler.load_state_dict(state["scaler"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    groups = getattr(model, "parameter_groups", None)
    if groups is not None:
        return groups(weight_decay)
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _clone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}


def _seed(seed: int, epoch: int, what: str) -> int:
    digest = hashlib.sha256(f"{seed} {epoch} {what}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
