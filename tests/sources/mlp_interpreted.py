"""Run with TRITON_INTERPRET=1: the hidden layer of an MLP on the CPU, against PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from any2point.triton.mlp import Hidden


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for activation, rows, width, count in (("quick_gelu", 130, 72, 264), ("gelu", 5, 16, 24)):
        x = (3 * torch.randn(1, rows, width, generator=generator)).half()
        weight = torch.randn(count, width, generator=generator).half() / width**0.5
        bias = torch.randn(count, generator=generator).half()
        got = Hidden.apply(x, weight, bias, activation)
        h = F.linear(x.double(), weight.double(), bias.double())
        want = h * torch.sigmoid(1.702 * h) if activation == "quick_gelu" else F.gelu(h)
        assert got.dtype == torch.float16
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
