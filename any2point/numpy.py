"""The ops for NumPy arrays, one cloud at a time, on the CPU, without torch: for data-loader workers."""

from __future__ import annotations

from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

try:
    from any2point import _numpy
except ImportError as error:
    raise ImportError(
        f"any2point.numpy: its compiled module is missing ({error}); build it with "
        "`pip install --no-build-isolation .` in a checkout (see `any2point info`)"
    ) from None

__all__ = ["ball_query", "farthest_point_sample", "knn"]


@overload
def farthest_point_sample(
    points: NDArray[np.floating], num_samples: int, *, start: int = 0, return_distance: Literal[False] = False
) -> NDArray[np.int64]: ...
@overload
def farthest_point_sample(
    points: NDArray[np.floating], num_samples: int, *, start: int = 0, return_distance: Literal[True]
) -> tuple[NDArray[np.int64], NDArray[np.floating]]: ...
def farthest_point_sample(
    points: NDArray[np.floating],
    num_samples: int,
    *,
    start: int = 0,
    return_distance: bool = False,
) -> NDArray[np.int64] | tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Pick points so that each is the farthest from all picked before.

    The same picks as :func:`any2point.ops.farthest_point_sample`, which says it all; one thread, and Python's
    lock is released meanwhile.

    Args:
        points: ``[N, D]`` float16, float32 or float64.
        num_samples: M, at least 0.
        start: The first pick. One that is outside of the cloud or not finite gives way to the lowest finite
            point.
        return_distance: Also return the distances.

    Returns:
        index ``[M]`` int64, or ``(index, distance)``: distance ``[M]`` is the squared distance of each pick
        to the picks before it, +inf for the first. With fewer than M finite points the rest is -1, with 0.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape or a value is wrong.

    Deterministic: yes.
    Complexity: O(M N D) work; with D = 2 or 3 large clouds are pruned by blocks.

    Example:
        >>> farthest_point_sample(np.float32([[0, 0, 0], [1, 0, 0], [3, 0, 0]]), 2)
        array([0, 2])
    """
    coordinates = _points("points", points)
    samples, first = _integer("num_samples", num_samples), _integer("start", start)
    index, distance = _numpy.farthest_point_sample(coordinates, samples, first)
    return (index, distance) if return_distance else index


def knn(
    query: NDArray[np.floating], points: NDArray[np.floating], k: int, *, sorted: bool = True
) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """The k nearest points of every query.

    The same neighbours as :func:`any2point.ops.knn`, which says it all; one thread, and Python's lock is
    released meanwhile.

    Args:
        query: ``[Q, D]`` float16, float32 or float64.
        points: ``[N, D]`` of the same dtype.
        k: Neighbours per query, at least 0; more than there are points is legal.
        sorted: By (distance, index); False: by index.

    Returns:
        ``(index, distance)``, each ``[Q, k]``: index int64, distance squared. Missing ones at the end are
        index -1, distance +inf.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape or a value is wrong.

    Deterministic: yes.
    Complexity: O(Q N D) work; large clouds go through a tree.

    Example:
        >>> knn(np.float32([[0, 0]]), np.float32([[3, 0], [1, 0], [2, 0]]), 2)
        (array([[1, 2]]), array([[1., 4.]], dtype=float32))
    """
    queries, coordinates = _pair(query, points)
    return _numpy.knn(queries, coordinates, _integer("k", k), bool(sorted))


def ball_query(
    query: NDArray[np.floating],
    points: NDArray[np.floating],
    radius: float,
    k: int,
    *,
    mode: Literal["nearest", "first"] = "nearest",
) -> tuple[NDArray[np.int64], NDArray[np.floating], NDArray[np.int64]]:
    """Up to k points that are closer to a query than `radius`.

    The same neighbours as :func:`any2point.ops.ball_query`, which says it all; one thread, and Python's lock
    is released meanwhile.

    Args:
        query: ``[Q, D]`` float16, float32 or float64.
        points: ``[N, D]`` of the same dtype.
        radius: More than 0; may be infinite.
        k: Most neighbours per query, at least 0.
        mode: ``"nearest"``: the k nearest, by (distance, index); ``"first"``: the k of lowest index.

    Returns:
        ``(index, distance, count)``: index and distance ``[Q, k]`` as in :func:`knn`, count ``[Q]`` int64.

    Raises:
        TypeError: A dtype or a type is wrong.
        ValueError: A shape or a value is wrong.

    Deterministic: yes.
    Complexity: that of :func:`knn`; ``"first"`` stops at the k-th hit.

    Example:
        >>> ball_query(np.float32([[0, 0]]), np.float32([[3, 0], [1, 0], [2, 0]]), 2.5, 3)[0]
        array([[ 1,  2, -1]])
    """
    queries, coordinates = _pair(query, points)
    if isinstance(radius, bool) or not isinstance(radius, (int, float, np.integer, np.floating)):
        raise TypeError(f"radius: expected a float, got {type(radius).__name__}")
    if not radius > 0:
        raise ValueError(f"radius: expected more than 0, got {radius}")
    if mode not in ("nearest", "first"):
        raise ValueError(f'mode: expected "nearest" or "first", got {mode!r}')
    return _numpy.ball_query(queries, coordinates, float(radius), _integer("k", k), mode == "nearest")


def _pair(query: object, points: object) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    queries, coordinates = _points("query", query), _points("points", points)
    if queries.dtype != coordinates.dtype:
        raise TypeError(f"query: expected {coordinates.dtype} like `points`, got {queries.dtype}")
    if queries.shape[1] != coordinates.shape[1]:
        raise ValueError(
            f"query: expected D = {coordinates.shape[1]} like `points`, got shape {list(queries.shape)}"
        )
    return queries, coordinates


def _points(name: str, value: object) -> NDArray[np.floating]:
    """``[N, D]``, contiguous, float32 or float64 (float16 is raised to float32, which is exact)."""
    array = np.asarray(value)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise TypeError(f"{name}: expected float16, float32 or float64, got {array.dtype}")
    if array.ndim != 2 or array.shape[1] < 1:
        raise ValueError(f"{name}: expected shape [N, D] with D >= 1, got {list(array.shape)}")
    dtype = np.float64 if array.dtype == np.float64 else np.float32
    return np.ascontiguousarray(array, dtype=dtype)


def _integer(name: str, value: object, at_least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    return int(value)
