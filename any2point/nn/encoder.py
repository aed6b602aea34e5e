"""The frozen encoder with a guided adapter in every block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from any2point.nn.adapter import CellAttention, GuidedAdapter
from any2point.sources.encoder import FrozenEncoder


class AdaptedEncoder(nn.Module):
    """A frozen source, one `GuidedAdapter` per block and the attention in cells that the blocks share.

    Args:
        source: the frozen transformer.
        adapters: one per block.
        attention: attention inside cells.
        position_adds: "once" (to the tokens), "every" (before every block) or "both".
        axis: self-attention over the "tokens" of a cloud or, as the official CLIP code, over the "batch".
        causal: mask later tokens.
        dropout: on attention weights of the frozen blocks when training.
        path_rates: probability per block of dropping its branches when training.
    """

    def __init__(
        self,
        source: FrozenEncoder,
        adapters: Sequence[GuidedAdapter],
        attention: CellAttention,
        *,
        position_adds: str = "once",
        axis: str = "tokens",
        causal: bool = False,
        dropout: float = 0.0,
        path_rates: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.source = source
        self.adapters = nn.ModuleList(adapters)
        self.attention = attention
        self.position_adds, self.axis, self.causal, self.dropout = position_adds, axis, causal, dropout
        self.path_rates = [0.0] * len(adapters) if path_rates is None else list(path_rates)

    def block(self, index: int, x: Tensor, position: Tensor, cell: Tensor, cluster: Tensor) -> Tensor:
        """Block `index` with its adapter and guided aggregation: `[B, 1 + S, C]` -> `[B, 1 + S, C]`."""
        if self.position_adds != "once":
            x = x + position
        guided = self.adapters[index]
        x = self.source.blocks[index](
            x,
            guided.adapter,
            axis=self.axis,
            causal=self.causal,
            dropout=self.dropout if self.training else 0.0,
            path_rate=self.path_rates[index] if self.training else 0.0,
        )
        tokens = guided(x[:, 1:], cell, cluster, self.attention)
        return torch.cat([x[:, :1], tokens], dim=1)

    def forward(self, x: Tensor, position: Tensor, cell: Tensor, cluster: Tensor) -> Tensor:
        """Tokens to features.

        Args:
            x: `[B, 1 + S, C]`, class token first.
            position: position encodings of the same shape.
            cell: `[B, V, S]` int64.
            cluster: `[B, S]` int64.

        Returns:
            `[B, 1 + S, C]`, before the final normalisation.
        """
        if self.position_adds != "every":
            x = x + position
        x = self.source.embed(x)
        for index in range(len(self.adapters)):
            x = self.block(index, x, position, cell, cluster)
        return x
