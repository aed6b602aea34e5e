"""What is trained inside the frozen blocks: bottleneck adapters and the guided aggregation's weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.nn.batch_norm import BatchNorm
from any2point.ops import CellAttention as CellAttentionTensors
from any2point.ops import GuidedPlan, guided_aggregate
from any2point.sources.glue import (
    Bottleneck,
    is_hooked,
    join,
    join_adapted,
    joins,
    quick_gelu,
)


class Adapter(nn.Module):
    """Bottleneck: `scale * up(dropout(QuickGELU(down(x))))`."""

    def __init__(self, width: int, hidden: int, *, scale: float, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, C]` -> `[B, T, C]`."""
        x = F.dropout(quick_gelu(self.down(x)), self.dropout, self.training)
        return self.scale * self.up(x)

    def join(self, x: Tensor, y: Tensor, layer_scale: Tensor | None) -> Tensor:
        """`x + y + self(y)`, all `[B, T, C]`, of a branch y that `layer_scale [C]` multiplies first."""
        if self.joins(x, y.dtype, layer_scale):
            return self.join_stacked(x, None, y, layer_scale)[0]
        y = y if layer_scale is None else layer_scale * y
        return join(x, y, None, self(y))

    def join_stacked(
        self,
        x: Tensor,
        tail: Tensor | None,
        y: Tensor,
        layer_scale: Tensor | None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """`join` on CUDA, of x and of what is stacked below it, if anything is; y has the rows of both.

        What dropout keeps, `[..., r]` uint8, may be given.
        """
        dropout = self.dropout if self.training else 0.0
        return join_adapted(x, tail, y, layer_scale, self._weights(), self.scale, dropout, keep)

    def joins(self, x: Tensor, dtype: torch.dtype, layer_scale: Tensor | None) -> bool:
        """Whether `join_stacked` takes such an x, and a y of this dtype."""
        if not joins(x, dtype, layer_scale, self._weights()):
            return False
        return not is_hooked(self, self.down, self.up)

    def _weights(self) -> Bottleneck:
        return Bottleneck(self.down.weight, self.down.bias, self.up.weight, self.up.bias)


class CellAttention(nn.Module):
    """Attention inside the cells of each view, one set of weights per view, shared by all blocks."""

    def __init__(self, width: int, hidden: int, heads: int, views: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_weight = nn.Parameter(torch.ones(views, width))
        self.norm_bias = nn.Parameter(torch.zeros(views, width))
        self.qkv_weight = nn.Parameter(torch.empty(views, 3 * hidden, width))
        self.qkv_bias = nn.Parameter(torch.zeros(views, 3 * hidden))
        self.proj_weight = nn.Parameter(torch.empty(views, width, hidden))
        self.proj_bias = nn.Parameter(torch.zeros(views, width))
        for weight in (self.qkv_weight, self.proj_weight):
            for view in weight:
                nn.init.xavier_uniform_(view)

    def tensors(self) -> CellAttentionTensors:
        """The weights, as the op takes them."""
        return CellAttentionTensors(
            self.norm_weight,
            self.norm_bias,
            self.qkv_weight,
            self.qkv_bias,
            self.proj_weight,
            self.proj_bias,
        )


class GuidedAdapter(nn.Module):
    """The trained part of one block: an adapter, and the normalisations of the guided aggregation.

    Args:
        width: channels C.
        hidden: bottleneck of the adapter.
        views: V.
        kind: "both", "bottleneck" or "aggregate" alone, or "none".
        scale: factor on the adapter.
        dropout: inside the adapter.
        coefficient: factor on the guided blend.
        pooling: "mean" or "max+mean".
        ensemble: "adaptive", "mean" or "max".
        num_cells: cells per view.
        count_empty: official statistics, with empty cells as zero rows.
        norm_eps: of the layer normalisation before the attention in cells.
        path_rate: probability of dropping the attention branch.
        path_rows: official rule: drop it per token.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        views: int,
        *,
        kind: str = "both",
        scale: float,
        dropout: float,
        coefficient: float,
        pooling: str,
        ensemble: str = "adaptive",
        num_cells: int,
        count_empty: bool,
        norm_eps: float,
        path_rate: float = 0.0,
        path_rows: bool = False,
    ) -> None:
        super().__init__()
        bottleneck, aggregate = kind in ("both", "bottleneck"), kind in ("both", "aggregate")
        self.adapter = Adapter(width, hidden, scale=scale, dropout=dropout) if bottleneck else None
        self.view_norm = BatchNorm(views, width) if aggregate else None
        self.space_norm = BatchNorm(width) if aggregate and ensemble == "adaptive" else None
        self.coefficient, self.pooling, self.ensemble = coefficient, pooling, ensemble
        self.num_cells, self.count_empty, self.norm_eps = num_cells, count_empty, norm_eps
        self.path_rate, self.path_rows = path_rate, path_rows

    def forward(
        self,
        tokens: Tensor,
        cell: Tensor,
        cluster: Tensor,
        attention: CellAttention | None,
        plan: GuidedPlan | None = None,
    ) -> Tensor:
        """`tokens [B, S, C]` -> `[B, S, C]`, see `any2point.ops.guided_aggregate`."""
        if self.view_norm is None or attention is None:
            return tokens
        return guided_aggregate(
            tokens,
            cell,
            cluster,
            attention.tensors(),
            self.view_norm.tensors(),
            None if self.space_norm is None else self.space_norm.tensors(),
            plan=plan,
            num_cells=self.num_cells,
            num_heads=attention.heads,
            coefficient=self.coefficient,
            pooling=self.pooling,
            ensemble=self.ensemble,
            count_empty=self.count_empty,
            drop_path=self.path_rate,
            drop_path_rows=self.path_rows,
            training=self.training,
            norm_eps=self.norm_eps,
        )
