"""Large neighbour searches and batches of samples by a number of threads; only when asked for:

    ANY2POINT_BENCH_THREADS=2 pytest benchmarks/test_threads.py -s --rows benchmarks/results/NAME.csv

All libraries run in turn, round by round. With one thread it is CPU time that counts, with more wall time:
then the machine must be quiet, and ours by one thread is measured too. Trees are built and queried in the
timed call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch

from any2point import ops
from any2point.bench import peers
from any2point.bench.cases import check_neighbors, check_samples
from any2point.bench.costs import cloud
from any2point.bench.table import Row, write_csv
from any2point.bench.timing import cpu, interleave

THREADS = int(os.environ.get("ANY2POINT_BENCH_THREADS", "0"))
OURS = "any2point"

pytestmark = [
    pytest.mark.skipif(THREADS < 1, reason="ANY2POINT_BENCH_THREADS is not set"),
    pytest.mark.timeout(1800),
]


def by_one_thread(function: Callable[[], Any]) -> Any:
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(THREADS)


def compare(
    op: str,
    shape: str,
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    request: Any,
    dtype: str = "float32",
) -> None:
    ours, mode = functions[OURS], f"forward, {THREADS} thread{'s' * (THREADS > 1)}"
    if THREADS > 1:
        functions = {**functions, f"{OURS}, one thread": lambda: by_one_thread(ours)}
    clock = time.process_time if THREADS == 1 else time.perf_counter
    times = interleave(functions, rounds=rounds, clock=clock)
    best = {name: min(values) for name, values in times.items()}
    mode += ", CPU time" if THREADS == 1 else ""
    print(f"\n{op} {shape}, {mode}")
    for name in sorted(best, key=best.__getitem__):
        print(f"  {best[name] * 1e3:10.3f} ms ({best[name] / best[OURS]:5.2f}x)  {name}")
    if path := request.config.getoption("--rows"):
        rows = [
            Row(op, name, shape, mode, dtype).times([1e6 * x for x in values])
            for name, values in times.items()
        ]
        for row in rows:
            row.command = f"ANY2POINT_BENCH_THREADS={THREADS} pytest benchmarks/test_threads.py"
        write_csv(path, [row.place(cpu()) for row in rows])
    assert all(best[OURS] <= seconds for seconds in best.values()), f"{op} {shape}: slower than another"


@pytest.mark.parametrize(
    ("kind", "rows", "dim", "dtype", "rounds"),
    [
        ("cube", 100_000, 3, torch.float32, 7),
        ("surface", 100_000, 3, torch.float32, 7),
        ("cube", 100_000, 3, torch.float64, 5),
        ("cube", 20_000, 6, torch.float32, 5),
        ("normals", 20_000, 6, torch.float32, 5),
        ("clusters", 100_000, 3, torch.float32, 5),
        ("cube", 1_000_000, 3, torch.float32, 3),
    ],
)
def test_knn(kind: str, rows: int, dim: int, dtype: torch.dtype, rounds: int, request: Any) -> None:
    """16 neighbours of every point. `normals`: of a surface; `clusters`: densities that differ by 10^12."""
    rng = np.random.default_rng(0)
    if kind == "normals":
        points = np.concatenate([cloud("surface", 1, rows)[0], cloud("surface", 1, rows)[0]], 1)
        points[:, 3:] /= np.linalg.norm(points[:, 3:], axis=1, keepdims=True)
    elif kind == "clusters":
        points = (rng.normal(size=(rows, 3)) * 10.0 ** rng.integers(-4, 1, (rows, 1))).astype(np.float32)
    else:
        points = rng.random((rows, dim), dtype=np.float32) if kind == "cube" else cloud(kind, 1, rows)[0]
    tensor = torch.from_numpy(points).to(dtype)[None]
    query, points = tensor.clone(), tensor[0].numpy()
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: ops.knn(query, tensor, 16)}
    index, distance = (x[0].numpy() for x in functions[OURS]())

    from pykdtree.kdtree import KDTree
    from scipy.spatial import cKDTree

    functions[f"scipy {version('scipy')} cKDTree"] = lambda: cKDTree(points).query(
        points, 16, workers=THREADS
    )
    functions[f"pykdtree {version('pykdtree')}"] = lambda: KDTree(points).query(points, 16)
    for name in list(functions)[1:]:
        other = functions[name]()
        check_neighbors(other[1], np.asarray(other[0], np.float64) ** 2, (index, distance))
    label = f"{kind} 1,{rows},{rows},16" + (f", D={dim}" if dim != 3 else "")
    compare("knn", label, functions, rounds, request, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize(
    ("batch", "rows", "samples", "rounds"),
    [(32, 1024, 512, 15), (16, 8192, 2048, 7), (4, 100_000, 25_000, 3)],
)
def test_farthest_point_sample(batch: int, rows: int, samples: int, rounds: int, request: Any) -> None:
    """A batch: fpsample takes one cloud at a time, from as many threads."""
    points = cloud("cube", batch, rows)
    tensor = torch.from_numpy(points)
    functions: dict[str, Callable[[], Any]] = {OURS: lambda: ops.farthest_point_sample(tensor, samples)}
    pool = ThreadPoolExecutor(THREADS)
    for name, sample in peers.samplers().items():
        if "kdline" not in name:
            continue  # the slower ones
        picks = sample(points[0], samples)
        same = ops.farthest_point_sample(tensor[:1], samples, start=int(picks[0]))[0]
        check_samples(picks, same, exact=False, match=0.99)
        call = lambda sample=sample: list(pool.map(lambda one: sample(one, samples), points))  # noqa: E731
        functions[name.replace("fpsample", f"fpsample {version('fpsample')}")] = call
    compare("farthest_point_sample", f"cube {batch},{rows},{samples}", functions, rounds, request)
