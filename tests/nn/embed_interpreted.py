"""Run with TRITON_INTERPRET=1: the tokenizer's first layer on the CPU, against PyTorch."""

from __future__ import annotations

import torch

from any2point.nn.tokenizer import Tokenizer
from any2point.triton.embed import Embed


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for features, width, count in ((0, 24, 150), (4, 40, 70), (0, 6, 1)):
        torch.manual_seed(0)
        tokenizer = Tokenizer(width, (4, 2, 1), (3, 3, 2), features=features)
        points = torch.randn(2, count, 3, generator=generator) + 3
        more = 5 * torch.randn(2, count, features, generator=generator) + 20 if features else None
        points[0, count // 2] = torch.nan
        norm = tokenizer.embed_norm
        with torch.no_grad():
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.copy_(torch.rand(width, generator=generator) + 0.5)
        for training in (True, False):
            tokenizer.train(training)
            state = [norm.running_mean.clone(), norm.running_var.clone()]
            want = tokenizer._embed(points, more)
            wanted = [norm.running_mean.clone(), norm.running_var.clone()]
            norm.running_mean.copy_(state[0])
            norm.running_var.copy_(state[1])
            layer = tokenizer.embed
            got = Embed.apply(
                points.flatten(0, 1), None if more is None else more.flatten(0, 1), layer.weight,
                *norm.tensors(), 0.1, 1e-5, training,
            )  # fmt: skip
            torch.testing.assert_close(got.view_as(want), want, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close([norm.running_mean, norm.running_var], wanted)
            if training:
                leaves = [layer.weight, norm.weight, norm.bias]
                grad = torch.randn(want.shape, generator=generator)
                wanted = torch.autograd.grad(want, leaves, grad)
                found = torch.autograd.grad(got, leaves, grad.flatten(0, 1))
                torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    main()
