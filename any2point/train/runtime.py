"""Where and how precisely a run computes: the seam behind which a distributed engine can go.

The engine asks this class for a device, an autocast context and an optimiser step, and nothing else of the
kind.
It is plain PyTorch: on one device Lightning Fabric would add about two seconds of imports and no function.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention
import torch.utils.deterministic
from torch import Tensor

from any2point.train.config import TrainConfig

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Runtime:
    """Device and precision of a run.

    Args:
        config: its `device`, `precision` and `deterministic` are used.

    Raises:
        ValueError: a device that is not there, or fp16 on a CPU.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.device = pick_device(config.device)
        self.precision = pick_precision(config.precision, self.device)
        self.deterministic = config.deterministic
        if self.precision == "fp16" and self.device.type != "cuda":
            raise ValueError("`precision`: expected fp32 or bf16 on a CPU, got fp16")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context to run the model and its loss in."""
        return autocast(self.precision, self.device)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled as the precision wants it."""
        self.scaler.scale(loss).backward()

    def update(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], clip: float) -> None:
        """Clip and apply the gradients."""
        if clip:
            self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(params, clip)
        self.scaler.step(optimizer)
        self.scaler.update()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Deterministic algorithms while inside; random state and settings are put back afterwards."""
        before = torch.are_deterministic_algorithms_enabled()
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        memory: Any = torch.utils.deterministic
        fill = memory.fill_uninitialized_memory
        devices = [self.device] if self.device.type == "cuda" else []
        if self.deterministic:
            # cuBLAS reads this when it makes its first handle.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            memory.fill_uninitialized_memory = False  # for finding bugs, and slow
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        except RuntimeError as error:
            if "deterministic" in str(error):
                reason = str(error).splitlines()[0]
                raise ValueError(f"`deterministic`: not possible here, set it to false ({reason})") from error
            raise
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
            memory.fill_uninitialized_memory = fill


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" is the first GPU if there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"`device`: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"`device`: expected one of {torch.cuda.device_count()} GPUs, got {name!r}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"`device`: expected auto, cpu, cuda or cuda:N, got {name!r}")
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """A precision by name; "auto" is bf16 on hardware with bf16 multipliers, fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if _cpu_multiplies_bf16() else "fp32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """`torch.autocast`, or nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    context = contextlib.ExitStack()
    context.enter_context(torch.autocast(device.type, dtype=_DTYPES[precision]))
    if device.type == "cpu":
        # PyTorch's fused attention on CPUs is up to five times slower backwards in bf16 than plain products.
        context.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
    return context


def _cpu_multiplies_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
