"""The point tokenizers: farthest point sampling, nearest neighbours, and a small network on each group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from any2point.nn.batch_norm import EPS, MOMENTUM, BatchNorm
from any2point.nn.beside import Beside
from any2point.nn.recompute import recompute
from any2point.ops import (
    ResidualUnit,
    farthest_point_hierarchy,
    farthest_point_sample,
    group,
    knn,
    local_aggregate,
)
from any2point.reference.batch_norm import are_shared
from any2point.sources.glue import in_kernels, is_hooked

_float16_operands = False


@contextlib.contextmanager
def float16_operands() -> Iterator[None]:
    """Inside it local aggregation may round operands in float32 to float16, see `local_aggregate`."""
    global _float16_operands
    before, _float16_operands = _float16_operands, True
    try:
        yield
    finally:
        _float16_operands = before


class Tokens(NamedTuple):
    """Features `[B, T, C]`, centres `[B, T, 3]` and the points `[B, T]` int64 that are the centres."""

    features: Tensor
    centers: Tensor
    index: Tensor  # type: ignore[assignment]


class Neighborhoods(NamedTuple):
    """What a tokenizer takes from the coordinates alone, so that it can be had before the step that needs it.

    Per stage the centres `center [B, S]`, among the centres of the stage before, and their neighbours
    `neighbor [B, S, K]`, likewise; and `index [B, T]`, the points of the cloud that are the last centres.
    """

    center: tuple[Tensor, ...]
    neighbor: tuple[Tensor, ...]
    index: Tensor  # type: ignore[assignment]

    def flat(self) -> list[Tensor]:
        """All tensors in a list, see `of`."""
        return [*self.center, *self.neighbor, self.index]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Neighborhoods:
        """From the list that `flat` gave."""
        stages = len(tensors) // 2
        return cls(tuple(tensors[:stages]), tuple(tensors[stages:-1]), tensors[-1])


def stage_sizes(num_points: int, num_tokens: int, stages: int = 3) -> tuple[int, ...]:
    """Centres per stage: a geometric progression from points to tokens (1024 and 128: 512, 256, 128)."""
    ratio = num_tokens / num_points
    return tuple(round(num_points * ratio ** ((i + 1) / stages)) for i in range(stages))


def first_centers(points: Tensor, start: str) -> Tensor | int:
    """The centre that sampling starts from: the point "farthest" from the mean `[B]`, or the "first" one.

    Args:
        points: `[B, N, 3]`, of which the finite ones count.
        start: as above.
    """
    if start == "first":
        return 0
    if points.dtype == torch.float32 and in_kernels(points):
        from any2point.triton.clouds import farthest_from_mean

        return farthest_from_mean(points)
    valid = points.isfinite().all(-1)
    kept = torch.where(valid[..., None], points, 0.0)
    mean = kept.sum(1, keepdim=True) / valid.sum(1).clamp(min=1)[:, None, None]
    distance = (kept - mean).square().sum(-1)
    distance = torch.where(valid, distance, -1.0)
    return _first_true(distance == distance.amax(1, keepdim=True))


def _first_true(mask: Tensor) -> Tensor:
    """Index along the last dimension of the first True (of the last entry if there is none).

    In place of argmax, which Inductor of torch 2.11 miscompiles on CPUs for sizes that are no multiple of 16.
    """
    rows = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, rows, mask.shape[-1] - 1).amin(-1)


def repeat_centers(index: Tensor) -> Tensor:
    """Samples `[B, M]` of which a cloud with too few points has -1 at the end: there they begin again.

    A cloud without any point keeps its -1, which `group` takes for a point of zeros.
    """
    if in_kernels(index):
        from any2point.triton.clouds import repeat

        return repeat(index)
    found = (index >= 0).sum(1, keepdim=True)
    return index.gather(1, torch.arange(index.shape[1], device=index.device) % found.clamp(min=1))


def with_features(points: Tensor, features: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Coordinates with features behind them `[B, N, 3 + F]`, zeros for points that do not count; which do."""
    valid = points.isfinite().all(-1)
    x = points.to(dtype)
    if features is not None:
        x = torch.cat([x, features.to(dtype)], dim=-1)
    return torch.where(valid[..., None], x, 0.0), valid


def _embeds(points: Tensor, features: Tensor | None, tokenizer: Tokenizer) -> bool:
    """Whether kernels take over the first layer: on CUDA, where they have the gradients asked for."""
    if not in_kernels(points) or are_shared() or is_hooked(tokenizer.embed, tokenizer.embed_norm):
        return False
    weight, inputs = tokenizer.embed.weight, [points, *([] if features is None else [features])]
    if points.dtype != torch.float32 or weight.dtype != torch.float32 or weight.shape[1] > 15:
        return False
    differentiable = tokenizer.training and not any(x.requires_grad for x in inputs)
    return differentiable or not torch.is_grad_enabled()


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
        features: channels of every point beside its coordinates.
        checkpointing: compute the rows of each stage again for the gradient instead of keeping them.
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
        features: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.sizes, self.neighbors = tuple(sizes), tuple(neighbors)
        self.normalize, self.guard, self.start, self.tie = normalize, guard, start, tie
        self.checkpointing = checkpointing
        self.embed = nn.Linear(3 + features, width, bias=False)
        self.embed_norm = BatchNorm(width)
        self.stages = nn.ModuleList()
        for stage, count in enumerate(units):
            width *= 2
            hidden = last_hidden if stage == len(units) - 1 else width // 2
            self.stages.append(nn.ModuleList(Bottleneck(width, hidden) for _ in range(count)))
        self.width = width

    def _positions(self, level: Tensor, picks: Tensor) -> Tensor:
        """Where in a level `[B, n]` the picks `[B, m]` of the next one stand."""
        batch, size = picks.shape
        if self.tie == "lowest":  # each level is a prefix of the one before
            return torch.arange(size, device=picks.device).expand(batch, size)
        return _first_true(picks[:, :, None] == level[:, None, :])

    def neighborhoods(self, points: Tensor, beside: Beside | None = None) -> Neighborhoods:
        """Centres and neighbours of every stage; `points` as `forward` takes them.

        If they are computed beside something, every stage ends with a mark.
        """
        first = first_centers(points, self.start)
        levels = farthest_point_hierarchy(points, list(self.sizes), start=first, tie=self.tie)
        if self.tie == "lowest":  # with the official order, samples repeat by themselves
            index = repeat_centers(levels[0])
            levels = [index[:, :size] for size in self.sizes]
        chosen, neighbors = [], []
        for stage, count in enumerate(self.neighbors):
            center = levels[0] if stage == 0 else self._positions(levels[stage - 1], levels[stage])
            centers = group(points, center)
            chosen.append(center)
            neighbors.append(knn(centers, points, count, sorted=False).index)
            if beside is not None:
                beside.mark()
            points = centers
        return Neighborhoods(tuple(chosen), tuple(neighbors), levels[-1])

    def forward(
        self,
        points: Tensor,
        features: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
        beside: Beside | None = None,
    ) -> Tokens:
        """`points [B, N, 3]` float32 or float64, `features [B, N, F]` -> tokens of the last stage.

        Points with a NaN or infinite coordinate (padding, say) are left out. A cloud with fewer points than
        the first stage has centres repeats its centres. `neighborhoods` are those of the points, if they are
        there already, or are computed beside.
        """
        x = self._embed(points, features)
        near = self.neighborhoods(points) if neighborhoods is None else neighborhoods
        for stage, (center, neighbor) in enumerate(zip(near.center, near.neighbor)):
            if beside is not None:
                beside.wait(stage)
            x = self._aggregate(stage, points, x, center, neighbor)
            points = group(points, center)
        return Tokens(x, points, near.index)

    def _embed(self, points: Tensor, features: Tensor | None) -> Tensor:
        """The first layer: `[B, N, 3]` and `[B, N, F]` -> `[B, N, w]`."""
        shape = points.shape[:2]
        if _embeds(points, features, self):
            from any2point.triton.embed import Embed

            rows = points.flatten(0, 1), None if features is None else features.flatten(0, 1)
            norm = self.embed_norm.tensors()
            step = MOMENTUM, EPS, self.training
            return Embed.apply(*rows, self.embed.weight, *norm, *step).unflatten(0, shape)
        x, valid = with_features(points, features, self.embed.weight.dtype)
        return self.embed_norm(self.embed(x).flatten(0, 1), valid.flatten()).relu().unflatten(0, shape)

    def _aggregate(self, stage: int, points: Tensor, x: Tensor, center: Tensor, neighbor: Tensor) -> Tensor:
        return local_aggregate(
            points,
            x,
            center,
            neighbor,
            [unit.tensors() for unit in self.stages[stage]],  # type: ignore[attr-defined]
            normalize=self.normalize,
            guard=self.guard,
            training=self.training,
            operand_dtype=torch.float16 if _float16_operands else None,
            recompute=self.checkpointing,
        )


class PointNetTokenizer(nn.Module):
    """One group of neighbours per token and one small PointNet for all, as in Point-BERT and Point-MAE.

    Offsets of the K neighbours from their centre, in the unit of the coordinates, go through two layers
    `[w, 2w]`; the maximum over the group is put in front of each, and two more layers `[4w, C]` and another
    maximum give the token.

    Args:
        width: channels C of the tokens.
        tokens: T.
        neighbors: K.
        hidden: width w of the first layer.
        start: first centre of a cloud, see `Tokenizer`.
        tie: see `Tokenizer`.
        features: channels of every point beside its coordinates.
        checkpointing: compute the network again for the gradient instead of keeping what is inside.
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        neighbors: int,
        *,
        hidden: int = 128,
        start: str = "farthest",
        tie: Literal["lowest", "pointnet2"] = "lowest",
        features: int = 0,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.neighbors, self.start, self.tie = tokens, neighbors, start, tie
        self.checkpointing = checkpointing
        self.point = nn.Linear(3 + features, hidden)
        self.point_norm = BatchNorm(hidden)
        self.local = nn.Linear(hidden, 2 * hidden)
        self.both = nn.Linear(4 * hidden, 4 * hidden)
        self.both_norm = BatchNorm(4 * hidden)
        self.token = nn.Linear(4 * hidden, width)
        self.width = width

    def neighborhoods(self, points: Tensor, beside: Beside | None = None) -> Neighborhoods:
        """Centres and neighbours; see `Tokenizer`."""
        first = first_centers(points, self.start)
        index = repeat_centers(farthest_point_sample(points, self.tokens, start=first, tie=self.tie))
        neighbor = knn(group(points, index), points, self.neighbors, sorted=False).index
        neighbor = torch.where(neighbor < 0, index[..., None], neighbor)
        if beside is not None:
            beside.mark()
        return Neighborhoods((index,), (neighbor,), index)

    def forward(
        self,
        points: Tensor,
        features: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
        beside: Beside | None = None,
    ) -> Tokens:
        """`points [B, N, 3]` float32 or float64, `features [B, N, F]` -> tokens; see `Tokenizer`."""
        x, _ = with_features(points, features, self.point.weight.dtype)
        near = self.neighborhoods(points) if neighborhoods is None else neighborhoods
        if beside is not None:
            beside.wait(0)
        index, (neighbor,) = near.index, near.neighbor
        centers = group(points, index)
        offset = (group(points, neighbor) - centers[:, :, None]).to(x.dtype)
        x = torch.cat([offset, group(x[..., 3:], neighbor)], dim=-1) if x.shape[-1] > 3 else offset
        tokens = recompute(self, self._embed, x) if self.checkpointing else self._embed(x)
        return Tokens(tokens, centers, index)

    def _embed(self, x: Tensor) -> Tensor:
        """The network: `[B, T, K, 3 + F]` -> `[B, T, C]`."""
        shape = x.shape[:3]
        x = self.local(self.point_norm(self.point(x).flatten(0, 2)).relu()).view(*shape, -1)
        x = torch.cat([x.amax(2, keepdim=True).expand_as(x), x], dim=-1)
        x = self.token(self.both_norm(self.both(x).flatten(0, 2)).relu()).view(*shape, -1)
        return x.amax(2)
