"""Batch normalisation of rows: parameters and statistics as plain tensors for the ops, and a forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from any2point.ops import BatchNorm as BatchNormTensors
from any2point.reference.batch_norm import are_shared, batch_norm, masked_batch_norm

MOMENTUM, EPS = 0.1, 1e-5


class BatchNorm(nn.Module):
    """Weight, bias, running mean and variance of one (with a leading shape: several) normalisations.

    With `keep_statistics` the running ones are not updated.
    """

    running_mean: Tensor
    running_var: Tensor
    keep_statistics = False

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def tensors(self) -> BatchNormTensors:
        """The four tensors, as `any2point.ops` take them (and update the last two)."""
        mean, var = self.running_mean, self.running_var
        if self.keep_statistics:
            mean, var = mean.clone(), var.clone()
        return BatchNormTensors(self.weight, self.bias, mean, var)

    def forward(self, rows: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise `rows [R, C]`; those that are `valid [R]`, by default all, count in the statistics."""
        step: dict[str, Any] = {"training": self.training, "momentum": MOMENTUM, "eps": EPS}
        if valid is None:
            return batch_norm(rows, self.tensors(), **step)
        return masked_batch_norm(rows, self.tensors(), valid, **step)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class BatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of rows `[R, C]` whose statistics processes can share, see `shared_statistics`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[R, C]` -> `[R, C]`."""
        if not (self.training and are_shared()):
            if self.training and len(input) == 1:
                raise ValueError("`points`: expected at least 2 clouds to train on, for statistics; got 1")
            return super().forward(input)
        self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        norm = BatchNormTensors(self.weight, self.bias, self.running_mean, self.running_var)  # type: ignore[arg-type]
        return batch_norm(input, norm, training=True, momentum=self.momentum, eps=self.eps).to(input.dtype)  # type: ignore[arg-type]
