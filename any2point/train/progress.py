"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from typing import Any, Protocol


class Reporter(Protocol):
    """What `fit` tells about its progress."""

    def start(self, epochs: int, steps: int, done: int) -> None:
        """Training begins: `epochs` of `steps` steps, of which `done` epochs are behind."""

    def step(self, number: int) -> None:
        """Step `number` of the epoch is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; its record as in `RunResult.history`."""

    def stop(self) -> None:
        """Training is over, or was broken off."""


class SilentReporter:
    """Says nothing."""

    def start(self, epochs: int, steps: int, done: int) -> None: ...
    def step(self, number: int) -> None: ...
    def epoch(self, record: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class PlainReporter(SilentReporter):
    """One line for the first, the last and about ten epochs between.

    Args:
        label: put before every line.
    """

    def __init__(self, label: str = "") -> None:
        self.label = f"{label}: " if label else ""
        self.epochs = self.every = 1

    def start(self, epochs: int, steps: int, done: int) -> None:
        self.epochs, self.every = epochs, max(1, epochs // 10)
        if done:
            print(f"{self.label}resumed after epoch {done} of {epochs}", flush=True)

    def epoch(self, record: dict[str, Any]) -> None:
        number = record["epoch"]
        if number in (1, self.epochs) or number % self.every == 0:
            print(f"{self.label}epoch {number}/{self.epochs}  {describe(record)}", flush=True)


class RichReporter:
    """A bar that moves with every step.

    Args:
        label: put before the bar.
    """

    def __init__(self, label: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}", style="dim"),
        )
        self.label = label or "training"
        self.steps = 1
        self.behind = 0

    def start(self, epochs: int, steps: int, done: int) -> None:
        self.steps, self.behind = steps, done
        total = epochs * steps
        self.task = self.progress.add_task(self.label, total=total, completed=done * steps, status="")
        self.progress.start()

    def step(self, number: int) -> None:
        self.progress.update(self.task, completed=self.behind * self.steps + number)

    def epoch(self, record: dict[str, Any]) -> None:
        self.behind = record["epoch"]
        self.progress.update(self.task, status=describe(record))

    def stop(self) -> None:
        self.progress.stop()


def describe(record: dict[str, Any]) -> str:
    """An epoch's record in one short line."""
    parts = [f"loss {record['loss']:.3f}", f"train {100 * record['train_accuracy']:.1f} %"]
    parts += [
        f"{name} {100 * record[f'{name}_accuracy']:.1f} %"
        for name in ("validation", "test")
        if f"{name}_accuracy" in record
    ]
    return "  ".join([*parts, f"{record['clouds_per_second']:.0f} clouds/s"])


def on_terminal() -> bool:
    """Whether a person is watching."""
    return sys.stdout.isatty()


def default_reporter(label: str = "") -> Reporter:
    """A bar on a terminal where rich is installed, plain lines elsewhere."""
    if on_terminal():
        try:
            return RichReporter(label)
        except ImportError:
            pass
    return PlainReporter(label)
