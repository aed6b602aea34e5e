"""The Triton passes of local_aggregate in training: in the interpreter on any machine, and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from local_aggregate_training import Step, train
from op_contract import Recorder, Sample, assert_same
from test_local_aggregate import make, make_unit

from any2point import ops, reference

# Products of torch may otherwise not be asked to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

TRAIN = torch.ops.any2point._local_aggregate_train.default
LOW = (torch.float16, torch.bfloat16)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_interpreted() -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    run = subprocess.run(
        [sys.executable, str(here / "local_aggregate_train_interpreted.py")],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def samples(sizes: tuple[int, ...], units: int, device: str = "cuda") -> dict[str, Any]:
    """B, N, S, K, C / 2 and H."""
    batch, n, s, k, width, hidden = sizes
    kwargs = make(batch, n, s, k, width, 0)
    generator = torch.Generator().manual_seed(k)
    kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i == 0) for i in range(units)]
    return Sample("", kwargs).to(device).kwargs


def fused(kwargs: dict[str, Any], *args: Any) -> Step:
    with Recorder() as recorder:
        step = train(ops.local_aggregate, kwargs, *args)
    assert TRAIN in [call[0] for call in recorder.calls], "the composition ran"
    return step


def flat(step: Step) -> dict[str, torch.Tensor]:
    return {"out": step.out} | step.gradients | step.statistics


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu() - want.cpu()).norm() / want.norm().clamp(min=1e-12))


def check(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Results are as near to float64 as torch's own in the same precision, within a factor of two.

    Errors of gradients are made of the few rows that are another maximum, or another side of a ReLU, than in
    float64: single ones scatter, all together less.
    """
    low = dtype if dtype in LOW else None
    given = kwargs | {"features": kwargs["features"].to(dtype).float()}
    want = flat(train(reference.local_aggregate, Sample("", given).to("cpu").kwargs, torch.float64))
    scale = 1024.0 if dtype == torch.float16 else 1.0
    plain = flat(train(reference.local_aggregate, given, torch.float32, low, scale))
    got = flat(fused(given, torch.float32, low, scale))
    note = f"{tuple(given['neighbor'].shape)} {dtype}"
    mine, other = ({name: error(x[name], exact) for name, exact in want.items()} for x in (got, plain))
    for name in want:
        loose = 4 if name.endswith(("weight", "bias", "features")) else 2
        limit = loose * other[name] + (1e-3 if low else 1e-5)
        assert mine[name] <= limit, f"{note} {name}: {mine[name]:.1e}, of plain PyTorch {other[name]:.1e}"
    finite = [name for name in want if torch.isfinite(plain[name]).all()]
    mine_, other_ = (sum(x[name] ** 2 for name in finite) ** 0.5 for x in (mine, other))
    assert mine_ <= 2 * other_ + 1e-5, f"{note}: {mine_:.1e}, of plain PyTorch {other_:.1e}"


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


SIZES = [
    ((2, 300, 100, 81, 96, 96), 2),
    ((2, 300, 100, 81, 192, 192), 1),
    ((2, 300, 100, 81, 384, 32), 1),
    ((2, 200, 90, 64, 48, 70), 2),
    ((3, 300, 170, 7, 17, 33), 1),
    ((2, 200, 90, 13, 5, 4), 3),
    ((1, 200, 80, 128, 24, 12), 1),
    ((1, 200, 64, 30, 100, 300), 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "units"), SIZES, ids=str)
def test_within_twice_the_error_of_torch(sizes: tuple[int, ...], units: int) -> None:
    kwargs = samples(sizes, units)
    kwargs["neighbor"][0, 2, 1:3] = -1
    kwargs["center"][-1, 4] = -1
    kwargs["neighbor"][-1, 4] = -1
    for dtype in (*LOW, torch.float32):
        for normalize, guard in (("scan", True), ("mn40", False)):
            check(kwargs | {"normalize": normalize, "guard": guard}, dtype)


@pytest.mark.gpu
def test_tf32_where_torch_allows_it(precision: str) -> None:
    check(samples((2, 300, 100, 81, 96, 96), 2), torch.float32)


@pytest.mark.gpu
def test_nan() -> None:
    """One NaN reaches everything through the statistics, as in the composition; no gradient crashes."""
    kwargs = samples((2, 40, 7, 13, 48, 70), 1)
    kwargs["points"][0, :, 2] = 0.25
    assert fused(kwargs, torch.float32).out.isfinite().all()
    assert fused(kwargs | {"guard": False}, torch.float32).out.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
def test_same_bits_on_every_run_stream_and_replay(dtype: torch.dtype) -> None:
    kwargs = samples((4, 300, 100, 27, 96, 96), 2)
    low = dtype if dtype in LOW else None
    want = fused(kwargs, torch.float32, low)
    torch.use_deterministic_algorithms(True)  # and fresh memory is NaN
    try:
        assert_same(flat(fused(kwargs, torch.float32, low)), flat(want))
    finally:
        torch.use_deterministic_algorithms(False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(flat(fused(kwargs, torch.float32, low)), flat(want), "second stream")
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.gpu
def test_graph_of_two_steps() -> None:
    kwargs = samples((4, 300, 100, 27, 96, 96), 2)
    kwargs["features"] = kwargs["features"].half().requires_grad_()
    unit = kwargs["units"][0]
    weights = [unit.in_weight.requires_grad_(), unit.out_weight.requires_grad_()]
    statistics = [x for unit in kwargs["units"] for x in (*unit.in_norm[2:], *unit.out_norm[2:])]

    def step() -> list[torch.Tensor]:
        out = ops.local_aggregate(**kwargs, training=True)
        return [
            out.detach(),
            *torch.autograd.grad(out.float().square().sum(), [kwargs["features"], *weights]),
        ]

    start = [x.clone() for x in statistics]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [x.clone() for _ in range(2) for x in step()][-4:] + [x.clone() for x in statistics]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for x, y in zip(statistics, start):
        x.copy_(y)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    assert_same([*got, *statistics], want, "replay")


@pytest.mark.gpu
def test_memory() -> None:
    kwargs = samples((16, 300, 256, 64, 96, 96), 1)
    kwargs["features"] = kwargs["features"].half()
    fused(kwargs, torch.float32, torch.float16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(kwargs, torch.float32, torch.float16)
    rows = 16 * 256 * 64
    limit = 4 * rows * 96 * 2 + 90e6
    assert torch.cuda.max_memory_allocated() - before < limit, "a float32 [B, S, K, C] would take 201 MB"
