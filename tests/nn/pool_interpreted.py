"""Run with TRITON_INTERPRET=1: final normalisation and pooling on the CPU, against PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from any2point.triton.pool import Pool


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, before, count, width, cls_first in ((3, 1, 70, 40, False), (2, 3, 5, 130, True)):
        prefix = torch.randn(batch, before, width, generator=generator)
        tokens = torch.randn(batch, count, width, generator=generator) + 2
        tokens[:, 1] = tokens[:, 3]  # equal ones share a gradient
        weight = torch.randn(width, generator=generator)
        bias = torch.randn(width, generator=generator)
        weight[1] = 0
        grad = torch.randn(batch, 2 * width, generator=generator)
        leaves = [t.clone().requires_grad_() for t in (prefix, tokens, weight, bias)]
        wide = [t.double().requires_grad_() for t in (prefix, tokens, weight, bias)]
        got = Pool.apply(*leaves, 1e-5, cls_first)
        normed = F.layer_norm(torch.cat(wide[:2], dim=1), (width,), *wide[2:], 1e-5)
        pair = [normed[:, before:].amax(1), normed[:, 0]]
        want = torch.cat(pair[::-1] if cls_first else pair, dim=1)
        found = torch.autograd.grad(got, leaves, grad)
        wanted = torch.autograd.grad(want, wide, grad.double())
        for a, b in zip([got, *found], [want, *wanted]):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main()
