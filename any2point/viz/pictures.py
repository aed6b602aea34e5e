"""The confusion matrix and the training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from any2point.viz.figure import figure


def confusion_picture(
    confusion: Any, class_names: Sequence[str], path: str | Path, title: str = "Confusion matrix"
) -> None:
    """Draw a confusion matrix: shade is the share of the true class, numbers are clouds.

    Args:
        confusion: [C, C] counts, rows are the true classes.
        class_names: C names.
        path: PNG file to write.
        title: above the matrix.
    """
    counts = np.asarray(confusion)
    if counts.shape != (len(class_names), len(class_names)):
        raise ValueError(f"`confusion`: expected [{len(class_names)}] * 2 counts, got {list(counts.shape)}")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = 2.5 + 0.36 * len(class_names)
    with figure(path, (size, size)) as drawn:
        axes = drawn.add_subplot()
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(class_names)), class_names, rotation=90)
        axes.set_yticks(range(len(class_names)), class_names)
        axes.set(title=title, xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for row, column in zip(*np.nonzero(counts)):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8)


def curves_picture(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path, title: str = "Training"
) -> None:
    """Draw loss and accuracy over the epochs of one or several runs.

    Args:
        histories: run name -> records of `RunResult.history`.
        path: PNG file to write.
        title: above the picture.
    """
    with figure(path, (8.5, 3.4)) as drawn:
        drawn.suptitle(title)
        loss, accuracy = drawn.subplots(1, 2)
        for number, (name, history) in enumerate(histories.items()):
            color = f"C{number}"
            epochs = [record["epoch"] for record in history]
            loss.plot(epochs, [record["loss"] for record in history], color=color, label=name)
            train = [100 * record["train_accuracy"] for record in history]
            accuracy.plot(epochs, train, color=color, alpha=0.35, linewidth=1)
            for kind in ("test_accuracy", "validation_accuracy"):
                points = [(record["epoch"], 100 * record[kind]) for record in history if kind in record]
                if points:
                    accuracy.plot(*zip(*points), color=color, marker="o", markersize=3, label=name)
        loss.set(xlabel="epoch", ylabel="training loss")
        accuracy.set(xlabel="epoch", ylabel="accuracy, %  (dots: held out, faint: training)", ylim=(0, 100))
        if len(histories) > 1:
            loss.legend(frameon=False, loc="upper right")
