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

__all__ = ["farthest_point_sample"]


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
