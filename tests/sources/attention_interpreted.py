"""Run with TRITON_INTERPRET=1: the attention kernels on the CPU, against PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from any2point.triton.attention import Attention


def plain(qkv: torch.Tensor, heads: int, over_batch: bool) -> torch.Tensor:
    y = qkv.transpose(0, 1) if over_batch else qkv
    query, key, value = (z.transpose(1, 2) for z in y.unflatten(-1, (3, heads, -1)).unbind(2))
    y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    return y.transpose(0, 1) if over_batch else y


def rows(x: torch.Tensor, prefix: int) -> torch.Tensor:
    """The first tokens of all clouds, then the others."""
    return torch.cat([x[:, :prefix].flatten(0, 1), x[:, prefix:].flatten(0, 1)]) if prefix else x


def ordered(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `rows`."""
    if x.dim() == 3:
        return x
    batch = len(like)
    return torch.cat([x[:batch, None], x[batch:].view(batch, -1, x.shape[-1])], dim=1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, tokens, heads, width, over_batch in (
        (2, 129, 2, 16, False),
        (1, 137, 1, 64, False),
        (2, 20, 2, 32, False),
        (1, 1, 1, 16, False),
        (1, 64, 1, 16, False),
        (1, 111, 1, 16, False),
        (130, 2, 1, 16, True),
    ):
        for dtype, products in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee")):
            torch.backends.cuda.matmul.fp32_precision = products
            qkv = torch.randn(batch, tokens, 3 * heads * width, generator=generator).to(dtype)
            grad = torch.randn(batch, tokens, heads * width, generator=generator).to(dtype)
            if products == "tf32" and tokens > 1:  # far beyond what float16 can hold
                qkv[..., 2 * heads * width :] *= 1e6
                grad *= 1e-9
            wide, leaf = qkv.double().requires_grad_(), qkv.requires_grad_()
            want = plain(wide, heads, over_batch)
            (wanted,) = torch.autograd.grad(want, wide, grad.double())
            exact = dtype == torch.float32 and products == "ieee"
            tolerance = dict.fromkeys(("rtol", "atol"), 1e-5 if exact else 5e-3)
            for prefix in (0, 1) if tokens > 1 else (0,):
                out = ordered(
                    Attention.apply(rows(leaf, prefix), heads, batch, prefix, over_batch), like=grad
                )
                assert out.dtype == dtype
                (found,) = torch.autograd.grad(out, leaf, grad)
                for a, b in zip([out, *found.chunk(3, -1)], [want, *wanted.chunk(3, -1)]):
                    size = b.abs().max() if tokens > 1 else 1.0
                    torch.testing.assert_close(a / size, b / size, check_dtype=False, **tolerance)
    assert Attention.apply(torch.zeros(0, 5, 48), 1, 0, 0, False).shape == (0, 5, 16)


if __name__ == "__main__":
    main()
