"""What a run says while it goes on: lines, a bar, TensorBoard events."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import tiny

from any2point.train import PlainReporter, fit
from any2point.train import progress as module
from any2point.train.progress import RichReporter, SilentReporter, describe, duration

RECORD = {"epoch": 1, "loss": 1.0, "train_accuracy": 0.5, "test_accuracy": 0.25, "clouds_per_second": 10.4}


def test_describe() -> None:
    assert describe(RECORD) == "loss 1.000  train 50.0 %  test 25.0 %  10 clouds/s"
    assert describe(RECORD, rate=False) == "loss 1.000  train 50.0 %  test 25.0 %"


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 720, 5399, 11_100)] == [
        "0 s", "89 s", "2 min", "12 min", "1 h 30 min", "3 h 05 min"
    ]  # fmt: skip


def test_plain_lines_with_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four epochs of ten steps of 32 clouds, half a second each, resumed after the first."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])
    reporter = PlainReporter("demo", patience=3)
    reporter.start(4, 10, 1, 32)
    for epoch in (2, 3, 4):
        for step in range(10):
            clock[0] += 0.5
            reporter.step(step + 1)
        reporter.epoch(RECORD | {"epoch": epoch})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "demo: resumed after epoch 1 of 4"
    assert lines[1] == "demo: epoch 2/4  step 7/10  64 clouds/s  12 s left"
    assert lines[2] == f"demo: epoch 2/4  {describe(RECORD)}  10 s left"
    assert lines[-1] == f"demo: epoch 4/4  {describe(RECORD)}"


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    rich = pytest.importorskip("rich.console")
    reporter = RichReporter("demo")
    out = io.StringIO()
    reporter.progress.live.console = rich.Console(file=out, force_terminal=True, width=80)
    reporter.start(2, 3, 0, 32)
    for step in (1, 2, 3):
        reporter.step(step)
    reporter.epoch(RECORD)
    reporter.stop()
    shown = out.getvalue()
    assert "3/6" in shown
    assert "clouds/s" in shown
    assert "loss 1.000" in shown


def test_tensorboard_events_across_a_resumed_run(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(tiny.model(), tiny.dataset(), tiny.dataset(9, 1), tiny.config(epochs=3, tensorboard=True), tmp_path,
        reporter=SilentReporter())  # fmt: skip
    again = fit(tiny.model(), tiny.dataset(), tiny.dataset(9, 1), tiny.config(epochs=3, tensorboard=True),
        tmp_path, resume=True, reporter=SilentReporter())  # fmt: skip
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    names = {"loss", "lr", "train_accuracy", "test_accuracy", "clouds_per_second", "seconds"}
    assert set(events.Tags()["scalars"]) == names
    for name in ("loss", "test_accuracy"):
        values = {event.step: event.value for event in events.Scalars(name)}
        assert values == pytest.approx({record["epoch"]: record[name] for record in again.history})


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"`tensorboard`: not installed; pip install 'any2point\[train\]'"):
        fit(tiny.model(), tiny.dataset(), None, tiny.config(tensorboard=True), tmp_path / "run",
            reporter=SilentReporter())  # fmt: skip
    assert not (tmp_path / "run").exists()
    fit(tiny.model(), tiny.dataset(), None, tiny.config(epochs=1), tmp_path / "run",
        reporter=SilentReporter())  # fmt: skip
