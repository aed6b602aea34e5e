"""Run with TRITON_INTERPRET=1: the adapter joined to its block on the CPU, against PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from any2point.triton.adapter import AdapterJoin


def plain(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor | None,
    keep: torch.Tensor | None,
    *weights: torch.Tensor,
) -> torch.Tensor:
    down, down_bias, up, up_bias = weights
    y = y if scale is None else scale * y
    a = F.linear(y, down, down_bias)
    h = a * torch.sigmoid(1.702 * a) * (1 if keep is None else keep / 0.75)
    return x + y + 0.3 * F.linear(h, up, up_bias)


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for width, rank, dtype, scaled, dropped in (
        (40, 5, torch.float32, False, False),
        (160, 16, torch.float32, True, True),
        (32, 17, torch.float16, False, True),
    ):
        x, y, grad = normal(38, width), normal(38, width).to(dtype), normal(38, width)
        scale = normal(width) + 2 if scaled else None
        keep = (torch.rand(38, rank, generator=generator) < 0.75).to(torch.uint8) if dropped else None
        weights = normal(rank, width) / width**0.5, normal(rank), normal(width, rank), normal(width)
        wide = [t.double().requires_grad_() for t in (x, y, *weights)]
        want = plain(*wide[:2], None if scale is None else scale.double(), keep, *wide[2:])
        wanted = torch.autograd.grad(want, wide, grad.double())
        for split in (38, 3):
            leaves = [t.clone().requires_grad_() for t in (x, y, *weights)]
            first, tail = (leaves[0], None) if split == 38 else (leaves[0][:split], leaves[0][split:])
            first, tail = AdapterJoin.apply(
                first, tail, leaves[1], scale, *leaves[2:], keep, 0.3, 1 / 0.75, dtype
            )
            out = first if tail is None else torch.cat([first, tail])
            assert out.dtype == torch.float32
            found = torch.autograd.grad(out, leaves, grad)
            assert [g.dtype for g in found] == [t.dtype for t in leaves]
            tolerance = 2e-4 if dtype == torch.float32 else 2e-2
            for a, b in zip([out, *found], [want, *wanted]):
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    x, weights = torch.zeros(0, 8), (torch.zeros(4, 8), torch.zeros(4), torch.zeros(8, 4), torch.zeros(8))
    out, _ = AdapterJoin.apply(x, None, x, None, *weights, None, 1.0, 1.0, torch.float32)
    assert out.shape == (0, 8)


if __name__ == "__main__":
    main()
