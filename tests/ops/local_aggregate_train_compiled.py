"""Compiles the training passes of local_aggregate for GPUs that need not be there, and runs none of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from gpus import GPUS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from any2point.ops import _local_aggregate_train as passes
from any2point.reference.local_aggregate import wavelengths
from any2point.triton.local_aggregate_train import TritonPasses

compiled: list[tuple[str, int]] = []


class Driver:
    """As much of a GPU's as compiling needs."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


_run = JITFunction.run


def _compile(self: JITFunction, *args: Any, **kwargs: Any) -> None:
    kernel = _run(self, *args, **(kwargs | {"warmup": True}))
    compiled.append((self.__name__, kernel.metadata.shared))


def step(width: int, hidden: int, units: int, neighbors: int, dtype: torch.dtype) -> None:
    """Forward and backward of numbers that nobody computes."""
    index = torch.zeros(2, 32, neighbors, dtype=torch.int64)
    rows: list[Any] = [torch.rand(2, 64, 3), torch.rand(2, 64, width // 2).to(dtype), index[..., 0], index]
    rows += [None, wavelengths(width, 1000.0, like=rows[0]), 100.0, True]
    shapes = [(hidden, width), *[(hidden,)] * 3, (width, hidden), *[(width,)] * 3]
    parameters: list[Tensor] = [torch.rand(shape) for _ in range(units) for shape in shapes]
    found = passes.forward._init_fn(*rows, 1e-5, False, parameters, False)
    passes.backward._init_fn(torch.rand_like(found[0]), *rows, False, parameters, found, False)


def main() -> None:
    passes._kind = lambda *_: TritonPasses
    JITFunction.run = _compile
    capability, _, most = GPUS["sm_89"]  # no GPU from sm_80 on has less shared memory
    triton.runtime.driver.set_active(Driver(capability))
    step(192, 96, 2, 81, torch.float16)
    step(384, 192, 1, 33, torch.float32)
    assert len({name for name, _ in compiled}) == 13
    for name, shared in compiled:
        assert shared <= most, f"{name}: {shared} bytes of shared memory"


if __name__ == "__main__":
    main()
