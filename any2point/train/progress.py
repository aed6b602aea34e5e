"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol


class Reporter(Protocol):
    """What `fit` tells about its progress."""

    def start(self, epochs: int, steps: int, done: int, clouds: int) -> None:
        """Training begins: `epochs` of `steps` steps of `clouds` clouds, with `done` epochs behind."""

    def step(self, number: int) -> None:
        """Step `number` of the epoch is done."""

    def epoch(self, record: dict[str, Any]) -> None:
        """An epoch is done; its record as in `RunResult.history`."""

    def stop(self) -> None:
        """Training is over, or was broken off."""


class SilentReporter:
    """Says nothing."""

    def start(self, epochs: int, steps: int, done: int, clouds: int) -> None: ...
    def step(self, number: int) -> None: ...
    def epoch(self, record: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class PlainReporter(SilentReporter):
    """One line for the first, the last and about ten epochs between, and at least one every two minutes.

    Args:
        label: put before every line.
        patience: seconds after which a line is written in the middle of an epoch.
    """

    def __init__(self, label: str = "", patience: float = 120.0) -> None:
        self.label = f"{label}: " if label else ""
        self.patience = patience

    def start(self, epochs: int, steps: int, done: int, clouds: int) -> None:
        self.epochs, self.every, self.steps, self.clouds = epochs, max(1, epochs // 10), steps, clouds
        self.behind = done
        self.begun = self.spoken = time.perf_counter()
        self.first: int | None = None  # the step that the clock began with
        if done:
            self._say(f"resumed after epoch {done} of {epochs}")

    def step(self, number: int) -> None:
        at = self.behind * self.steps + number
        if self.first is None:
            self.first = at - 1
        if number < self.steps and time.perf_counter() - self.spoken > self.patience:
            rate = self.clouds * (at - self.first) / (time.perf_counter() - self.begun)
            where = f"epoch {self.behind + 1}/{self.epochs}  step {number}/{self.steps}"
            self._say(f"{where}  {rate:.0f} clouds/s  {self._left(at)}")

    def epoch(self, record: dict[str, Any]) -> None:
        self.behind = number = record["epoch"]
        if number in (1, self.epochs) or number % self.every == 0:
            left = "" if number == self.epochs else f"  {self._left(number * self.steps)}"
            self._say(f"epoch {number}/{self.epochs}  {describe(record)}{left}")

    def _left(self, at: int) -> str:
        """How long the rest takes, evaluations included, if it goes on as until now."""
        done = at - (self.first or 0)
        passed = time.perf_counter() - self.begun
        return f"{duration(passed / done * (self.epochs * self.steps - at))} left"

    def _say(self, text: str) -> None:
        print(f"{self.label}{text}", flush=True)
        self.spoken = time.perf_counter()


class RichReporter:
    """A bar that moves with every step, with the rate of the last steps and the time that is left.

    Args:
        label: put before the bar.
    """

    def __init__(self, label: str = "") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        class Status(TextColumn):
            """Cut short where the terminal is too narrow, before any other column is."""

            def render(self, task: Any) -> Any:
                text = super().render(task)
                text.no_wrap, text.overflow = True, "ellipsis"
                return text

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            Status("{task.fields[status]}", style="dim", table_column=Column(no_wrap=False)),
        )
        self.label = label or "training"

    def start(self, epochs: int, steps: int, done: int, clouds: int) -> None:
        self.steps, self.behind, self.clouds = steps, done, clouds
        total = epochs * steps
        self.task = self.progress.add_task(
            self.label, total=total, completed=done * steps, status="", rate=""
        )
        self.progress.start()

    def step(self, number: int) -> None:
        speed = self.progress.tasks[0].speed
        rate = "" if speed is None else f"{speed * self.clouds:.0f} clouds/s"
        self.progress.update(self.task, completed=self.behind * self.steps + number, rate=rate)

    def epoch(self, record: dict[str, Any]) -> None:
        self.behind = record["epoch"]
        self.progress.update(self.task, status=describe(record, rate=False))

    def stop(self) -> None:
        self.progress.stop()


def describe(record: dict[str, Any], rate: bool = True) -> str:
    """An epoch's record in one short line, with its clouds per second if wanted."""
    parts = [f"loss {record['loss']:.3f}", f"train {100 * record['train_accuracy']:.1f} %"]
    parts += [
        f"{name} {100 * record[f'{name}_accuracy']:.1f} %"
        for name in ("validation", "test")
        if f"{name}_accuracy" in record
    ]
    return "  ".join([*parts, *([f"{record['clouds_per_second']:.0f} clouds/s"] if rate else [])])


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3 h 05 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


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
