"""No op may become much slower than it is, measured as a ratio to the composition in torch, on one thread.

Ours and theirs run in turn and each one's quietest round counts, in CPU time of the process: what else the
machine does falls on both. The bounds are about half of what was measured, so that only a lost fast path
fails: a kernel no longer vectorised, a fused op back at its composition, an O(N^2) where a tree was.
"""

from __future__ import annotations

from typing import Any

import pytest

from any2point.bench import run
from any2point.bench.timing import interleave

pytestmark = pytest.mark.usefixtures("one_thread")

# op -> shape, the provider in torch, times faster at least: forward, and forward with backward
BOUNDS: dict[str, tuple[tuple[Any, ...], str, float, float]] = {
    "farthest_point_sample": ((1, 1024, 128), "torch loop", 50, 0),
    "farthest_point_hierarchy": ((1, 1024, (128, 64)), "torch loop", 50, 0),
    "knn": ((1, 256, 1024, 32), "torch cdist+topk", 12, 0),
    "ball_query": ((1, 256, 1024, 0.2, 32), "torch cdist+topk", 8, 0),
    "group": ((1, 1024, 96, 128, 32), "torch index", 1.6, 1.1),
    "interpolate": ((1, 128, 96, 1024, 3), "torch", 2, 1.7),
    "voxel_cluster": ((8, 128, 0.08), "torch unique", 1.0, 0),
    "segment_pool": ((4096, 96, 300), "torch", 0.8, 0.8),
    "virtual_project": ((4, 128, (77,), 192, 6), "torch", 10, 5),
    "local_aggregate": ((512, 128, 81, 96, 96, 1), "torch", 2.5, 1.2),
    "guided_aggregate": ((4, 128, 192, 6, 12, 39), "torch", 2, 2),
}


@pytest.mark.parametrize("op", BOUNDS)
def test_ratio(op: str) -> None:
    shape, name, forward, both = BOUNDS[op]
    make: Any = run.OPS[op]
    case = next(make("cpu", [shape]))
    ours, theirs = case.providers[0], next(p for p in case.providers if p.name == name)
    for mode, bound in (("forward", forward), ("both", both)):
        if not bound:
            continue
        calls = {p.name: run.calls_of(case, p, mode, p.run)[0] for p in (ours, theirs)}
        quietest = dict.fromkeys(calls, float("inf"))
        for _ in range(4):  # more rounds only where the first were not quiet enough
            times = interleave(calls, rounds=5, slice_seconds=0.005)
            quietest = {who: min(quietest[who], *values) for who, values in times.items()}
            ratio = quietest[name] / quietest["any2point"]
            if ratio > bound:
                break
        print(f"{op} {mode}: {ratio:.2f}x the speed of {name}, expected {bound:g}x")
        assert ratio > bound, f"{op} {mode}: {ratio:.2f}x the speed of {name}, expected {bound:g}x"
