"""The frozen transformer: one implementation for every source family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """How the blocks of a transformer are put together.

    Attributes:
        norm: "pre" (CLIP, ViT: `x + f(LN(x))`) or "post" (BERT: `LN(x + f(x))`).
        activation: of the MLP: "gelu" (erf) or "quick_gelu" (`x sigmoid(1.702 x)`).
        layer_scale: whether each branch is multiplied by a learned vector (DINOv2).
        input_norm: whether a LayerNorm follows the sum of token and position (BERT's embedding LayerNorm).
        eps: of every LayerNorm.
    """

    norm: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    layer_scale: bool = False
    input_norm: bool = False
    eps: float = 1e-6


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Zero the branch `[B, ...]` of whole samples with probability `rate`, and rescale the others."""
    shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
    return branch * ((torch.rand(shape, device=branch.device) >= rate).to(branch.dtype) / (1 - rate))


class Attention(nn.Module):
    """Multi-head self-attention with fused query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, *, axis: str = "tokens", causal: bool = False, dropout: float = 0.0
    ) -> Tensor:
        """`x [B, T, C]`; with axis "batch" every token slot attends over the clouds of the batch."""
        if axis == "batch":
            x = x.transpose(0, 1)
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=dropout, is_causal=causal)
        y = self.proj(y.transpose(1, 2).flatten(2))
        return y.transpose(0, 1) if axis == "batch" else y


class MLP(nn.Module):
    """Two linear layers with the source's activation between them."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = x * torch.sigmoid(1.702 * x) if self.activation == "quick_gelu" else F.gelu(x)
        return self.fc2(x)


class Block(nn.Module):
    """One transformer block, with a place for an adapter on the output of its MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, layout: Layout) -> None:
        super().__init__()
        self.post_norm = layout.norm == "post"
        self.norm1 = nn.LayerNorm(width, layout.eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, layout.eps)
        self.mlp = MLP(width, mlp_width, layout.activation)
        self.ls1 = nn.Parameter(torch.ones(width)) if layout.layer_scale else None
        self.ls2 = nn.Parameter(torch.ones(width)) if layout.layer_scale else None

    def forward(
        self,
        x: Tensor,
        adapter: Callable[[Tensor], Tensor] | None = None,
        *,
        axis: str = "tokens",
        causal: bool = False,
        dropout: float = 0.0,
        path_rate: float = 0.0,
    ) -> Tensor:
        """`x [B, T, C]` -> `[B, T, C]`; `adapter` takes the MLP's branch, and its output is added to it."""
        y = self.attn(x if self.post_norm else self.norm1(x), axis=axis, causal=causal, dropout=dropout)
        y = y if self.ls1 is None else self.ls1 * y
        x = x + (drop_path(y, path_rate) if path_rate else y)
        if self.post_norm:
            x = self.norm1(x)

        y = self.mlp(x if self.post_norm else self.norm2(x))
        y = y if self.ls2 is None else self.ls2 * y
        y = drop_path(y, path_rate) if path_rate else y
        x = x + y if adapter is None else x + y + adapter(y)
        return self.norm2(x) if self.post_norm else x


class FrozenEncoder(nn.Module):
    """The blocks of a source: no parameter requires a gradient, and it stays in evaluation mode."""

    def __init__(self, width: int, depth: int, heads: int, mlp_width: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.input_norm = nn.LayerNorm(width, layout.eps) if layout.input_norm else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, layout) for _ in range(depth))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Keep evaluation mode, whatever the parent module is switched to."""
        return super().train(False)

    def embed(self, x: Tensor) -> Tensor:
        """What the source does to the sum of token and position before its first block."""
        return x if self.input_norm is None else self.input_norm(x)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """The plain source, without adapters: `[B, T, C]` -> `[B, T, C]`, without the final norm."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, causal=causal)
        return x
