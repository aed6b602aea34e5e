"""`fit`: train a point-cloud classifier, so that a run can be stopped anywhere and continued bit for bit.

All randomness of a step follows from the seed and the step's number, so the state to resume from is the
weights, the optimiser and that number: nothing about random generators can be lost. The data of a step do not
depend on the number of processes either; dropout does, and without `sync_batch_norm` the normalisation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from any2point.data.ahead import prefetch
from any2point.data.checksums import checksum
from any2point.data.dataset import PointDataset
from any2point.data.transforms import Rows
from any2point.models.base import PointModel
from any2point.models.hub import serializer
from any2point.nn import Neighborhoods
from any2point.train import files
from any2point.train.captured import Step, capture
from any2point.train.config import TrainConfig
from any2point.train.events import EventLog
from any2point.train.metrics import (
    EvalResult,
    apply,
    evaluate_prepared,
    input_features,
    input_size,
    model_inputs,
    prepare,
)
from any2point.train.progress import Reporter, SilentReporter, default_reporter
from any2point.train.runtime import Runtime
from any2point.train.state import origin_of, read_state, trained_state

_FEW = 16  # files of data whose checksums are written down


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

    With several processes (torchrun, or `config.devices`) each has to call this, with the same arguments; all
    get the same result.

    Args:
        model: points [B, N, 3] (and features [B, N, F], if its `config.input_features` is F) -> logits
            [B, classes]. Only parameters with `requires_grad` are trained; its
            `parameter_groups(weight_decay)` are used if it has them. Left in evaluation mode on the run's
            device.
        train: training set.
        test: test set, or None. Unless `config.select` is "test" nothing is chosen by it.
        config: how to train.
        run_dir: folder for the run: recipe.yaml, metrics.jsonl, TensorBoard events, state.pt (to resume
            from), results.json, and the model in hub layout (config.json, model.safetensors). None writes
            nothing. results.json has the checksums of the data's files, unless they are many. The first
            of several processes writes; all of them have to see the folder.
        resume: continue from the folder's state.pt; without one, start from the beginning.
        reporter: shows progress; by default a bar on a terminal and plain lines elsewhere.
        recipe: what to write to recipe.yaml beside the training options.

    Returns:
        `RunResult`.

    Raises:
        ValueError: a folder that already holds a run (and `resume` is False) or whose run was configured
            otherwise, sets of different classes, too few clouds, a batch that the processes cannot share
            evenly, or a loss that is no longer finite.
        ImportError: without Lightning Fabric, or without what `config.tensorboard` asks for.
    """
    runtime = Runtime(config)
    alone = files.reserved(Path(run_dir)) if run_dir is not None and runtime.ranks.first else None
    with runtime.ranks.together(), alone or contextlib.nullcontext():
        return _Run(model, train, test, config, runtime, run_dir, resume, reporter, recipe).run()


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: PointDataset,
        test: PointDataset | None,
        config: TrainConfig,
        runtime: Runtime,
        run_dir: str | Path | None,
        resume: bool,
        reporter: Reporter | None,
        recipe: Mapping[str, Any] | None,
    ) -> None:
        if test is not None and test.class_names != train.class_names:
            raise ValueError(f"`test`: expected classes {train.class_names}, got {test.class_names}")
        self.config, self.runtime, self.ranks = config, runtime, runtime.ranks
        device = runtime.device
        size = input_size(model, train)
        self.validation: PointDataset | None = None
        if config.select == "validation":
            train, held_out = train.split(config.validation_fraction, config.seed)
            if len(held_out) == 0:
                raise ValueError('`select`: expected "last" where no class has two clouds, got "validation"')
            self.validation = prepare(held_out, config, size, device)
        if config.select == "test" and test is None:
            raise ValueError('`select`: expected "last" or "validation" without a test set, got "test"')
        self.origin = origin_of(model, train)
        self.batch = _batch_size(config, len(train), self.ranks.world)
        self.steps = len(train) // self.batch
        fixed, self.transform = config.train_transform(size, train.feature_names).split()
        self.train = apply(fixed, train, device, None) if fixed.transforms else train
        self.test = None if test is None else prepare(test, config, size, device)
        self.model = model.to(device)
        self.ranks.copy_first([*model.parameters(), *model.buffers()])
        self.params = [p for p in model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("`model`: expected parameters to train, got none that requires a gradient")
        self.optimizer = runtime.optimizer(_parameter_groups(model, config.weight_decay), config.lr)
        self.reporter = (reporter or default_reporter()) if self.ranks.first else SilentReporter()
        self.folder = None if run_dir is None else Path(run_dir)
        self.captured: Step | None = None
        self.epoch = self.step = 0  # what is done: epochs, and steps of the next one
        self.loss = torch.zeros((), device=device)  # sum over these steps, and the same of correct answers
        self.right = torch.zeros((), dtype=torch.int64, device=device)
        self.seconds = 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"epoch": 0, "accuracy": -1.0, "weights": None}
        self.recipe = {**(recipe or {}), "train": config.to_dict()}
        self.options = config.to_dict() | {"precision": runtime.precision}
        self.files = {*train.files, *(test.files if test is not None else ())}
        self.events: EventLog | None = None
        if self.folder is not None:
            self._open_folder(self.folder, resume)

    def run(self) -> RunResult:
        config = self.config
        with self.runtime.session():
            self.reporter.start(config.epochs, self.steps, self.epoch, self.batch)
            try:
                while self.epoch < config.epochs:
                    record = self._epoch()
                    self._evaluate_epoch(record)
                    self.history.append(record)
                    self.reporter.epoch(record)
                    self._end_epoch(record)
            finally:
                self.reporter.stop()
            seconds = sum(record["seconds"] for record in self.history)
            return self._finish(len(self.history) * self.steps * self.batch / seconds)

    def _epoch(self) -> dict[str, Any]:
        """Train to the end of an epoch, from its beginning or from where the run was broken off."""
        config = self.config
        start = time.perf_counter() - self.seconds
        self._capture()
        self.model.train()
        rate = 0.0
        batches = self._batches(self.epoch, self.step)
        for labels, *inputs in prefetch(batches, self.runtime.device) if config.prefetch else batches:
            # All randomness of a step follows from its number.
            self.runtime.seed(config.seed_of(self.epoch, self.step, "model", self.ranks.rank))
            rate = config.learning_rate(self.epoch + self.step / self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            step_loss, logits = self._gradients(labels, *inputs)
            self.runtime.update(self.optimizer, self.params, config.clip_norm)
            self.loss += step_loss
            self.right += (logits.argmax(dim=1) == labels).sum()
            self.step += 1
            self.reporter.step(self.step)
            every = config.save_every_steps
            if every and self.step % every == 0 and self.step < self.steps:
                self.seconds = time.perf_counter() - start
                self._save_state()
        # Running statistics may be each rank's own; those of the first are evaluated and saved.
        self.ranks.copy_first(self.model.buffers())
        totals = self.ranks.gather([float(self.loss), int(self.right)])
        loss = sum(total for total, _ in totals) / (self.steps * self.ranks.world)
        right = sum(total for _, total in totals)
        clouds, seconds = self.steps * self.batch, time.perf_counter() - start
        record = {"epoch": self.epoch + 1, "lr": rate, "loss": loss, "train_accuracy": right / clouds}
        record |= {"seconds": seconds, "clouds_per_second": clouds / seconds}
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.loss.zero_()
        self.right.zero_()
        if not loss < float("inf"):
            raise ValueError(
                f"`lr`: the loss is no longer finite after epoch {self.epoch}; try less than {config.lr}"
            )
        return record

    def _batches(self, epoch: int, step: int) -> Iterator[list[Tensor]]:
        """What the steps of an epoch are given, from this step on."""
        seed_of = self.config.seed_of
        generator = torch.Generator().manual_seed(seed_of(epoch, "data"))
        order = torch.randperm(len(self.train), generator=generator)
        for at in range(step, self.steps):
            generator.manual_seed(seed_of(epoch, at, "data"))
            yield self._load(order[at * self.batch :][: self.batch], generator)

    @torch.no_grad()
    def _load(self, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
        """This rank's part of a batch, transformed: labels, the model's inputs, and its neighbourhoods."""
        part, device = self.ranks.part(len(rows)), self.runtime.device
        labels = self.train.labels[rows[part]].to(device)
        clouds = self.train.inputs(rows[part]).to(device)
        inputs = model_inputs(self.model, self.transform(clouds, Rows(generator, len(rows), part)))
        if _ahead(self.model, device, self.config):
            inputs += self.model.neighborhoods(*inputs).flat()  # type: ignore[operator]
        return [labels, *inputs]

    def _gradients(self, labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward of a batch; loss [] and logits [B, classes]."""
        if self.captured is not None:
            return self.captured(labels, *inputs)
        self.optimizer.zero_grad(set_to_none=True)
        return self._eager(labels, *inputs)

    def _eager(self, labels: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        smoothing = self.config.label_smoothing
        taken = 2 if input_features(self.model) else 1
        known = {"neighborhoods": Neighborhoods.of(inputs[taken:])} if inputs[taken:] else {}
        with self.ranks.statistics(self.config.sync_batch_norm):
            with self.runtime.autocast():
                logits = self.model(*inputs[:taken], **known)
            loss = nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            self.runtime.backward(loss)
        return loss.detach(), logits.detach()

    def _capture(self) -> None:
        """Before the first step, so that the random numbers it draws are drawn before the step's seed."""
        if self.captured is not None or not self.config.cuda_graph or self.runtime.device.type != "cuda":
            return
        self.model.train()
        batch = self._load(torch.arange(self.batch), torch.Generator())
        self.captured = capture(self._eager, self.model, batch)

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
                weights = {name: value.clone() for name, value in trained_state(self.model).items()}
                self.best = {"epoch": self.epoch, "accuracy": accuracy, "weights": weights}
        elif self.test is not None and not last:
            record["test_accuracy"] = evaluate_prepared(self.model, self.test, config, self.runtime).accuracy

    def _end_epoch(self, record: dict[str, Any]) -> None:
        if self.folder is not None and self.ranks.first:
            files.append_line(self.folder / files.METRICS, record)
        if self.events is not None:
            self.events.epoch(record)
        if self.epoch % self.config.save_every == 0 or self.epoch == self.config.epochs:
            self._save_state()

    def _finish(self, clouds_per_second: float) -> RunResult:
        config, epoch = self.config, self.epoch
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"], strict=False)
            epoch = self.best["epoch"]
        self.model.eval()
        result = None
        if self.test is not None:
            result = evaluate_prepared(self.model, self.test, config, self.runtime)
            if config.select == "last" and self.history:
                self.history[-1]["test_accuracy"] = result.accuracy
        if self.events is not None:
            if result is not None:
                self.events.epoch({"epoch": self.epoch, "test_accuracy": result.accuracy})
            self.events.close()
        if self.folder is not None and self.ranks.first:
            files.write_lines(self.folder / files.METRICS, self.history)
            model: Any = self.model
            if hasattr(model, "save_pretrained"):
                model.class_names = list(self.train.class_names)
                model.save_pretrained(self.folder)
            summary = {"epoch": epoch, "select": config.select, "precision": self.runtime.precision}
            if config.select != "last":
                summary[f"{config.select}_accuracy"] = self.best["accuracy"]
            summary |= {"device": str(self.runtime.device), "processes": self.ranks.world}
            summary |= {"clouds_per_second": clouds_per_second, "files": self.checksums}
            summary |= {"test": None if result is None else result.to_dict()}
            files.write_json(self.folder / files.RESULTS, summary)
        return RunResult(result, self.history, epoch, clouds_per_second, self.folder)

    def _open_folder(self, folder: Path, resume: bool) -> None:
        path = folder / files.STATE
        if path.exists() and not resume:
            raise ValueError(
                f"{folder}: expected a new folder, got one with a run in it; resume it or name another"
            )
        if path.exists():
            self._load_state(path)
        at = self.ranks.gather([self.epoch, self.step])  # nobody writes before all have read
        if any(other != at[0] for other in at):
            raise ValueError(f"{path}: expected a folder that all processes share, got different states")
        if not self.ranks.first:
            return
        if hasattr(self.model, "save_pretrained"):
            serializer()  # rather now than after the last epoch
        if self.config.tensorboard:
            self.events = EventLog(folder, self.epoch)
        # At once, because the files may change or go while the run goes on.
        self.checksums = checksum(sorted(self.files)) if len(self.files) <= _FEW else {}
        files.remove_leftovers(folder)
        files.write_yaml(folder / files.RECIPE, self.recipe)
        files.write_lines(folder / files.METRICS, self.history)

    def _save_state(self) -> None:
        if self.folder is None:
            return
        totals = self.ranks.gather([float(self.loss), int(self.right)])
        if not self.ranks.first:
            return
        scaler = self.runtime.scaler
        state = {
            "config": self.options,
            "origin": self.origin,
            "world": self.ranks.world,
            "epoch": self.epoch,
            "step": self.step,
            "totals": totals,
            "seconds": self.seconds,
            "history": self.history,
            "weights": trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "best": self.best,
        }
        files.write_state(self.folder / files.STATE, state)

    def _load_state(self, path: Path) -> None:
        weights, device = trained_state(self.model), self.runtime.device
        state = read_state(path, self.options, weights, self.origin, device, self.ranks.world)
        self.model.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.runtime.scaler is not None:
            self.runtime.scaler.load_state_dict(state["scaler"])
        loss, right = state["totals"][self.ranks.rank]
        self.loss.fill_(loss)
        self.right.fill_(int(right))
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        self.history, self.best = state["history"], state["best"]


def _ahead(model: nn.Module, device: torch.device, config: TrainConfig) -> bool:
    """Whether steps are given the neighbourhoods of their clouds, computed while the step before runs."""
    return config.prefetch and device.type == "cuda" and isinstance(model, PointModel)


def _batch_size(config: TrainConfig, clouds: int, world: int) -> int:
    """Clouds per step of all ranks together."""
    if config.batch_size % world:
        got = config.batch_size
        raise ValueError(f"`batch_size`: expected a multiple of the {world} processes, got {got}")
    batch = min(config.batch_size, clouds // world * world)
    if batch < 2 * world:
        each = f" and process, {world} in all" if world > 1 else ""
        raise ValueError(f"`train`: expected at least 2 clouds per batch{each}; got {batch}")
    return batch


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    groups = getattr(model, "parameter_groups", None)
    if groups is not None:
        return groups(weight_decay)
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
