"""TensorBoard events of a run; tensorboard is imported when a run writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAMES = (
    "loss",
    "lr",
    "train_accuracy",
    "validation_accuracy",
    "test_accuracy",
    "clouds_per_second",
    "seconds",
)


class EventLog:
    """Writes the records of epochs into a run folder, at the number of the epoch.

    Args:
        folder: the run folder.
        done: epochs that are behind; events of later ones, of a run that was broken off, are hidden.
    """

    def __init__(self, folder: Path, done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "`tensorboard`: not installed; pip install 'any2point[train]' or set train.tensorboard=false"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def epoch(self, record: Mapping[str, Any]) -> None:
        """Write a record, or a part of one."""
        for name in _NAMES:
            if name in record:
                self._writer.add_scalar(name, record[name], record["epoch"])
        self._writer.flush()

    def close(self) -> None:
        """Write out what there is."""
        self._writer.close()
