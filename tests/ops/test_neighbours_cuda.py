"""knn and ball_query on CUDA against the CPU, bit for bit: 10,000 random clouds of every kind."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from any2point import ops

BATCHES, CLOUDS = 20, 500
SIZES = (0, 1, 2, 5, 31, 32, 33, 100, 127, 128, 129, 255, 256, 257, 300, 511, 513, 1000, 1024, 1025)
KS = (0, 1, 2, 3, 8, 16, 20, 21, 24, 25, 32, 33, 52, 53, 64, 68, 69, 81, 112, 113, 140, 141, 192, 193, 300)
# Clouds, points, queries (None: the points) for which the search builds a tree: each cloud sorted by one
# block, all of them together, few queries in a large cloud.
LARGE = (
    *((1, 3000, None), (2, 9000, 1200), (5, 2100, 600), (1, 5000, 5100), (7, 1500, 10_000)),
    *((1, 17_000, 300), (1, 60_001, 50)),
)


def _uniform(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    return torch.rand(n, dim, generator=generator, dtype=torch.float64)


def _lattice(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    steps = rng.choice((1, 2, 4, 16, 256))
    return (_uniform(generator, rng, n, dim) * steps).round() / steps


def _duplicates(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    places = _uniform(generator, rng, max(1, n // rng.choice((2, 10, 100, 100_000))), dim)
    return places[torch.randint(len(places), (n,), generator=generator)]


def _clusters(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    """Of sizes from 1 to 1e-6, some far from each other."""
    size = 10.0 ** -torch.randint(0, 7, (n, 1), generator=generator).double()
    place = torch.randint(0, 3, (n, 1), generator=generator) * rng.choice((1.0, 16.0, 1e4))
    return _uniform(generator, rng, n, dim) * size + place


def _line(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    points = _uniform(generator, rng, n, 1).expand(n, dim).clone()
    if rng.random() < 0.5:
        points[:, 1:] = 0.5
    return points


def _plane(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    points = _lattice(generator, rng, n, dim) if rng.random() < 0.5 else _uniform(generator, rng, n, dim)
    points[:, rng.randrange(dim)] = 0.25
    return points


def _outliers(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    points = _uniform(generator, rng, n, dim)
    points[torch.rand(n, generator=generator) < 0.01] *= 1e6
    return points


KINDS: tuple[Callable[[torch.Generator, random.Random, int, int], Tensor], ...] = (
    _uniform, _lattice, _duplicates, _clusters, _line, _plane, _outliers,
)  # fmt: skip
SCALES = (1.0,) * 8 + (1e3, 1e15, 1e30, 2e38, 1e-15, 1e-30, 1e-40)
OFFSETS = (0.0,) * 6 + (-0.5, 1e3, 5e4, 1e7)


def cloud(generator: torch.Generator, rng: random.Random, n: int, dim: int) -> Tensor:
    """One of any kind, `[n, dim]` float32: shifted, scaled and with holes as it happens."""
    points = rng.choice(KINDS)(generator, rng, n, dim)
    points = ((points + rng.choice(OFFSETS)) * rng.choice(SCALES)).float()
    if rng.random() < 0.3:
        hole = torch.rand(n, dim, generator=generator) < rng.choice((0.002, 0.05, 0.6))
        points[hole] = rng.choice((torch.nan, torch.inf, -torch.inf))
    return points


def queries(generator: torch.Generator, rng: random.Random, points: Tensor, n: int) -> Tensor:
    """Points of the cloud, points like them, and far ones."""
    kind = rng.randrange(4)
    dim = points.shape[1]
    if kind == 0 or len(points) == 0:
        return cloud(generator, rng, n, dim)
    chosen = points[torch.randint(len(points), (n,), generator=generator)]
    if kind == 1:
        return chosen
    scale = points[points.isfinite()].abs().amax().item() if points.isfinite().any() else 1.0
    step = torch.rand(n, dim, generator=generator) - 0.5
    return chosen + step * scale * (0.01 if kind == 2 else 3.0)


def pad(parts: list[Tensor], extra: int) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(part) for part in parts])
    out = torch.full((len(parts), int(lengths.amax()) + extra, parts[0].shape[1]), 0.5)
    for row, part in zip(out, parts):
        row[: len(part)] = part
    return out, lengths


def call(seed: int) -> tuple[int, Callable[..., Any], dict[str, Any]]:
    """How many clouds, and a search in them: an op and its arguments."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    large = rng.random() < 0.08
    dim = rng.choice((3, 3, 3, 2, 1)) if large else rng.choice((3, 3, 3, 3, 3, 3, 1, 2, 4, 7))
    batch, n, s = rng.choice(LARGE) if large else (rng.randint(1, 24), 0, 0)
    sizes = [n if large else rng.choice(SIZES) for _ in range(batch)]
    clouds = [cloud(generator, rng, size, dim) for size in sizes]
    itself = s is None or (not large and rng.random() < 0.25)
    if itself:
        asked = clouds
    else:
        asked = [queries(generator, rng, part, s or rng.choice((0, 1, 7, 33, 70))) for part in clouds]

    kwargs: dict[str, Any]
    if rng.random() < 0.4:
        offsets = torch.tensor([0, *(len(part) for part in clouds)]).cumsum(0)
        query_offsets = torch.tensor([0, *(len(part) for part in asked)]).cumsum(0)
        points, query = torch.cat(clouds), torch.cat(asked)
        kwargs = {"offsets": offsets, "query_offsets": query_offsets}
    else:
        extra = rng.choice((0, 0, 3))
        points, lengths = pad(clouds, extra)
        query, query_lengths = pad(asked, extra if itself else 0)
        kwargs = {"lengths": lengths, "query_lengths": query_lengths}
        if rng.random() < 0.3:  # what lies beyond counts, too
            kwargs = {}
    if not large and rng.random() < 0.15:
        points, query = points.double(), query.double()
    kwargs |= {"points": points, "query": points if itself else query, "k": rng.choice(KS)}
    if rng.random() < 0.35:
        rows = points.reshape(-1, dim)
        rows = torch.cat([rows[rows.isfinite().all(1)], torch.ones(1, dim)])
        pair = rows[torch.randint(len(rows), (2,), generator=generator)]
        distance = (pair[0].double() - pair[1].double()).norm().item()
        radius = distance * rng.uniform(0.05, 1.2) or rng.choice((1e-3, 1.0, torch.inf))
        return batch, ops.ball_query, kwargs | {"radius": radius, "mode": rng.choice(("nearest", "first"))}
    kwargs["sorted"] = rng.random() < 0.7
    kwargs["exclude_self"] = itself and rng.random() < 0.4
    if rng.random() < 0.2:
        kwargs["k_per_cloud"] = torch.tensor([rng.randint(0, kwargs["k"]) for _ in range(batch)])
    return batch, ops.knn, kwargs


def bits(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 8: torch.int64}[x.element_size()])


def moved(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments there; `query` stays the tensor that `points` is."""
    new = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    if kwargs["query"] is kwargs["points"]:
        new["query"] = new["points"]
    return new


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_clouds_are_searched_alike(batch: int) -> None:
    done, seed = 0, batch * 1_000_000
    while done < CLOUDS:
        clouds, op, kwargs = call(seed)
        want, got = op(**kwargs), op(**moved(kwargs, "cuda"))
        for name, cpu, cuda in zip(want._fields, want, got, strict=True):
            same = torch.equal(bits(cpu), bits(cuda.cpu()))
            shape = tuple(kwargs["points"].shape)
            assert same, f"seed {seed}: {op.__name__} {name}, points {shape}, k {kwargs['k']}"
        done, seed = done + clouds, seed + 1


def test_calls_reach_every_kind_of_search() -> None:
    """The generator above: many clouds, both ops and layouts, trees, several D, k beyond N, float64."""
    calls = [call(seed) for seed in range(150)]
    assert sum(clouds for clouds, _, _ in calls) > 1000
    assert {op for _, op, _ in calls} == {ops.knn, ops.ball_query}
    kwargs = [k for _, _, k in calls]
    assert {k["points"].shape[-1] for k in kwargs} == {1, 2, 3, 4, 7}
    assert {k["points"].dtype for k in kwargs} == {torch.float32, torch.float64}
    assert {"offsets" in k for k in kwargs} == {True, False}
    assert any(k.get("exclude_self") for k in kwargs)
    assert any("k_per_cloud" in k for k in kwargs)
    assert any(k["k"] > k["points"].shape[-2] for k in kwargs)
    assert any(k["points"].shape[-2] > 10_000 for k in kwargs)
