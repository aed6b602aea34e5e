"""Run with TRITON_INTERPRET=1: an MLP with factors in float16 on the CPU, against PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from any2point.sources.linear import scaled_weight
from any2point.triton.half_mlp import HalfMLP

# Factor and shape of the weights and biases.
SIZES = ((0.2, 40, 24), (1.0, 40), (1e5, 24, 40), (1.0, 24))


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for activation, size in (("quick_gelu", 1.0), ("gelu", 1e-9)):  # of the gradient
        drawn = (by * torch.randn(shape, generator=generator) for by, *shape in SIZES)
        first, first_bias, second, second_bias = drawn
        x = (3 * torch.randn(2, 9, 24, generator=generator)).requires_grad_()
        grad = size * torch.randn(2, 9, 24, generator=generator)
        weights = *scaled_weight(first), first_bias, *scaled_weight(second), second_bias
        got = HalfMLP.apply(x, *weights, activation)
        h = F.linear(x.double(), first.double(), first_bias.double())
        h = h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else F.gelu(h)
        want = F.linear(h, second.double(), second_bias.double())
        found, wanted = (torch.autograd.grad(y, x, grad.to(y.dtype))[0] for y in (got, want))
        assert got.dtype == found.dtype == torch.float32
        for a, b in ((got, want), (found, wanted)):
            assert 0 < (a - b).norm() < 1e-3 * b.norm()


if __name__ == "__main__":
    main()
