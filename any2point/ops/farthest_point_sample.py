"""Farthest point sampling: spread-out points, each the farthest from all picked before."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from any2point.ops._checks import check_clouds, check_index, check_int, shape_text

Tie = Literal["lowest", "pointnet2"]
Start = int | Tensor | Literal["random"]


class FarthestPoints(NamedTuple):
    index: Tensor  # type: ignore[assignment]  # [B, M] int64
    distance: Tensor  # [B, M] squared


@overload
def farthest_point_sample(
    points: Tensor,
    num_samples: int,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    start: Start = 0,
    generator: torch.Generator | None = None,
    return_distance: Literal[False] = False,
    tie: Tie = "lowest",
) -> Tensor: ...
@overload
def farthest_point_sample(
    points: Tensor,
    num_samples: int,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    start: Start = 0,
    generator: torch.Generator | None = None,
    return_distance: Literal[True],
    tie: Tie = "lowest",
) -> FarthestPoints: ...
def farthest_point_sample(
    points: Tensor,
    num_samples: int,
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    start: Start = 0,
    generator: torch.Generator | None = None,
    return_distance: bool = False,
    tie: Tie = "lowest",
) -> Tensor | FarthestPoints:
    """Pick points so that each is the farthest from all picked before.

    Equals, for one cloud::

        level = torch.full([N], torch.inf)
        for j in range(M):
            index[j] = start if j == 0 else level.argmax()          # the lowest index on ties
            distance[j] = level[index[j]]
            level = level.minimum(squared_distance(points, points[index[j]]))
            level[index[: j + 1]] = -1                              # taken: never again

    So the indices are distinct, and the first m picks are the answer for ``num_samples=m``. Points with a
    NaN or infinite coordinate are never picked.

    Args:
        points: ``[B, N, D]`` float32 or float64 (float16 and bfloat16 are raised to float32), any D >= 1; or
            ``[P, D]`` with `offsets`. Any unit, any scale.
        num_samples: M, at least 0; more than there are points is legal, see Returns.
        lengths: ``[B]`` int64, how many of the N rows belong to each cloud; the others are ignored.
        offsets: ``[B + 1]`` int64; cloud b is rows ``offsets[b]`` to ``offsets[b + 1]`` of the packed points.
        start: The first pick, counted within the cloud: one int for all clouds, an int64 tensor ``[B]``, or
            ``"random"``: uniform over the rows of each cloud, drawn on the device of `points`. A start
            that is outside of the cloud or not finite gives way to the lowest finite point. An int64 tensor
            ``[B, S]`` gives the first S picks, for example a set to continue from: the picks after them are
            ``index[:, S:]``. One of them that is no finite point of the cloud, or that is taken, gives way
            to the farthest point.
        generator: For ``start="random"``, on the device of `points`; None is torch's default one.
        return_distance: Also return the distances.
        tie: ``"lowest"`` as above. ``"pointnet2"`` (D = 3) repeats what ``pointnet2_ops`` picks, for parity
            with models trained on it: points within sqrt(1e-3) of the origin are skipped, levels start at
            1e10, ties follow its thread tree, and when nothing is left indices repeat.

    Returns:
        index ``[B, M]`` int64, rows of the cloud (of the packed tensor with `offsets`). With
        `return_distance`, ``(index, distance)``: distance ``[B, M]`` is the *squared* distance of each pick
        to the picks before it, never rising; +inf for the first. A cloud with fewer than M finite points
        ends in index -1, distance 0. No finite point is farther than ``distance[:, m].sqrt()`` from the
        first m picks: their covering radius.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape, a device or a value is wrong.

    Differentiable in: nothing (the distances are constants too).
    Deterministic: yes; CPU and CUDA give the same bits.
    Complexity: O(M N D) work a cloud at most. Large clouds are pruned by blocks and picked many at a time: on
        the CPU with D = 2 or 3, on CUDA in float32 with D = 3 (docs/fps.md). A start set costs one update
        by all its picks on CUDA in float32 with D = 3, if no valid point comes after one that gives way;
        else, and on the CPU, a pass over the points for each.

    Source: Y. Eldar et al., "The farthest point strategy for progressive image sampling", 1997.

    Example:
        >>> points = torch.rand(2, 1024, 3)
        >>> farthest_point_sample(points, 512).shape
        torch.Size([2, 512])
    """
    clouds = check_clouds(points, lengths, offsets)
    num_samples = check_int("num_samples", num_samples, at_least=0)
    if tie not in ("lowest", "pointnet2"):
        raise ValueError(f'tie: expected "lowest" or "pointnet2", got {tie!r}')
    dim = clouds.points.shape[-1]
    if dim < 1 or (tie == "pointnet2" and dim != 3):
        wanted = 'D = 3 for tie="pointnet2"' if dim else "D >= 1"
        raise ValueError(f"points: expected {wanted}, got shape {shape_text(clouds.points)}")
    first = _first(start, generator, clouds.points, clouds.batch, clouds.lengths, clouds.offsets)
    if tie == "pointnet2" and first is not None and first.dim() == 2:
        raise ValueError('start: expected one start a cloud with tie="pointnet2", got a tensor [B, S]')
    coordinates = clouds.points.detach() if clouds.points.requires_grad else clouds.points
    index, distance = torch.ops.any2point.farthest_point_sample.default(
        coordinates, num_samples, clouds.lengths, clouds.offsets, first, tie == "pointnet2"
    )
    return FarthestPoints(index, distance) if return_distance else index


def farthest_point_hierarchy(
    points: Tensor,
    num_samples: Sequence[int],
    *,
    lengths: Tensor | None = None,
    offsets: Tensor | None = None,
    start: Start = 0,
    generator: torch.Generator | None = None,
    tie: Tie = "lowest",
) -> list[Tensor]:
    """Farthest point sampling of farthest point samples, level by level, for the price of the first level.

    Equals sampling `points`, then sampling the picks, and so on: the picks of picks are a prefix of the
    picks, ties included, so one run answers every level::

        index = farthest_point_sample(points, num_samples[0])
        [index[:, :m] for m in num_samples]

    With ``tie="pointnet2"`` that identity fails on ties, and each level is sampled from the one before.

    Args:
        points: As in :func:`farthest_point_sample`, like `lengths`, `offsets`, `start`, `generator`, `tie`.
        num_samples: The sizes of the levels, for example ``[512, 256, 128]``; never rising.
        lengths: See there.
        offsets: See there.
        start: See there.
        generator: See there.
        tie: See there.

    Returns:
        One index tensor ``[B, m]`` for each size, all into `points`; with ``tie="lowest"`` views of the
        first.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: The sizes rise, or a shape, a device or a value is wrong.

    Differentiable in: nothing.
    Deterministic: yes.
    Complexity: that of :func:`farthest_point_sample` for the first level.

    Example:
        >>> levels = farthest_point_hierarchy(torch.rand(2, 1024, 3), [512, 256, 128])
        >>> [tuple(level.shape) for level in levels]
        [(2, 512), (2, 256), (2, 128)]
    """
    if isinstance(num_samples, (str, Tensor)) or not isinstance(num_samples, Sequence):
        raise TypeError(f"num_samples: expected a list of ints, got {type(num_samples).__name__}")
    sizes = [check_int("num_samples", m, at_least=0) for m in num_samples]
    if not sizes or any(a < b for a, b in pairwise(sizes)):
        raise ValueError(f"num_samples: expected one or more sizes, never rising, got {sizes}")
    first = farthest_point_sample(
        points, sizes[0], lengths=lengths, offsets=offsets, start=start, generator=generator, tie=tie
    )
    if tie == "lowest":
        return [first[:, :m] for m in sizes]
    levels = [first]
    rows = points if offsets is not None else points.flatten(0, 1)
    base = (
        0
        if offsets is not None
        else torch.arange(points.shape[0], device=points.device)[:, None] * points.shape[1]
    )
    for m in sizes[1:]:
        index = levels[-1]
        if index.numel() == 0:
            levels.append(index[:, :m])
            continue
        # Index -1 (an empty cloud) becomes a point that is never picked.
        picked = rows[(index + base).clamp_min(0)].where((index >= 0)[..., None], torch.nan)
        chosen = farthest_point_sample(picked, m, tie=tie)
        levels.append(index.gather(1, chosen.clamp_min(0)).where(chosen >= 0, -1))
    return levels


def _first(
    start: object,
    generator: torch.Generator | None,
    points: Tensor,
    batch: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
) -> Tensor | None:
    """The start of each cloud, or None for 0."""
    if isinstance(start, str) and start == "random":
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        if generator is not None and generator.device.type != points.device.type:
            raise ValueError(
                f"generator: expected one on {points.device} like `points`, got {generator.device}"
            )
        # float64: every row of a cloud of up to 2**53 can be drawn. The product may round up to the size.
        uniform = torch.rand(batch, dtype=torch.float64, device=points.device, generator=generator)
        if offsets is not None:
            size = offsets.diff()
        else:
            size = torch.full_like(uniform, points.shape[1]).long() if lengths is None else lengths
        return (uniform * size).long().minimum(size - 1)
    if generator is not None:
        raise ValueError('generator: expected None unless start="random"')
    if isinstance(start, Tensor):
        start = check_index("start", start, like=points, like_name="points")
        if start.dim() not in (1, 2) or start.shape[0] != batch or (start.dim() == 2 and start.shape[1] < 1):
            raise ValueError(
                f"start: expected shape [B] = [{batch}] or [B, S] with S >= 1, got {shape_text(start)}"
            )
        return start
    if isinstance(start, str):
        raise ValueError(f'start: expected an int, a tensor [B] or "random", got {start!r}')
    start = check_int("start", start, at_least=0)
    return None if start == 0 else torch.full((batch,), start, dtype=torch.int64, device=points.device)


@torch.library.register_fake("any2point::farthest_point_sample")
def _fake(
    points: Tensor,
    num_samples: int,
    lengths: Tensor | None,
    offsets: Tensor | None,
    start: Tensor | None,
    pointnet2: bool,
) -> tuple[Tensor, Tensor]:
    batch = points.shape[0] if offsets is None else offsets.shape[0] - 1
    index = points.new_empty((batch, num_samples), dtype=torch.int64)
    return index, points.new_empty((batch, num_samples))
