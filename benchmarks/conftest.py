"""One thread for everybody, inputs, floors in `extra_info`, and a CSV of the rows (`--rows FILE`).

pytest benchmarks                                     # every suite that this machine can run
pytest benchmarks/bench_knn.py --rows benchmarks/results/NAME.csv
pytest benchmarks/test_claims.py -s                   # the claimed ratios, measured and asserted
"""

from __future__ import annotations

import functools
import os

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import that starts a pool
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common, peers

torch.set_num_threads(1)

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", default=None, help="folder with GPU peers (see benchmarks/peers.py)")
    parser.addoption("--rows", default=None, type=Path, help="add the measurements to this CSV")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def gpu_peer(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`gpu_peer(provider, op, ours, *inputs) -> (run, finish)`; skips where the peer or its op is missing."""

    def find(provider: str, op: str, ours: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
        if provider == "any2point":
            return functools.partial(ours, *inputs), lambda result: result
        found = peers.gpu_peers(request.config.getoption("--peers")).get(provider)
        if found is None or getattr(found, op) is None:
            pytest.skip(f"{provider} has no {op}" if found else f"{provider}: not given by --peers")
        peer = getattr(found, op)
        run = functools.partial(peer.run, *peer.prepare(*inputs))
        return run, lambda result: peer.finish(result, *inputs)

    return find


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., Any]:
    """`measure(function, op=..., provider=..., shape=..., mode=..., device=..., cost=...)`: one row."""

    def run(
        function: Callable[[], Any],
        *,
        op: str,
        provider: str,
        shape: str,
        cost: common.Cost,
        mode: str = "forward",
        device: str = "cpu",
        match: float | None = None,
    ) -> Any:
        machine = common.cpu() if device == "cpu" else common.gpu()
        floor, direct = cost.us(machine)
        benchmark.group = f"{op} {shape} {mode} {device}"
        benchmark.extra_info.update(
            op=op,
            provider=provider,
            shape=shape,
            mode=mode,
            bytes=cost.bytes,
            operations=cost.operations,
            floor_us=round(floor, 2),
            direct_us=round(direct, 2),
            match=match,
            machine=machine.device,
            simd=machine.simd,
            torch=machine.torch,
            kind=device,
        )
        call = function
        if device == "cuda":

            def call() -> Any:
                result = function()
                torch.cuda.synchronize()
                return result

        seconds = min(common._timed(call) for _ in range(3))
        rounds = int(np.clip(0.3 / max(seconds, 1e-9), 3, 2000))
        return benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=1)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    path, measured = session.config.getoption("--rows"), getattr(session.config, "_benchmarksession", None)
    if path is None or measured is None:
        return
    rows = []
    for bench in measured.benchmarks:
        info = bench.extra_info
        if "op" not in info:
            continue
        p20, p50, p80 = np.quantile(bench.stats.sorted_data, [0.2, 0.5, 0.8]) * 1e6
        row = common.Row(
            op=info["op"],
            provider=info["provider"],
            shape=info["shape"],
            mode=info["mode"],
            p20_us=float(p20),
            p50_us=float(p50),
            p80_us=float(p80),
            floor_us=info["floor_us"],
            direct_us=info["direct_us"],
            match=info["match"],
            command="pytest benchmarks",
        )
        rows.append(row.place(common.cpu() if info["kind"] == "cpu" else common.gpu()))
    if rows:
        common.write_rows(path, rows)
