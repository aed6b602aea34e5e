"""Runs that are killed, at any moment, and continued: they end as if nothing had happened, bit for bit."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch

from any2point.train.files import METRICS, RECIPE, RESULTS, STATE

SAME = ("model.safetensors", "config.json", RECIPE)


def outcome(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{rank}.pt", weights_only=True)


def train(folder: Path, options: dict[str, Any], moment: tuple[str, int | str] | None = None) -> int | None:
    folder.mkdir(exist_ok=True)
    return processes.wait(processes.start(1, processes.train, folder, "model", options, moment))[0]


def check_same(cut: Path, whole: Path) -> None:
    got, expected = outcome(cut), outcome(whole)
    assert got["fingerprint"] == expected["fingerprint"]
    assert got["history"] == expected["history"]
    assert torch.equal(got["predictions"], expected["predictions"])
    assert all((cut / "run" / name).read_bytes() == (whole / "run" / name).read_bytes() for name in SAME)
    lines = [json.loads(line)["loss"] for line in (cut / "run" / METRICS).read_text().splitlines()]
    assert lines == [record["loss"] for record in expected["history"]]
    assert not list((cut / "run").glob(".*"))


MOMENTS: list[tuple[str, int | str]] = [
    ("step", 1),
    ("step", 4),  # of six epochs of three steps: after the state of step 3 or, in the middle, of step 2
    ("write", 3),
    ("rename", 4),
    ("write", 6),
    ("rename", "model.safetensors"),
]


@pytest.mark.parametrize(("select", "every"), [("last", 0), ("validation", 2)])
def test_killed_at_chosen_moments(tmp_path: Path, select: str, every: int) -> None:
    """A run that is killed at one moment after the other, in the middle of files too."""
    options = {"select": select, "save_every_steps": every, "yaw": 90.0}
    assert train(tmp_path / "whole", options) == 0
    for moment in MOMENTS:
        assert train(tmp_path / "cut", options, moment) == -9, moment
        assert not (tmp_path / "cut" / "run" / RESULTS).exists()
    assert train(tmp_path / "cut", options) == 0
    check_same(tmp_path / "cut", tmp_path / "whole")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    options = {"save_every_steps": 1, "epochs": 8}
    processes.wait(processes.start(1, abs))  # the first process waits for the server of all
    start = time.perf_counter()
    assert train(tmp_path / "whole", options) == 0
    whole = time.perf_counter() - start
    (tmp_path / "cut").mkdir()
    draw = random.Random(0)
    killed = 0
    for _ in range(12):
        (process,) = processes.start(1, processes.train, tmp_path / "cut", "model", options, None)
        process.join(whole * draw.uniform(0.1, 0.45))  # so that the third may be the first to end
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        killed += 1
    assert train(tmp_path / "cut", options) == 0
    assert killed >= 2
    check_same(tmp_path / "cut", tmp_path / "whole")


def test_steps_in_the_middle_of_an_epoch_are_not_repeated(tmp_path: Path) -> None:
    options = {"save_every_steps": 1}
    assert train(tmp_path, options, ("step", 5)) == -9
    state = torch.load(tmp_path / "run" / STATE, weights_only=True)
    assert (state["epoch"], state["step"]) == (1, 1)
    assert train(tmp_path, options) == 0
    assert len(outcome(tmp_path)["steps"]) == 18 - 4
