"""Training in processes that can be killed, forked from a server that has imported what they need."""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import signal
import socket
import sys
import traceback
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from any2point.train import engine, fit
from any2point.train.progress import SilentReporter
from any2point.train.runtime import Runtime, import_fabric

import_fabric()


@functools.cache
def server() -> Any:
    """The context of the processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["processes"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        environment.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # counting GPUs would spoil forks otherwise
        forkserver.ensure_running()
    return context


def start(world: int, target: Any, *arguments: Any) -> list[BaseProcess]:
    """Run target(*arguments) in processes whose environment is that of torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = server()
    processes = [context.Process(target=_run, args=(r, world, port, target, arguments)) for r in range(world)]
    for process in processes:
        process.start()
    return processes


def wait(processes: list[BaseProcess], seconds: float = 60) -> list[int | None]:
    """Exit codes; None for those that have not ended in time, which are ended then."""
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _run(rank: int, world: int, port: int, target: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test", "NCCL_NVLS_ENABLE": "0",
        }  # fmt: skip
    target(rank, *arguments)


def fingerprint(model: nn.Module) -> str:
    """Of every bit of parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(
    rank: int, folder: Path, kind: str, options: dict[str, Any], moment: tuple[str, int | str] | None
) -> None:
    """Train, or continue training; write what came of it to `folder`/rank.pt.

    Args:
        rank: of this process.
        folder: with the run in `run`.
        kind: "model", "still" for the one without dropout, or "moments".
        options: of the configuration.
        moment: when to end without any clean-up: ("step", n), in the n-th write ("write", n) or between the
            n-th write, or that of a file, and its renaming ("rename", n or name); ("raise", n) fails at a
            step, in rank 1 only.
    """
    still = {"dropout": 0.0, "adapter_dropout": 0.0} if kind == "still" else {}
    model = tiny.Moments() if kind == "moments" else tiny.model(rank, **still)
    seen: dict[str, Any] = {"steps": [], "gradients": [], "batches": []}
    _end_at(moment)
    update, load = Runtime.update, engine._Run._load

    def recording_update(self: Runtime, *arguments: Any) -> None:
        update(self, *arguments)
        params = arguments[1]
        seen["steps"].append([param.detach().cpu().clone() for param in params])
        seen["gradients"].append([param.grad.cpu().clone() for param in params])
        if moment is not None and moment[0] in ("step", "raise") and len(seen["steps"]) == moment[1]:
            if moment[0] == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            elif rank == 1:
                raise ValueError("something is wrong here")

    def recording_load(self: Any, *arguments: Any) -> Any:
        batch = load(self, *arguments)
        seen["batches"].append([tensor.cpu().clone() for tensor in batch])
        return batch

    Runtime.update, engine._Run._load = recording_update, recording_load  # type: ignore[method-assign]
    try:
        result = fit(
            model, tiny.dataset(), tiny.dataset(9, 1), tiny.config(**options), folder / "run",
            resume=True, reporter=SilentReporter(),
        )  # fmt: skip
    except Exception as error:
        (folder / f"error{rank}.txt").write_text(f"{getattr(error, 'rank', None)}: {error}")
        traceback.print_exc()
        os._exit(7)
    timing = ("seconds", "clouds_per_second")
    history = [{name: v for name, v in record.items() if name not in timing} for record in result.history]
    outcome = {"fingerprint": fingerprint(model), "history": history, "predictions": result.test.predictions}
    torch.save(seen | outcome | {"loss": result.test.loss}, folder / f"{rank}.pt")


def _end_at(moment: tuple[str, int | str] | None) -> None:
    if moment is None or moment[0] not in ("write", "rename"):
        return
    counts = {"write": 0, "rename": 0}
    sync, replace = os.fsync, os.replace

    def counting_sync(handle: int) -> None:
        counts["write"] += 1
        if moment == ("write", counts["write"]):
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    def counting_replace(source: Any, target: Any) -> None:
        counts["rename"] += 1
        if moment in (("rename", counts["rename"]), ("rename", Path(target).name)):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    os.fsync, os.replace = counting_sync, counting_replace
