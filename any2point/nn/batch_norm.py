"""Parameters and statistics of batch normalisations, as plain tensors for the ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from any2point.reference.batch_norm import BatchNorm as BatchNormTensors


class BatchNorm(nn.Module):
    """Weight, bias, running mean and variance of one (with a leading shape: several) normalisations."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.register_buffer("running_mean", torch.zeros(shape))
        self.register_buffer("running_var", torch.ones(shape))

    def tensors(self) -> BatchNormTensors:
        """The four tensors, as `any2point.ops` take them."""
        return BatchNormTensors(self.weight, self.bias, self.running_mean, self.running_var)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))
