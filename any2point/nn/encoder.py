"""The frozen encoder with a guided adapter in every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from any2point.nn.adapter import CellAttention, GuidedAdapter
from any2point.nn.attention_map import class_attention
from any2point.nn.recompute import recompute
from any2point.ops import GuidedPlan, plan_guided
from any2point.sources.encoder import FrozenEncoder

# Where the bottleneck adapter stands, and behind which half of the block the guided aggregation follows.
INSERTIONS = ("mlp_output", "mlp_parallel", "attention_output")


class AdaptedEncoder(nn.Module):
    """A frozen source, one `GuidedAdapter` per block and the attention in cells that the blocks share.

    Args:
        source: the frozen transformer.
        adapters: one per block.
        attention: attention inside cells; None without guided aggregation.
        position_adds: "once" (to the tokens), "every" (before every block) or "both".
        insertion: what the bottleneck adapter takes and joins: "mlp_output", as officially; "mlp_parallel",
            the input of the MLP; or "attention_output". The guided aggregation follows the half of the block
            that the adapter is in: it ends the block, or comes between attention and MLP.
        prefix: tokens that stand before those of the points: the class token and the source's registers. The
            adapter sees them, the guided aggregation does not.
        axis: self-attention over the "tokens" of a cloud or, as the official CLIP code, over the "batch".
        causal: mask later tokens.
        dropout: on attention weights of the frozen blocks when training.
        path_rates: probability per block of dropping its branches when training.
        checkpointing: compute each block again for the gradient instead of keeping what is inside.
    """

    def __init__(
        self,
        source: FrozenEncoder,
        adapters: Sequence[GuidedAdapter],
        attention: CellAttention | None,
        *,
        position_adds: str = "once",
        insertion: str = "mlp_output",
        prefix: int = 1,
        axis: str = "tokens",
        causal: bool = False,
        dropout: float = 0.0,
        path_rates: Sequence[float] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.source = source
        self.adapters = nn.ModuleList(adapters)
        self.attention = attention
        self.position_adds, self.insertion, self.prefix = position_adds, insertion, prefix
        self.axis, self.causal, self.dropout = axis, causal, dropout
        self.path_rates = [0.0] * len(adapters) if path_rates is None else list(path_rates)
        self.checkpointing = checkpointing

    def block(
        self,
        index: int,
        x: Tensor,
        position: Tensor,
        cell: Tensor,
        cluster: Tensor,
        plan: GuidedPlan | None = None,
    ) -> Tensor:
        """Block `index` with its adapter and guided aggregation: `[B, P + S, C]` -> `[B, P + S, C]`."""
        if self.position_adds != "once":
            x = x + position
        frozen: Any = self.source.blocks[index]
        adapter: Any = self.adapters[index].adapter
        rate = self.path_rates[index] if self.training else 0.0
        options: dict[str, Any] = {
            "axis": self.axis,
            "causal": self.causal,
            "dropout": self.dropout if self.training else 0.0,
            "path_rate": rate,
        }
        if self.insertion == "attention_output":
            x = frozen.attend(x, adapter, **options)
            return frozen.transform(self._guide(index, x, cell, cluster, plan), path_rate=rate)
        x, inputs = frozen.attend_ahead(x, **options)
        parallel = self.insertion == "mlp_parallel"
        x = frozen.transform(x, adapter, inputs=inputs, parallel=parallel, path_rate=rate)
        return self._guide(index, x, cell, cluster, plan)

    def _is_random(self, index: int) -> bool:
        adapter: Any = self.adapters[index].adapter
        rates = self.dropout, self.path_rates[index], 0.0 if adapter is None else adapter.dropout
        return self.training and any(rates)

    def plan(self, x: Tensor, cell: Tensor, cluster: Tensor) -> GuidedPlan | None:
        """What the guided aggregations of all blocks share."""
        every: list[Any] = [adapter for adapter in self.adapters if adapter.view_norm is not None]
        if not every or self.attention is None:
            return None
        voxels = cluster if any(adapter.space_norm is not None for adapter in every) else None
        tensors = self.attention.tensors()
        return plan_guided(x, cell, voxels, tensors, num_cells=every[0].num_cells, training=self.training)

    def _guide(
        self, index: int, x: Tensor, cell: Tensor, cluster: Tensor, plan: GuidedPlan | None = None
    ) -> Tensor:
        guided = self.adapters[index]
        if guided.view_norm is None:
            return x
        # Not two slices: the gradient of a split is one pass, theirs are four and a sum.
        prefix, tokens = x.split([self.prefix, x.shape[1] - self.prefix], dim=1)
        return torch.cat([prefix, guided(tokens, cell, cluster, self.attention, plan)], dim=1)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        cell: Tensor,
        cluster: Tensor,
        maps: list[Tensor] | None = None,
        plan: GuidedPlan | None = None,
    ) -> Tensor:
        """Tokens to features.

        Args:
            x: `[B, P + S, C]`, class token first, then registers.
            position: position encodings of the same shape.
            cell: `[B, V, S]` int64.
            cluster: `[B, S]` int64.
            maps: a list that the class token's attention `[B, H, S]` in every block is appended to.
            plan: what `plan` gives, if it is there already.

        Returns:
            `[B, P + S, C]`, before the final normalisation.
        """
        if self.position_adds != "every":
            x = x + position
        x = self.source.embed(x)
        plan = self.plan(x, cell, cluster) if plan is None else plan
        for index in range(len(self.adapters)):
            if maps is not None:
                seen = x if self.position_adds == "once" else x + position
                frozen: Any = self.source.blocks[index]
                maps.append(class_attention(frozen, seen)[..., self.prefix :])
            if self.checkpointing:
                arguments = index, x, position, cell, cluster, plan
                x = recompute(self.adapters[index], self.block, *arguments, random=self._is_random(index))
            else:
                x = self.block(index, x, position, cell, cluster, plan)
        return x
