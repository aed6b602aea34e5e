"""The cases of the ops on features, which have gradients; see `any2point.bench.cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from any2point import ops, reference
from any2point.bench import costs, peers
from any2point.bench.cases import Case, Provider, Shapes, clouds, near_reference


def _random(device: str, *shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    """Made on the CPU, so that every device gets the same."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)
    return drawn.requires_grad_(grad)


# Statistics of the batch, and running ones that stay as they are.
_TRAINING: dict[str, Any] = {"training": True, "momentum": 0.0}


def _integers(device: str, limit: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(limit, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def group(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    sizes = {"cpu": [(1, 1024, 96, 512, 81), (4, 512, 192, 256, 64)], "cuda": [(32, 1024, 96, 512, 81)]}
    for batch, rows, width, queries, k in shapes or sizes[device]:
        inputs: list[tuple[Any, ...]] = []
        for seed, points in enumerate(clouds(batch, rows)):
            index = ops.knn(points[:, :queries].contiguous(), points, k).index  # neighbourhoods, as in use
            inputs.append((_random(device, batch, rows, width, seed=seed), index.to(device)))

        def check(out: Tensor, i: int, exact: bool, inputs: list[Any] = inputs) -> float:
            features, index = inputs[i]
            if not torch.equal(out, reference.group(features.detach(), index)):
                raise AssertionError("grouped features differ from the reference's")
            return 1.0

        providers = [
            Provider.plain("any2point", ops.group),
            Provider.plain("torch index", peers.torch_group),
            Provider.plain("torch gather", peers.torch_group_gather),
        ]
        cost = costs.cost_group(batch, rows, queries, k, width)
        yield Case(
            "group",
            f"{batch},{rows},{width} -> {queries}x{k}",
            inputs,
            check,
            cost,
            providers,
            backward=True,
            reference=reference.group,
        )


def interpolate(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    sizes = {"cpu": [(2, 128, 384, 1024, 3), (1, 1024, 96, 8192, 3)], "cuda": [(32, 128, 384, 1024, 3)]}
    for batch, rows, width, queries, k in shapes or sizes[device]:
        index = _integers(device, rows, batch, queries, k)
        weight = _random(device, batch, queries, k, grad=False).abs().requires_grad_()
        inputs = [(_random(device, batch, rows, width), index, weight)]
        providers = [
            Provider.plain("any2point", ops.interpolate),
            Provider.plain("torch", peers.torch_interpolate),
        ]
        yield Case(
            "interpolate",
            f"{batch},{rows},{width} -> {queries}x{k}",
            inputs,
            near_reference(reference.interpolate, inputs, 1e-5),
            costs.cost_interpolate(batch, rows, queries, k, width),
            providers,
            backward=True,
            reference=reference.interpolate,
            compilable=peers.torch_interpolate,
        )


def voxel_cluster(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    for batch, rows, size in shapes or [(32, 128, 0.08), (1, 100_000, 0.05)]:
        host = clouds(batch, rows)
        inputs = [(points.to(device), size) for points in host]

        def check(cluster: Tensor, i: int, exact: bool, host: Any = host, size: float = size) -> float:
            expected = reference.voxel_cluster(host[i], size)[0]
            same = float((cluster.cpu() == expected).float().mean())
            if same < (1.0 if exact else 0.999):
                raise AssertionError(f"only {same:.4%} of the clusters are the reference's")
            return same

        providers = [
            Provider.plain("any2point", lambda points, size: ops.voxel_cluster(points, size).cluster),
            Provider("torch unique", peers.torch_voxels),
        ]
        cost = costs.cost_voxel_cluster(batch, rows)
        yield Case("voxel_cluster", f"{batch},{rows},{size}", inputs, check, cost, providers)


def segment_pool(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    for rows, width, count in shapes or [(4096, 768, 1248), (100_000, 96, 20_000)]:
        for reduce in ("mean", "max"):
            segment = _integers(device, count, rows)
            inputs = [(_random(device, rows, width), segment, count, reduce)]
            # The specification looks at all rows for every segment: minutes for thousands of them.
            composed = reference.segment_pool if count < 2000 else peers.torch_segment_pool
            yield Case(
                "segment_pool",
                f"{rows},{width},{count} {reduce}",
                inputs,
                near_reference(composed, inputs, 1e-5),
                costs.cost_segment_pool(rows, width, count),
                [
                    Provider.plain("any2point", ops.segment_pool),
                    Provider.plain("torch", peers.torch_segment_pool),
                ],
                backward=True,
                reference=composed,
                compilable=peers.torch_segment_pool,
            )


def _projection(function: Any, cell: float, *args: Tensor) -> Tensor:
    return function(*args, cell=cell).encoding


def virtual_project(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    for batch, count, grid, width, views in shapes or [
        (32, 128, (77,), 768, 6),
        (32, 128, (37, 37), 768, 6),
    ]:
        axes = torch.linalg.qr(_random("cpu", views, 3, 3, grad=False))[0].to(device)
        axes = axes if len(grid) == 2 else axes[:, 0].contiguous()
        table = _random(device, *grid, width)
        inputs = [(points.to(device), table, axes) for points in clouds(batch, count)]
        specified = partial(_projection, reference.virtual_project, 2.0)
        composed = partial(_projection, peers.torch_virtual_project, 2.0)
        positions = 1
        for side in grid:
            positions *= side
        yield Case(
            "virtual_project",
            f"{batch},{count} {'x'.join(map(str, grid))},{width} V={views}",
            inputs,
            near_reference(specified, inputs, 1e-4),
            costs.cost_virtual_project(batch, count, positions, width, views),
            [
                Provider.plain("any2point", partial(_projection, ops.virtual_project, 2.0)),
                Provider.plain("torch", composed),
            ],
            backward=True,
            reference=specified,
            compilable=composed,
        )


# points, centres, k, channels, bottleneck, residual units: the stages of the tokenizer
STAGES = [(1024, 512, 81, 96, 96, 2), (512, 256, 81, 192, 192, 1), (256, 128, 81, 384, 32, 1)]
_ANOTHER = (1024, 512, 16, 64, 48, 3)  # a size without kernels of its own


def _norm(device: str, *shape: int) -> ops.BatchNorm:
    ones, zeros = torch.ones(shape, device=device), torch.zeros(shape, device=device)
    return ops.BatchNorm(ones, zeros, zeros.clone(), ones.clone())


def residual_units(width: int, hidden: int, count: int, device: str) -> list[ops.ResidualUnit]:
    """Random weights of a stage on `width` channels."""

    def weight(rows: int, columns: int, seed: int) -> Tensor:
        drawn = _random(device, rows, columns, seed=seed, grad=False)
        return (columns**-0.5 * drawn).requires_grad_()

    return [
        ops.ResidualUnit(
            weight(hidden, width, 2 * i + 1),
            None,
            _norm(device, hidden),
            weight(width, hidden, 2 * i + 2),
            None,
            _norm(device, width),
        )
        for i in range(count)
    ]


def _each(function: Callable[..., Tensor], *stages: tuple[Any, ...], **options: Any) -> Tensor:
    """All stages, as one tensor."""
    return torch.cat([function(*stage, **options).flatten() for stage in stages])


def local_aggregate(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    whole: dict[str, list[tuple[Any, ...]]] = {"tf32": [], "float16": []}
    work = costs.Cost(0)
    torch_ = Provider.plain("torch", peers.torch_local_aggregate)
    ours = {
        "tf32": Provider.plain("any2point", partial(ops.local_aggregate, operand_dtype=torch.float16)),
        "float16": Provider.plain("any2point", ops.local_aggregate),
    }
    for stage in shapes or [*STAGES, _ANOTHER]:
        rows, centers, k, width, hidden, count = stage
        batch = 32 if device == "cuda" else 1
        points = clouds(batch, rows, sets=1)[0]
        neighbor = ops.knn(points[:, :centers].contiguous(), points, k, sorted=False).index.to(device)
        center = torch.arange(centers, device=device).expand(batch, -1).contiguous()
        features = _random(device, batch, rows, width)
        weights = residual_units(2 * width, hidden, count, device)
        inputs = (points.to(device), features, center, neighbor, weights)
        name = f"{batch},{rows},{width} -> {centers}x{k} H={hidden}x{count}"
        cost = costs.cost_local_aggregate(batch, rows, centers, k, width, hidden, count)
        yield Case(
            "local_aggregate",
            name,
            [inputs],
            near_reference(reference.local_aggregate, [inputs], 1e-3),
            cost,
            [ours["float16"], torch_],
            backward=True,
            reference=reference.local_aggregate,
            tolerance=2e-2,  # of many maxima and ReLUs a few go the other way
            training=_TRAINING,
        )
        if device == "cpu":
            continue
        half = features.detach().half().requires_grad_()
        work = work + cost if stage in STAGES else work
        for kind, given in (("float16", (inputs[0], half, *inputs[2:])), ("tf32", inputs)):
            if stage in STAGES:
                whole[kind].append(given)
            elif kind == "tf32":  # for these `operand_dtype` has no kernels
                continue
            yield Case(
                "local_aggregate",
                f"{name} {kind}",
                [given],
                near_reference(reference.local_aggregate, [given], 1e-2),
                cost,
                [ours[kind], torch_],
                backward=True,
                reference=reference.local_aggregate,
                tolerance=0.2,  # 0.04 for torch under autocast: more maxima and ReLUs go the other way
                training=_TRAINING,
                # Half a minute each.
                compilable=torch_.run if stage in STAGES and kind == "float16" else None,
                low=True,
                precision="tf32" if kind == "tf32" else "fp32",
            )
    if device == "cuda" and not shapes:
        composed = partial(_each, peers.torch_local_aggregate)
        specified = partial(_each, reference.local_aggregate)
        for kind, stages in whole.items():
            yield Case(
                "local_aggregate",
                f"32 clouds, three stages of the tokenizer, k=81 {kind}",
                [tuple(stages)],
                near_reference(specified, [tuple(stages)], 1e-2),
                work,
                [
                    Provider.plain("any2point", partial(_each, ours[kind].run)),
                    Provider.plain(
                        "any2point recompute", partial(_each, partial(ours[kind].run, recompute=True))
                    ),
                    Provider.plain("torch", composed),
                ],
                backward=True,
                reference=specified,
                tolerance=0.2,
                training=_TRAINING,
                compilable=composed if kind == "float16" else None,
                low=True,
                precision="tf32" if kind == "tf32" else "fp32",
            )


def guided_aggregate(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    sizes = [(32 if device == "cuda" else 4, 128, 768, 6, 12, cells) for cells in (39, 400)]
    for batch, count, width, views, inner, cells in shapes or sizes:
        # About 80 voxels a cloud, numbered consecutively over the batch.
        voxel = _integers("cpu", 80, batch, count) + 80 * torch.arange(batch)[:, None]
        cluster = torch.unique(voxel, return_inverse=True)[1].to(device)
        weights = (
            torch.ones(views, width, device=device),
            torch.zeros(views, width, device=device),
            width**-0.5 * _random(device, views, 3 * inner, width, grad=False),
            torch.zeros(views, 3 * inner, device=device),
            inner**-0.5 * _random(device, views, width, inner, grad=False),
            torch.zeros(views, width, device=device),
        )
        attention = ops.CellAttention(*(weight.requires_grad_() for weight in weights))
        norms = _norm(device, views, width), _norm(device, width)
        cell = _integers(device, cells, batch, views, count)
        inputs = [(_random(device, batch, count, width), cell, cluster, attention, *norms)]
        options: dict[str, Any] = {"num_cells": cells, "num_heads": 6, "coefficient": 0.3}
        composed = partial(peers.torch_guided_aggregate, **options)
        yield Case(
            "guided_aggregate",
            f"{batch},{count},{width} V={views} cells={cells}",
            inputs,
            near_reference(composed, inputs, 1e-4),
            costs.cost_guided_aggregate(batch, count, width, views, inner),
            [
                Provider.plain("any2point", partial(ops.guided_aggregate, **options)),
                Provider.plain("torch", composed),
            ],
            backward=True,
            reference=composed,
            training=_TRAINING,
            compilable=composed if cells < 100 else None,
        )
