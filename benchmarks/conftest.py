"""One thread for everybody, floors in `extra_info`, and a CSV of the rows (`--rows FILE`).

pytest benchmarks                                     # every suite that this machine can run
pytest benchmarks/bench_knn.py --rows benchmarks/results/NAME.csv
pytest benchmarks/test_claims.py -s                   # the claimed ratios, measured and asserted
"""

from __future__ import annotations

import os

# One for everybody, unless asked (test_threads.py); before the first import that starts a pool.
os.environ["OMP_NUM_THREADS"] = os.environ.get("ANY2POINT_BENCH_THREADS", "1")
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from any2point.bench import run, timing
from any2point.bench.table import Row, write_csv
from benchmarks import suites

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", default=None, help="folder with GPU peers (see any2point/bench/peers.py)")
    parser.addoption("--rows", default=None, type=Path, help="add the measurements to this CSV")
    parser.addoption("--compile", action="store_true", help="measure torch.compile on CPUs, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.module, "OP", None)
    if op is None or "provider" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    for_cpu = suites.parameters(op, "cpu", None, option("--compile"))
    for_gpu = suites.parameters(op, "cuda", option("--peers"), True)
    metafunc.parametrize(("op", "device", "shape", "provider", "mode"), for_cpu + for_gpu)


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measure(op, device, shape, provider, mode)`: checks, then times, then notes a row."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.skip("needs pytest-benchmark: pip install 'any2point[bench]'")
    benchmark = request.getfixturevalue("benchmark")

    def time(op: str, device: str, shape: str, name: str, mode: str) -> None:
        folder = request.config.getoption("--peers") if device == "cuda" else None
        case, provider, match, wrong = suites.checked(op, device, folder, shape, name)
        if wrong and not name.startswith("any2point"):
            pytest.skip(f"{name}: {wrong}")
        assert not wrong, f"{name}: {wrong}"
        machine = timing.machine_of(device)
        row = Row(op, name, shape, run.MODES.get(mode, mode), match=match, command="pytest benchmarks")
        row.floor_us, row.direct_us = case.floor(machine, mode)
        benchmark.group = f"{op} {shape} {row.mode} {device}"
        with timing.products(case.precision):
            calls = run.calls_of(case, provider, mode, provider.run)
            row.mem_mb = timing.peak(calls[0], device)
            rows = [row]
            if device == "cuda":
                row.times(timing.event_times(calls, warmup=0.5, seconds=0.2))
                if provider.graph is not None and mode != "backward":
                    rows += _replayed(case, provider, mode, row)
            call = calls[0]
            if device == "cuda":

                def call() -> None:
                    calls[0]()
                    torch.cuda.synchronize()

            seconds = min(timing.timed(call) for _ in range(3))
            rounds = int(np.clip(0.3 / max(seconds, 1e-9), 3, 2000))
            benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)
        if device == "cpu":
            row.times([1e6 * each for each in benchmark.stats.stats.sorted_data])
        benchmark.extra_info["rows"] = [asdict(each.place(machine)) for each in rows]

    return time


def _replayed(case: Any, provider: Any, mode: str, row: Row) -> list[Row]:
    """The row of a CUDA graph, if the provider can be captured."""
    try:
        calls = run.calls_of(case, provider, mode, provider.graph)
        times = timing.graph_times(calls, timing.Settings())
    except (RuntimeError, AssertionError):
        torch.cuda.synchronize()
        return []
    other = Row(row.op, row.provider, row.shape, f"{row.mode} graph", match=row.match, mem_mb=row.mem_mb)
    other.floor_us, other.direct_us, other.command = row.floor_us, row.direct_us, row.command
    return [other.times(times)]


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, measured = session.config.getoption("--rows"), getattr(session.config, "_benchmarksession", None)
    if path is None or measured is None:
        return
    rows = [Row(**row) for bench in measured.benchmarks for row in bench.extra_info.get("rows", ())]
    if rows:
        write_csv(path, rows)
