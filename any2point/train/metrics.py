"""Evaluation of a classifier: what it got right, class by class."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from any2point.data.dataset import PointDataset
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


def evaluate(model: nn.Module, data: PointDataset, config: TrainConfig | None = None) -> EvalResult:
    """Classify a data set.

    Args:
        model: points [B, N, 3] -> logits [B, classes]; its `config.num_points`, if it has one, says how many
            points of each cloud it is given (farthest point sampling). It is put in evaluation mode and back.
        data: what to classify.
        config: normalisation, batch size, device and precision; the defaults of `TrainConfig` otherwise.

    Returns:
        `EvalResult`.

    Raises:
        ValueError: an empty data set, or clouds with fewer points than the model takes.
    """
    config = config or TrainConfig()
    runtime = Runtime(config)
    prepared = prepare(data, config, input_size(model, data))
    return evaluate_prepared(model, prepared, config, runtime)


def input_size(model: nn.Module, data: PointDataset) -> int:
    """How many points of each cloud the model is given."""
    size = getattr(getattr(model, "config", None), "num_points", data.num_points)
    if data.num_points < size:
        raise ValueError(f"`data`: expected clouds of at least {size} points, got {data.num_points}")
    return size


def prepare(data: PointDataset, config: TrainConfig, num_points: int) -> PointDataset:
    """Apply the evaluation transform to the whole set, once."""
    if len(data) == 0:
        raise ValueError("`data`: expected at least 1 cloud, got 0")
    transform = config.eval_transform(num_points)
    points = torch.cat([transform(part, None) for part in data.points.split(256)])
    return PointDataset(points, data.labels, data.class_names, data.names)


@torch.inference_mode()
def evaluate_prepared(
    model: nn.Module, data: PointDataset, config: TrainConfig, runtime: Runtime
) -> EvalResult:
    """`evaluate` on a set that went through `prepare`."""
    model = model.to(runtime.device)
    training = model.training
    model.eval()
    start = time.perf_counter()
    parts = []
    for points in data.points.split(config.eval_batch_size):
        with runtime.autocast():
            parts.append(model(points.to(runtime.device)).float().cpu())
    model.train(training)
    return summarize(data.labels, torch.cat(parts), time.perf_counter() - start)
