"""Several processes: the same update as one, the same bits everywhere, and no process left behind.

On machines with two GPUs they use these and NCCL, elsewhere the CPU and gloo.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import tiny
import torch

from any2point import Any2Point
from any2point.train import TrainConfig, evaluate
from any2point.train.ranks import Ranks
from any2point.train.runtime import pick_processes

TWO_GPUS = torch.cuda.device_count() >= 2
DEVICE = "cuda" if TWO_GPUS else "cpu"
PAIR: dict[str, Any] = {"select": "validation", "eval_batch_size": 2}


def train(
    folder: Path, world: int, kind: str = "model", moment: tuple[str, int] | None = None, **options: Any
) -> list[int | None]:
    folder.mkdir(exist_ok=True)
    options = {"device": DEVICE, "epochs": 3, **options}
    return processes.wait(processes.start(world, processes.train, folder, kind, options, moment))


def outcome(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes on the model with everything; one evaluates three batches, the other two."""
    folder = tmp_path_factory.mktemp("pair")
    assert train(folder, 2, **PAIR) == [0, 0]
    return folder


def test_two_halves_are_the_update_of_the_whole(tmp_path: Path) -> None:
    """Without batch normalisation and dropout: data, gradients and weights of every step, and losses."""
    assert train(tmp_path / "one", 1, "moments") == [0]
    assert train(tmp_path / "two", 2, "moments") == [0, 0]
    one, two, other = outcome(tmp_path / "one"), outcome(tmp_path / "two"), outcome(tmp_path / "two", 1)
    assert len(one["steps"]) == len(two["steps"]) == 9
    for expected, got, same in zip(one["steps"], two["steps"], other["steps"]):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert all(map(torch.equal, got, same))
    for expected, got in zip(one["gradients"], two["gradients"]):  # Adam would forgive a factor
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(one["steps"][0][0], one["steps"][-1][0])
    for expected, got in zip(one["history"], two["history"]):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["train_accuracy"] == expected["train_accuracy"]
        assert got["lr"] == expected["lr"]
    for expected, *halves in zip(one["batches"], two["batches"], other["batches"]):
        for whole, half, rest in zip(expected, *halves):
            torch.testing.assert_close(torch.cat([half, rest]), whole, rtol=0, atol=1e-6)


def test_ranks_stay_equal_bit_for_bit(pair: Path) -> None:
    """Though they began with different weights and see different data."""
    first, second = outcome(pair, 0), outcome(pair, 1)
    assert first["fingerprint"] == second["fingerprint"]
    for ours, theirs in zip(first["steps"], second["steps"]):
        assert all(map(torch.equal, ours, theirs))
    assert not torch.equal(first["batches"][0][1], second["batches"][0][1])
    assert first["history"] == second["history"]


def test_shared_statistics_are_those_of_the_whole(tmp_path: Path) -> None:
    """With batch normalisation over all ranks, two are one process: gradients, losses, running statistics."""
    options = {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0}
    assert train(tmp_path / "one", 1, "still", **options) == [0]
    assert train(tmp_path / "two", 2, "still", sync_batch_norm=True, **options) == [0, 0]
    assert train(tmp_path / "own", 2, "still", **options) == [0, 0]
    one, two, own = (outcome(tmp_path / name) for name in ("one", "two", "own"))
    first = one["gradients"][0]
    error = [max(map(distance, got["gradients"][0], first)) for got in (two, own)]
    assert error[0] < 1e-3
    assert error[1] > 0.1
    assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-3)
    assert two["fingerprint"] == outcome(tmp_path / "two", 1)["fingerprint"]
    models = [Any2Point.from_pretrained(tmp_path / name / "run") for name in ("one", "two")]
    for expected, got in zip(*(model.buffers() for model in models)):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=1e-3)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_evaluation_is_that_of_one_process(pair: Path) -> None:
    """Of the same batches, whose predictions come back in the order of the clouds."""
    model = Any2Point.from_pretrained(pair / "run")
    assert processes.fingerprint(model) == outcome(pair)["fingerprint"]
    result = evaluate(model, tiny.dataset(9, 1), tiny.config(device=DEVICE, eval_batch_size=2))
    assert torch.equal(result.predictions, outcome(pair)["predictions"])
    assert result.loss == pytest.approx(outcome(pair)["loss"], rel=1e-6)
    assert result.confusion.sum() == 9


def test_killed_ranks_continue_bit_for_bit(pair: Path, tmp_path: Path) -> None:
    options = {**PAIR, "save_every_steps": 1}
    assert train(tmp_path, 2, moment=("step", 4), **options) == [-9, -9]
    assert train(tmp_path, 2, moment=("write", 4), **options)[0] == -9  # the first rank writes
    assert train(tmp_path, 2, **options) == [0, 0]
    for rank in (0, 1):
        got, expected = outcome(tmp_path, rank), outcome(pair, rank)
        assert got["fingerprint"] == expected["fingerprint"]
        assert got["history"] == expected["history"]
    assert train(tmp_path, 1, **options) == [7]
    told = (tmp_path / "error0.txt").read_text()  # dropout and batch normalisation would differ
    assert "expected the 2 process(es) that the run was started with, got 1" in told


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_outlives_another(tmp_path: Path, rank: int) -> None:
    """One is killed in the middle of training; the other does not wait for it."""
    arguments = (tmp_path, "model", {"device": DEVICE, "epochs": 10_000}, None)
    pair = processes.start(2, processes.train, *arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 60
    while not (metrics.exists() and metrics.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(pair[rank].pid or 0, signal.SIGKILL)
    if TWO_GPUS and rank == 1:  # a launcher's work: with NCCL only the loss of rank 0 is noticed soon
        pair[0].kill()
    started = time.time()
    codes = processes.wait(pair)
    assert codes[rank] == -9
    assert codes[1 - rank] not in (None, 0)
    assert time.time() - started < 15
    if codes[1 - rank] == 7:
        told = (tmp_path / f"error{1 - rank}.txt").read_text()
        assert told == f"{1 - rank}: another process of this run was killed"


def test_an_error_in_one_rank_ends_all_with_one_message(tmp_path: Path) -> None:
    codes = train(tmp_path, 2, moment=("raise", 4))
    assert codes == [1, 7]
    assert (tmp_path / "error1.txt").read_text() == "1: something is wrong here"
    assert not (tmp_path / "error0.txt").exists()


def test_an_error_in_all_ranks_is_told_once(tmp_path: Path) -> None:
    assert sorted(train(tmp_path, 2, batch_size=9), key=str) == [1, 7]
    (told,) = tmp_path.glob("error*.txt")
    assert told.read_text().endswith("`batch_size`: expected a multiple of the 2 processes, got 9")


def test_gradients_are_averaged_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks that hold the same: the sum is twice the tensor, the mean the tensor itself."""
    monkeypatch.setattr("any2point.train.ranks._BUCKET", 10)
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sent.append(flat.mul_(2).numel()))
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in [(2, 3), (4,), (5,), (30,), (1,)]]
    params.append(torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)))
    for number, param in enumerate(params):
        param.grad = torch.full_like(param, number)
    params[2].grad = None
    Ranks(torch.device("cpu"), 0, 2).average_gradients(params)
    assert sent == [10, 30, 1, 3]
    assert all((param.grad == number).all() for number, param in enumerate(params) if param.grad is not None)


def test_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert pick_processes(1, cpu) == (1, 1)
    assert pick_processes(3, cpu) == (3, 1)
    assert pick_processes(0, cpu) == (1, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert pick_processes(0, torch.device("cuda")) == (4, 1)
    with pytest.raises(ValueError, match="`devices`: expected at most the 4 GPUs"):
        pick_processes(5, torch.device("cuda"))
    with pytest.raises(ValueError, match=r"`device`: expected cpu or cuda with 2 `devices`, got cuda:1"):
        pick_processes(2, torch.device("cuda:1"))
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert pick_processes(1, torch.device("cuda")) == pick_processes(4, torch.device("cuda")) == (4, 2)
    with pytest.raises(ValueError, match="`devices`: expected the 4 processes of torchrun, got 2"):
        pick_processes(2, torch.device("cuda"))
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="`devices`"):
            TrainConfig(devices=bad)
