"""Lines and images around a cloud: directions and rotations, spread evenly or given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Euler angles in degrees of the six views of the official code.
OFFICIAL_ANGLES = ((0, 0, 90), (90, 0, 90), (180, 0, 90), (270, 0, 90), (0, -90, 90), (0, 90, 90))


def given_lines(lines: Sequence[Sequence[float]]) -> Tensor:
    """Unit directions `[V, 3]` of V lines.

    Args:
        lines: directions, triples of any length but zero.

    Raises:
        ValueError: a direction is zero, or not three finite numbers.
    """
    rows = []
    for line in _triples(lines, "lines", "directions of three numbers, not all zero"):
        length = math.hypot(*line)
        if not 0 < length < math.inf:
            raise ValueError(f"`lines`: expected directions of three numbers, not all zero, got {line}")
        rows.append([x / length for x in line])
    return torch.tensor(rows)


def _triples(rows: Sequence[Sequence[float]], name: str, what: str) -> list[list[float]]:
    try:
        triples = [[float(x) for x in row] for row in rows]
    except (TypeError, ValueError):
        raise ValueError(f"`{name}`: expected {what}, got {rows!r}") from None
    for triple in triples:
        if len(triple) != 3 or not all(map(math.isfinite, triple)):
            raise ValueError(f"`{name}`: expected {what}, got {triple}")
    if not triples:
        raise ValueError(f"`{name}`: expected {what}, got none")
    return triples


def _check_views(views: object) -> None:
    if isinstance(views, bool) or not isinstance(views, int) or views < 1:
        raise ValueError(f"`views`: expected a positive integer, got {views!r}")


def spread_lines(views: int) -> Tensor:
    """Directions `[V, 3]` of V distinct lines, evenly spread over the half sphere.

    Three are the axes, six the diagonals of an icosahedron, which is the most even choice there is; any other
    number follows a Fibonacci lattice.
    """
    _check_views(views)
    if views == 3:
        return torch.eye(3)
    if views == 6:
        golden = (1 + math.sqrt(5)) / 2
        pairs = torch.tensor([[0, 1, golden], [0, 1, -golden]]) / math.sqrt(1 + golden * golden)
        return torch.cat([pairs.roll(shift, 1) for shift in range(3)])
    turn = math.pi * (3 - math.sqrt(5))
    lines = []
    for i in range(views):
        height = (i + 0.5) / views
        radius = math.sqrt(1 - height * height)
        lines.append((radius * math.cos(turn * i), height, radius * math.sin(turn * i)))
    return torch.tensor(lines)


def euler_rotations(angles: Sequence[Sequence[float]]) -> Tensor:
    """Rotations `[V, 3, 3]`, applied from the right (`p' = p R`), with `R = (Rx Ry Rz)^T`.

    The third axis of `p'` is the line of sight. Multiples of 90 degrees give exact entries.

    Args:
        angles: x, y, z in degrees, V triples.

    Raises:
        ValueError: not three finite numbers.
    """
    rotations = []
    for triple in _triples(angles, "rotations", "three angles in degrees"):
        matrix = torch.eye(3, dtype=torch.float64)
        for axis, angle in enumerate(triple):
            cosine, sine = _cosine(angle), _cosine(angle - 90)
            a, b = (axis + 1) % 3, (axis + 2) % 3
            turn = torch.eye(3, dtype=torch.float64)
            turn[a, a], turn[a, b], turn[b, a], turn[b, b] = cosine, -sine, sine, cosine
            matrix = matrix @ turn
        rotations.append(matrix.T)
    return torch.stack(rotations).float()


def _cosine(degrees: float) -> float:
    quarters, rest = divmod(degrees % 360, 90)
    return (1.0, 0.0, -1.0, 0.0)[int(quarters)] if rest == 0 else math.cos(math.radians(degrees))


def official_rotations() -> Tensor:
    """The six rotations `[6, 3, 3]` of the official code, applied from the right, with exact entries."""
    return euler_rotations(OFFICIAL_ANGLES)


def spread_rotations(views: int) -> Tensor:
    """Rotations `[V, 3, 3]` with lines of sight (the third axis) spread over the sphere; six: along axes."""
    _check_views(views)
    if views == 6:
        return official_rotations()
    turn = math.pi * (3 - math.sqrt(5))
    rotations = []
    for i in range(views):
        height = 1 - 2 * (i + 0.5) / views
        radius = math.sqrt(1 - height * height)
        sight = torch.tensor([radius * math.cos(turn * i), height, radius * math.sin(turn * i)])
        right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]), sight)
        right = right / torch.linalg.vector_norm(right)
        rotations.append(torch.stack([right, torch.linalg.cross(sight, right), sight], dim=1))
    return torch.stack(rotations)
