"""Run with TRITON_INTERPRET=1: blocks with the prefixes stacked above all tokens, against plain ones."""

from __future__ import annotations

import torch

from any2point.nn import AdaptedEncoder, CellAttention, GuidedAdapter
from any2point.nn.stacked import _kept, run_stacked
from any2point.sources import Source

WIDTH, VIEWS = 32, 2


def make(family: str, axis: str, adds: str, prefix: int) -> AdaptedEncoder:
    positions = (4, 4) if family == "dinov2" else (16,)
    source = Source.random(family, width=WIDTH, depth=2, heads=2, positions=positions)
    adapters = [
        GuidedAdapter(
            WIDTH, 5, VIEWS, scale=0.5, dropout=0.0, coefficient=0.3, pooling="mean", num_cells=4,
            count_empty=False, norm_eps=1e-6,
        )
        for _ in range(2)
    ]  # fmt: skip
    attention = CellAttention(WIDTH, 4, 2, VIEWS)
    return AdaptedEncoder(source.encoder(), adapters, attention, position_adds=adds, prefix=prefix, axis=axis)


def main() -> None:
    for family, axis, adds, prefix in (
        ("clip-text", "tokens", "once", 1),
        ("clip-text", "batch", "both", 1),
        ("dinov2", "tokens", "every", 3),
    ):
        torch.manual_seed(0)
        encoder = make(family, axis, adds, prefix)
        batch, tokens = 3, 6
        x, position = torch.randn(2, batch, prefix + tokens, WIDTH)
        x.requires_grad_()
        cell = torch.randint(4, (batch, VIEWS, tokens))
        cluster = torch.arange(batch)[:, None].repeat(1, tokens)
        grad = torch.randn(batch, prefix + tokens, WIDTH)
        leaves = [x, *(p for p in encoder.parameters() if p.requires_grad)]
        state = {name: value.clone() for name, value in encoder.state_dict().items()}
        want = encoder(x, position, cell, cluster)
        wanted = torch.autograd.grad(want, leaves, grad)
        encoder.load_state_dict(state)
        parts = [t.split([prefix, tokens], dim=1) for t in (x, position)]
        got = torch.cat(run_stacked(encoder, *parts[0], *parts[1], cell, cluster), dim=1)
        for a, b in zip([got, *torch.autograd.grad(got, leaves, grad)], [want, *wanted]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

        assert adapters_keep(encoder, 0.0) == [None, None]
        first, second = adapters_keep(encoder, 0.25)
        assert not torch.equal(first, second)
        assert first.shape == (999, 5)
        assert 0.7 < first.float().mean() < 0.8
        encoder.eval()
        assert adapters_keep(encoder, 0.25) == [None, None]


def adapters_keep(encoder: AdaptedEncoder, dropout: float) -> list[torch.Tensor | None]:
    for guided in encoder.adapters:
        guided.adapter.dropout = dropout
    return list(_kept(encoder, 999, torch.device("cpu")))


if __name__ == "__main__":
    main()
