"""Run with TRITON_INTERPRET=1: the layers of the classification head on the CPU, against PyTorch."""

from __future__ import annotations

import copy

import torch

from any2point.nn import ClassificationHead
from any2point.nn import head as module


def results(head: ClassificationHead, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = head(x)
    grads = torch.autograd.grad(y, [x, *head.parameters()], grad)
    return [y.detach(), *grads, *head.buffers()]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    module.tf32_allowed = lambda: True  # type: ignore[assignment]  # which is float32 here
    for rows, training, bias in ((5, True, True), (2, True, False), (19, False, True)):
        torch.manual_seed(0)
        head = ClassificationHead(40, 7, hidden=36, dropout=0.0, bias=bias).train(training)
        for norm in (head[1], head[5]):
            norm.running_mean.normal_()  # type: ignore[union-attr, operator]
            norm.weight.data.uniform_(0.5, 1.5)  # type: ignore[union-attr, operator]
        x = torch.randn(rows, 40, generator=generator)
        grad = torch.randn(rows, 7, generator=generator)
        want = results(copy.deepcopy(head), x, grad)
        assert not head._is_fused(x)
        module.in_kernels = lambda _: True  # type: ignore[assignment]
        assert head._is_fused(x)
        got = results(head, x, grad)
        module.in_kernels = lambda _: False  # type: ignore[assignment]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
    head = ClassificationHead(8, 3, hidden=16, dropout=0.5)
    module.in_kernels = lambda _: True  # type: ignore[assignment]
    assert head._is_fused(torch.zeros(2, 8))
    assert not head._is_fused(torch.zeros(1, 8))
    with torch.no_grad():
        for part in (0, 4, 8):
            head[part].weight.fill_(1.0)  # type: ignore[union-attr, operator]
        head[8].bias.zero_()  # type: ignore[union-attr, operator]
    y = head(torch.randn(64, 8, generator=generator))  # counts of what is kept of channels that are equal
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.unique().numel() > 16
    head.eval()
    assert head(torch.randn(3, 8, generator=generator)).shape == (3, 3)
    head[2] = torch.nn.GELU()
    assert not head._is_fused(torch.zeros(2, 8))


if __name__ == "__main__":
    main()
