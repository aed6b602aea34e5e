"""The point tokenizer: stages of farthest point sampling, nearest neighbours and local aggregation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from any2point.nn.batch_norm import BatchNorm
from any2point.ops import ResidualUnit, farthest_point_hierarchy, group, knn, local_aggregate


class Tokens(NamedTuple):
    """Features `[B, T, C]`, centres `[B, T, 3]` and the points `[B, T]` int64 that are the centres."""

    features: Tensor
    centers: Tensor
    index: Tensor  # type: ignore[assignment]


def stage_sizes(num_points: int, num_tokens: int, stages: int = 3) -> tuple[int, ...]:
    """Centres per stage: a geometric progression from points to tokens (1024 and 128: 512, 256, 128)."""
    ratio = num_tokens / num_points
    return tuple(round(num_points * ratio ** ((i + 1) / stages)) for i in range(stages))


class Bottleneck(nn.Module):
    """Weights of one residual unit; `any2point.ops.local_aggregate` says what it computes."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.down_norm = BatchNorm(hidden)
        self.up = nn.Linear(hidden, width)
        self.up_norm = BatchNorm(width)

    def tensors(self) -> ResidualUnit:
        """The weights, as the op takes them."""
        down, up = self.down_norm.tensors(), self.up_norm.tensors()
        return ResidualUnit(self.down.weight, self.down.bias, down, self.up.weight, self.up.bias, up)


class Tokenizer(nn.Module):
    """Points to tokens, after Point-PN: every stage halves the centres (more or less) and doubles the width.

    Args:
        width: channels of the first embedding, w; tokens have `w * 2**len(sizes)`.
        sizes: centres per stage.
        neighbors: K per stage.
        units: residual units per stage.
        last_hidden: bottleneck of the last stage; those before have half their width.
        normalize: "scan" or "mn40", see `any2point.ops.local_aggregate`.
        guard: False for the official, unguarded normalisation.
        start: first centre of a cloud: "farthest" from the mean, or "first" in the array.
        tie: "lowest" or "pointnet2", see `any2point.ops.farthest_point_sample`.
    """

    def __init__(
        self,
        width: int,
        sizes: Sequence[int],
        neighbors: Sequence[int],
        *,
        units: Sequence[int] = (2, 1, 1),
        last_hidden: int = 32,
        normalize: str = "scan",
        guard: bool = True,
        start: str = "farthest",
        tie: Literal["lowest", "pointnet2"] = "lowest",
    ) -> None:
        super().__init__()
        self.sizes, self.neighbors = tuple(sizes), tuple(neighbors)
        self.normalize, self.guard, self.start, self.tie = normalize, guard, start, tie
        self.embed = nn.Linear(3, width, bias=False)
        self.embed_norm = BatchNorm(width)
        self.stages = nn.ModuleList()
        for stage, count in enumerate(units):
            width *= 2
            hidden = last_hidden if stage == len(units) - 1 else width // 2
            self.stages.append(nn.ModuleList(Bottleneck(width, hidden) for _ in range(count)))
        self.width = width

    def _first(self, points: Tensor, valid: Tensor) -> Tensor | int:
        if self.start == "first":
            return 0
        kept = torch.where(valid[..., None], points, 0.0)
        mean = kept.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
        distance = (kept - mean).square().sum(-1)
        return torch.where(valid, distance, -1.0).argmax(1)

    def _positions(self, level: Tensor, picks: Tensor) -> Tensor:
        """Where in a level `[B, n]` the picks `[B, m]` of the next one stand."""
        batch, size = picks.shape
        if self.tie == "lowest":  # each level is a prefix of the one before
            return torch.arange(size, device=picks.device).expand(batch, size)
        return (picks[:, :, None] == level[:, None, :]).int().argmax(-1)

    def forward(self, points: Tensor) -> Tokens:
        """`points [B, N, 3]` float32 or float64 -> tokens of the last stage.

        Points with a NaN or infinite coordinate (padding, say) are left out.
        """
        batch = points.shape[0]
        valid = points.isfinite().all(-1)
        x = torch.where(valid[..., None], points, 0.0).to(self.embed.weight.dtype)
        x = self.embed_norm(self.embed(x).flatten(0, 1), valid.flatten()).relu().unflatten(0, (batch, -1))

        first = self._first(points, valid)
        levels = farthest_point_hierarchy(points, list(self.sizes), start=first, tie=self.tie)
        for stage, count in enumerate(self.neighbors):
            center = levels[0] if stage == 0 else self._positions(levels[stage - 1], levels[stage])
            centers = group(points, center)
            neighbor = knn(centers, points, count, sorted=False).index
            units = [unit.tensors() for unit in self.stages[stage]]  # type: ignore[attr-defined]
            x = local_aggregate(
                points,
                x,
                center,
                neighbor,
                units,
                normalize=self.normalize,
                guard=self.guard,
                training=self.training,
            )
            points = centers
        return Tokens(x, points, levels[-1])
