"""Classification head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from any2point.nn.batch_norm import BatchNorm1d
from any2point.reference.batch_norm import are_shared
from any2point.sources.glue import in_kernels, is_hooked
from any2point.triton import tf32_allowed

_KINDS = [nn.Linear, BatchNorm1d, nn.ReLU, nn.Dropout] * 2 + [nn.Linear]


class ClassificationHead(nn.Sequential):
    """Two hidden layers with batch normalisation, ReLU, dropout; then logits: `[B, F]` -> `[B, classes]`."""

    def __init__(
        self, features: int, classes: int, *, hidden: int = 256, dropout: float = 0.5, bias: bool = False
    ) -> None:
        super().__init__(
            nn.Linear(features, hidden, bias=bias),
            BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden, bias=bias),
            BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._in_kernels(x) if self._is_fused(x) else super().forward(x)

    def _is_fused(self, x: Tensor) -> bool:
        """Whether there are kernels for all of it: on CUDA, for rows that one program can have."""
        if not in_kernels(x) or is_hooked(*self) or [type(part) for part in self] != _KINDS:
            return False
        tensors = [x, *self.parameters(), *(b for b in self.buffers() if b.is_floating_point())]
        if any(tensor.dtype != torch.float32 for tensor in tensors) or x.dim() != 2 or not len(x):
            return False
        if not torch.is_autocast_enabled("cuda") and not tf32_allowed():  # torch is more exact then
            return False
        norms: list[Any] = [self[1], self[5]]
        drops: list[Any] = [self[3], self[7]]
        if drops[0].p != drops[1].p or any(part.training != self.training for part in norms + drops):
            return False
        if any(norm.momentum is None or norm.weight is None or norm.running_mean is None for norm in norms):
            return False
        from any2point.triton.head import MOST_ROWS

        if len(x) > MOST_ROWS and torch.is_grad_enabled():
            return False
        return not self.training or (2 <= len(x) <= MOST_ROWS and not are_shared())

    def _in_kernels(self, x: Tensor) -> Tensor:
        from any2point.triton.head import Layer, Norm

        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        parts: list[Any] = list(self)
        rate = parts[3].p if self.training else 0.0
        rescale = 1 / (1 - rate) if rate < 1 else 0.0
        keep: Any = [None, None]
        if rate:
            shape = 2, len(x), parts[0].out_features
            keep = torch.empty(shape, dtype=torch.uint8, device=x.device).bernoulli_(1 - rate)
        for (layer, norm), kept in zip((parts[:2], parts[4:6]), keep):
            step = Norm(
                norm.weight,
                norm.bias,
                norm.running_mean,
                norm.running_var,
                norm.num_batches_tracked,
                norm.momentum,
                norm.eps,
            )
            x = Layer.apply(
                x, layer.weight, layer.bias, norm.weight, norm.bias, step, kept, rescale, self.training, dtype
            )
        last = parts[8]
        return Layer.apply(x, last.weight, last.bias, None, None, None, None, 1.0, False, dtype)
