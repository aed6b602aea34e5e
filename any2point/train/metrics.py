"""Evaluation of a classifier: what it got right, class by class."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from any2point.data.dataset import PointDataset
from any2point.data.transforms import Transform
from any2point.train.config import TrainConfig
from any2point.train.runtime import Runtime


@dataclass(frozen=True)
class EvalResult:
    """What a model got right on a data set.

    Attributes:
        accuracy: share of clouds, 0 to 1.
        class_accuracy: mean over the classes of the share within the class; classes without clouds do not
            count.
        loss: mean cross-entropy.
        confusion: [classes, classes] int64, rows are the true classes.
        predictions: [n] int64.
        seconds: wall time.
    """

    accuracy: float
    class_accuracy: float
    loss: float
    confusion: Tensor
    predictions: Tensor
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {
            "accuracy": self.accuracy,
            "class_accuracy": self.class_accuracy,
            "loss": self.loss,
            "clouds": len(self.predictions),
            "confusion": self.confusion.tolist(),
        }

    def by_class(self, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Name -> how many of the class's clouds were right, for classes with clouds."""
        counts, right = self.confusion.sum(dim=1).tolist(), self.confusion.diagonal().tolist()
        return {
            name: {"clouds": count, "right": hits, "accuracy": hits / count}
            for name, count, hits in zip(class_names, counts, right)
            if count
        }


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count pairs: [n], [n] int64 -> [num_classes, num_classes] int64, rows are the true classes."""
    pairs = labels.cpu() * num_classes + predictions.cpu()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def summarize(labels: Tensor, logits: Tensor, seconds: float) -> EvalResult:
    """Turn logits [n, classes] and labels [n] into an `EvalResult`."""
    labels, logits = labels.cpu(), logits.float().cpu()
    predictions = logits.argmax(dim=1)
    confusion = confusion_matrix(labels, predictions, logits.shape[1])
    in_class, right = confusion.sum(dim=1), confusion.diagonal()
    present = in_class > 0
    return EvalResult(
        accuracy=float(right.sum() / in_class.sum()),
        class_accuracy=float((right[present] / in_class[present]).mean()),
        loss=float(nn.functional.cross_entropy(logits, labels)),
        confusion=confusion,
        predictions=predictions,
        seconds=seconds,
    )


def evaluate(
    model: nn.Module, data: PointDataset, config: TrainConfig | None = None, *, vote: int = 1
) -> EvalResult:
    """Classify a data set.

    With several processes each has to call this, with the same arguments; all get the same result.

    Args:
        model: points [B, N, 3] -> logits [B, classes]; its `config.num_points`, if it has one, says how many
            points of each cloud it is given (farthest point sampling), its `config.input_features` whether it
            is given features, too. It is put in evaluation mode and back.
        data: what to classify.
        config: normalisation, batch size, device, processes, precision and seed; the defaults of
            `TrainConfig` otherwise.
        vote: passes over the set whose logits are averaged. The first is the plain one; in every other one a
            cloud is random points of a pool of farthest ones, which begins with a random one, scaled as in
            training, and nothing else. The passes follow from `config.seed`.

    Returns:
        `EvalResult`.

    Raises:
        ValueError: an empty data set, or clouds with fewer points than the model takes.
    """
    config = config or TrainConfig()
    if vote < 1:
        raise ValueError(f"`vote`: expected 1 or more passes, got {vote}")
    runtime = Runtime(config)
    size = input_size(model, data)
    start = time.perf_counter()
    with runtime.ranks.together():
        total = logits_of(model, prepare(data, config, size, runtime.device), config, runtime)
        transform = config.vote_transform(size, data.feature_names)
        for number in range(1, vote):
            generator = torch.Generator().manual_seed(config.seed_of("vote", number))
            seen = apply(transform, data, runtime.device, generator)
            total = total + logits_of(model, seen, config, runtime)
    return summarize(data.labels, total / vote, time.perf_counter() - start)


def input_size(model: nn.Module, data: PointDataset) -> int:
    """How many points of each cloud the model is given; ValueError if the clouds lack points or features."""
    size = getattr(getattr(model, "config", None), "num_points", data.num_points)
    if data.num_points < size:
        raise ValueError(f"`data`: expected clouds of at least {size} points, got {data.num_points}")
    wanted, there = input_features(model), len(data.feature_names)
    if wanted not in (0, there):
        raise ValueError(f"`data`: expected {wanted} features per point (`input_features`), got {there}")
    return size


def input_features(model: nn.Module) -> int:
    """How many features per point the model takes beside the coordinates."""
    return getattr(getattr(model, "config", None), "input_features", 0)


def model_inputs(model: nn.Module, clouds: Tensor) -> list[Tensor]:
    """`clouds [B, N, 3 + F]` as the model takes them: points, and features if it takes any."""
    parts = clouds.split([3, clouds.shape[-1] - 3], dim=-1)
    return [part.contiguous() for part in parts[: 2 if input_features(model) else 1]]


def prepare(data: PointDataset, config: TrainConfig, num_points: int, device: torch.device) -> PointDataset:
    """Apply the evaluation transform to the whole set, once."""
    if len(data) == 0:
        raise ValueError("`data`: expected at least 1 cloud, got 0")
    return apply(config.eval_transform(num_points), data, device, None)


def apply(
    transform: Transform, data: PointDataset, device: torch.device, generator: torch.Generator | None
) -> PointDataset:
    """Transform a data set, on `device`; the result is where the data set was."""
    parts = []
    for start in range(0, len(data), 256):
        clouds = data.inputs(slice(start, start + 256))
        parts.append(transform(clouds.to(device), generator).to(clouds.device))
    return data.with_inputs(torch.cat(parts))


def evaluate_prepared(
    model: nn.Module, data: PointDataset, config: TrainConfig, runtime: Runtime
) -> EvalResult:
    """`evaluate` on a set that went through `prepare`."""
    start = time.perf_counter()
    logits = logits_of(model, data, config, runtime)
    return summarize(data.labels, logits, time.perf_counter() - start)


@torch.inference_mode()
def logits_of(model: nn.Module, data: PointDataset, config: TrainConfig, runtime: Runtime) -> Tensor:
    """Logits [n, classes] float32 of a set that went through a transform, the same in every process.

    The batches are dealt out to the processes; they are the same batches for any number of processes.
    """
    model, ranks = model.to(runtime.device), runtime.ranks
    training = model.training
    model.eval()
    starts = range(0, len(data), config.eval_batch_size)
    mine = [slice(at, at + config.eval_batch_size) for at in starts[ranks.rank :: ranks.world]]
    parts = []
    for rows in mine:
        with runtime.autocast():
            parts.append(model(*model_inputs(model, data.inputs(rows).to(runtime.device))).float())
    model.train(training)
    classes = max(count for (count,) in ranks.gather([parts[0].shape[1] if parts else 0]))
    logits = torch.zeros(len(data), int(classes), device=runtime.device)
    for rows, part in zip(mine, parts):
        logits[rows] = part
    return ranks.sum(logits).cpu()
