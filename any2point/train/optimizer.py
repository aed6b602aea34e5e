"""AdamW with gradients clipped in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from any2point.sources.glue import in_kernels


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)`, whose state it has, and which on CUDA clips by itself."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        on_gpu = any(p.is_cuda for group in groups for p in group["params"])
        super().__init__(groups, lr=lr, fused=True, capturable=on_gpu)  # the count of steps is on the device
        self._tables: Any = None

    @torch.no_grad()
    def clipped_step(self, clip: float) -> None:
        """A step by gradients whose norm, of all together, is brought to at most `clip` unless that is 0."""
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        params = [p for group in groups for p in group]
        if not params or not all(map(_is_plain, params)):
            if clip:
                torch.nn.utils.clip_grad_norm_(params, clip)
            self.step()
            return
        from any2point.triton.adamw import Tables

        rows = [[self._tensors(p) for p in group] for group in groups]
        if self._tables is None or not self._tables.fits(rows):
            self._tables = Tables(rows)
        self._tables.step(rows, self.param_groups, clip)

    def _tensors(self, parameter: Tensor) -> list[Tensor]:
        """Parameter, gradient, both averages and the count of steps."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] = state["step"].to(parameter.device)  # torch's own may have it on the host
        return [parameter, parameter.grad, *(state[name] for name in ("exp_avg", "exp_avg_sq", "step"))]

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tables": None}


def _is_plain(parameter: Tensor) -> bool:
    """Whether the kernels take a parameter and its gradient."""
    grad = parameter.grad
    return grad is not None and in_kernels(parameter) and _is_flat(parameter) and _is_flat(grad)


def _is_flat(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()
