"""Where and how precisely a run computes, on Lightning Fabric: devices, processes, autocast, the update.

Fabric launches the processes (`devices`, or those that torchrun made), picks each one's device, joins them
and scales losses in fp16. The model is not wrapped: `ranks` says why. Fabric takes a second to import, so
this is done when a `Runtime` is made, which only training and evaluation do.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.attention
import torch.utils.deterministic
from torch import Tensor

from any2point.nn.tokenizer import float16_operands
from any2point.train.config import TrainConfig
from any2point.train.optimizer import AdamW
from any2point.train.ranks import Ranks, leave

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FABRIC = {"fp32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


class Runtime:
    """Device, precision and processes of a run.

    With more than one process, each makes its own; with `devices` the first process starts the others, which
    run the same program from its beginning.

    Args:
        config: its `device`, `devices`, `precision` and `deterministic` are used.

    Attributes:
        device: of this process.
        precision: "fp32", "tf32", "bf16" or "fp16".
        ranks: this process among those of the run.
        scaler: of losses in fp16, None otherwise.

    Raises:
        ValueError: a device that is not there, or tf32 or fp16 on a CPU.
        ImportError: without Lightning Fabric.
    """

    def __init__(self, config: TrainConfig) -> None:
        device = pick_device(config.device)
        self.precision = pick_precision(config.precision, device)
        self.deterministic = config.deterministic
        local, nodes = pick_processes(config.devices, device)
        kind: dict[str, Any] = {"accelerator": device.type, "precision": _FABRIC[self.precision]}
        if local * nodes > 1:
            kind |= {"devices": local, "num_nodes": nodes, "strategy": "ddp"}
        else:
            kind |= {"devices": [device.index or 0] if device.type == "cuda" else 1}
        self.fabric = import_fabric().Fabric(**kind)
        self.fabric.launch()
        if local * nodes > 1:
            atexit.register(leave)
        self.device: torch.device = self.fabric.device
        self.ranks = Ranks(self.device, self.fabric.global_rank, self.fabric.world_size)
        self.scaler: torch.amp.GradScaler | None = getattr(self.fabric.strategy.precision, "scaler", None)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context to run the model and its loss in."""
        return _for_precision(self.fabric.autocast(), self.precision, self.device)

    def seed(self, value: int) -> None:
        """As `torch.manual_seed`, but for this device alone, which is 70 times faster."""
        torch.default_generator.manual_seed(value)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(value)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled as the precision wants it."""
        self.fabric.backward(loss)

    def optimizer(self, groups: list[dict[str, Any]], lr: float) -> AdamW:
        """AdamW in one kernel per group."""
        return AdamW(groups, lr=lr)

    def update(self, optimizer: AdamW, params: Sequence[Tensor], clip: float) -> None:
        """Average the gradients over the ranks, clip and apply them."""
        self.ranks.average_gradients(params)
        if self.scaler is None:
            optimizer.clipped_step(clip)
            return
        self.scaler.unscale_(optimizer)
        if clip:
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
            # Gradients are computed outside `autocast`, so that it is here that tf32 holds for them.
            with torch.random.fork_rng(devices=devices), _for_precision(None, self.precision, self.device):
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
    if name in ("tf32", "fp16") and device.type != "cuda":
        raise ValueError(f"`precision`: expected fp32 or bf16 on a CPU, got {name}")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if _cpu_multiplies_bf16() else "fp32"


def pick_processes(devices: int, device: torch.device) -> tuple[int, int]:
    """How many processes a run has on this machine, and on how many machines.

    Args:
        devices: as in `TrainConfig`.
        device: the device of the run.
    """
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if _under_torchrun():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if devices not in (0, 1, local):
            raise ValueError(f"`devices`: expected the {local} processes of torchrun, got {devices}")
    else:
        local = devices or max(1, gpus)
    if local > 1 and device.index is not None:
        raise ValueError(f"`device`: expected cpu or cuda with {local} `devices`, got {device}")
    if device.type == "cuda" and local > gpus:
        raise ValueError(f"`devices`: expected at most the {gpus} GPUs that there are, got {local}")
    nodes = int(os.environ["WORLD_SIZE"]) // local if _under_torchrun() else 1
    return local, nodes


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """What `Runtime.autocast` gives, where nothing else of Fabric is needed."""
    context = torch.autocast(device.type, dtype=_DTYPES.get(precision), enabled=precision in _DTYPES)
    return _for_precision(context, precision, device)


@contextlib.contextmanager
def _for_precision(
    context: contextlib.AbstractContextManager | None, precision: str, device: torch.device
) -> Iterator[None]:
    """Autocast, if given, with what else a precision needs."""
    with contextlib.ExitStack() as stack:
        if context is not None:
            stack.enter_context(context)
            if precision == "bf16" and device.type == "cpu":
                # PyTorch's fused attention on CPUs is up to five times slower backwards in bf16.
                stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        if precision == "tf32":
            stack.enter_context(float16_operands())  # of as many bits, at twice the rate
            before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            stack.callback(setattr, torch.backends.cuda.matmul, "fp32_precision", before)
        yield


def _under_torchrun() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_torchelastic_launched()


def import_fabric() -> Any:
    """Lightning Fabric's module, from its own package or the large one."""
    for name in ("lightning_fabric", "lightning.fabric"):
        try:
            fabric = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("lightning"):
                raise
            continue
        logging.getLogger(name).setLevel(logging.WARNING)  # it would announce precision and processes
        return fabric
    raise ImportError("training needs Lightning Fabric: pip install 'any2point[train]'")


def _cpu_multiplies_bf16() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
