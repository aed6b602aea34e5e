"""What benchmarks/gpu.py can measure: the cases of `any2point bench` on CUDA, with the peers of `--peers`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from any2point.bench.cases import Case
from any2point.bench.run import OPS, op_cases

_SHORT = {"farthest_point_sample": "fps", "farthest_point_hierarchy": "hierarchy"}


def _made(op: str, folder: str | None) -> Iterator[Case]:
    return op_cases([op], "cuda", folder=folder)


# what `--only` takes -> its cases, given the folder of the peers
KINDS: dict[str, Callable[[str | None], Iterator[Case]]] = {
    _SHORT.get(op, op): partial(_made, op) for op in OPS
}
