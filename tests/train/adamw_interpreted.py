"""Run with TRITON_INTERPRET=1: steps of AdamW with clipped gradients on the CPU, against PyTorch."""

from __future__ import annotations

import torch

from any2point.triton.adamw import Tables

SHAPES = [[(3, 700), (5,)], [(1,), (1024,), (0,)]]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [[torch.randn(shape, generator=generator) for shape in shapes] for shapes in SHAPES]
    wanted = [[torch.nn.Parameter(p.clone()) for p in group] for group in first]
    options = [{"params": group, "weight_decay": decay} for group, decay in zip(wanted, (0.1, 0.0))]
    optimizer = torch.optim.AdamW(options, lr=0.01, eps=1e-2)
    groups = [
        [[p, p, torch.zeros_like(p), torch.zeros_like(p), torch.zeros(())] for p in group] for group in first
    ]
    tables = Tables(groups)
    assert tables.fits(groups)
    assert not tables.fits(groups[:1])
    for size, clip in ((1.0, 2.0), (1e-3, 2.0), (1.0, 0.0)):
        for wants, rows in zip(wanted, groups):
            for want, row in zip(wants, rows):
                want.grad = size * torch.randn(want.shape, generator=generator)
                row[1] = want.grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([p for group in wanted for p in group], clip)
        optimizer.step()
        tables.step(groups, optimizer.param_groups, clip)
        optimizer.param_groups[1]["lr"] *= 0.5
        for wants, rows in zip(wanted, groups):
            for want, row in zip(wants, rows):
                torch.testing.assert_close(row[0], want.detach(), rtol=1e-5, atol=1e-6)
                state = optimizer.state[want]
                for got, name in zip(row[2:], ("exp_avg", "exp_avg_sq", "step")):
                    torch.testing.assert_close(got, state[name], rtol=1e-5, atol=1e-9)


if __name__ == "__main__":
    main()
