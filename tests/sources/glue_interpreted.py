"""Run with TRITON_INTERPRET=1: the kernels between the products of a block, on the CPU, against PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from any2point.triton.block import ForkNorm, Join, JoinNorm, QuickGELU


def check(got: list[torch.Tensor], want: list[torch.Tensor], low: bool) -> None:
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-2 if low else 1e-5, atol=1e-2 if low else 1e-5)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for width, dtype in ((20, torch.float32), (300, torch.bfloat16), (1, torch.float16)):
        low = dtype != torch.float32
        x, gx, gy = (3 * torch.randn(2, 3, width, generator=generator) + 1 for _ in range(3))
        y, z, weight, bias = (torch.randn(2, 3, width, generator=generator) for _ in range(4))
        weight, bias, y, z, gy = weight[0, 0] + 2, bias[0, 0], y.to(dtype), z.to(dtype), gy.to(dtype)

        wide = [t.double().requires_grad_() for t in (x, y, z)]
        leaves = [t.clone().requires_grad_() for t in (x, y, z)]
        same, _, normed = ForkNorm.apply(leaves[0], None, weight, bias, 1e-5, dtype)
        assert torch.equal(same, x)
        assert normed.dtype == dtype
        want = F.layer_norm(wide[0], (width,), weight.double(), bias.double(), 1e-5)
        grad = torch.autograd.grad([same, normed], leaves[0], [gx, gy])
        wanted = torch.autograd.grad([wide[0], want], wide[0], [gx.double(), gy.double()])
        check([normed, *grad], [want, *wanted], low)

        below = torch.randn(4, width, generator=generator)
        inner = [below.clone().requires_grad_(), below.double().requires_grad_()]
        rows = gy.flatten(0, 1).repeat(2, 1)[:10]
        stacked = torch.cat([wide[0].flatten(0, 1), inner[1]])
        same, tail, normed = ForkNorm.apply(leaves[0], inner[0], weight, bias, 1e-5, dtype)
        want = F.layer_norm(stacked, (width,), weight.double(), bias.double(), 1e-5)
        grad = torch.autograd.grad([same, tail, normed], [leaves[0], inner[0]], [gx, below, rows])
        outs = [wide[0], inner[1], want]
        wanted = torch.autograd.grad(outs, [wide[0], inner[1]], [gx.double(), below.double(), rows.double()])
        check([normed, *grad], [want, *wanted], low)
        branch = rows.clone().requires_grad_()
        same, tail, normed = JoinNorm.apply(leaves[0], inner[0], branch, bias, weight, bias, 1e-5, dtype)
        more = rows.double().requires_grad_()
        total = stacked + bias.double() * more
        want = F.layer_norm(total, (width,), weight.double(), bias.double(), 1e-5)
        grads = torch.autograd.grad([same, tail, normed], [leaves[0], inner[0], branch], [gx, below, rows])
        outs = [total[:6].view(2, 3, width), total[6:], want]
        wanted = torch.autograd.grad(
            outs, [wide[0], inner[1], more], [gx.double(), below.double(), rows.double()]
        )
        check([same, tail, normed, *grads], [*outs, *wanted], low)

        for scale in (None, bias):
            total, _, normed = JoinNorm.apply(leaves[0], None, leaves[1], scale, weight, bias, 1e-5, dtype)
            want = wide[0] + wide[1] * (1 if scale is None else scale.double())
            wants = want, F.layer_norm(want, (width,), weight.double(), bias.double(), 1e-5)
            assert (total.dtype, normed.dtype) == (torch.float32, dtype)
            grads = torch.autograd.grad([total, normed], leaves[:2], [gx, gy])
            wanted = torch.autograd.grad(wants, wide[:2], [gx.double(), gy.double()])
            check([total, normed, *grads], [*wants, *wanted], low)
            for third in (None, leaves[2]):
                used = leaves[:2] if third is None else leaves
                out = Join.apply(leaves[0], leaves[1], scale, third)
                assert out.dtype == torch.float32
                want = wide[0] + wide[1] * (1 if scale is None else scale.double())
                want = want if third is None else want + wide[2]
                grads = torch.autograd.grad(out, used, gx)
                assert [g.dtype for g in grads] == [u.dtype for u in used]
                check([out, *grads], [want, *torch.autograd.grad(want, wide[: len(used)], gx.double())], low)

        out = QuickGELU.apply(leaves[1])
        want = wide[1] * torch.sigmoid(1.702 * wide[1])
        wanted = torch.autograd.grad(want, wide[1], gy.double())
        check([out, *torch.autograd.grad(out, leaves[1], gy)], [want, *wanted], low)
    for function in (QuickGELU.apply, lambda x: Join.apply(x, x, None, None)):
        assert function(torch.zeros(0, 3)).shape == (0, 3)


if __name__ == "__main__":
    main()
