"""Kernels of local_aggregate in evaluation: Triton's in the interpreter on any machine, and all on a GPU."""

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
from op_contract import Recorder, Sample, assert_same, assert_within_twice
from test_local_aggregate import make, make_unit

from any2point import ops, reference

KERNEL = torch.ops.any2point._local_aggregate.default
LOW = (torch.float16, torch.bfloat16)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
@pytest.mark.parametrize(
    "name", ["interpreted", "residual_interpreted", "train_interpreted", "train_compiled"]
)
def test_without_a_gpu(name: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    options = {"TRITON_INTERPRET": "1"} if "interpreted" in name else {"TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(here / f"local_aggregate_{name}.py")],
        env=os.environ | options | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
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


def fused(kwargs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad(), Recorder() as recorder:
        out = ops.local_aggregate(**kwargs)
    assert KERNEL in [call[0] for call in recorder.calls], "the composition ran"
    return out


def check(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    given = kwargs | {"features": kwargs["features"].to(dtype)}
    exact = Sample("", given).to("cpu").to(torch.float64).kwargs
    want = reference.local_aggregate(**exact)
    with torch.autocast("cuda", dtype=dtype, enabled=dtype in LOW):
        plain = reference.local_aggregate(**given)
    got = fused(given)
    assert got.dtype == dtype
    shape = tuple(given["neighbor"].shape)
    assert_within_twice(got, plain, want, f"{shape}, {dtype}")


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


SIZES = [
    ((2, 100, 17, 81, 96, 96), 2),
    ((2, 100, 16, 81, 192, 192), 1),  # points in shared memory on their way to the rows
    ((2, 100, 17, 81, 384, 32), 1),
    ((1, 70, 9, 64, 96, 96), 2),
    ((16, 300, 257, 20, 96, 96), 2),
    ((2, 60, 9, 5, 192, 192), 1),
    ((3, 60, 40, 1, 384, 32), 1),
    ((1, 200, 3, 200, 384, 32), 1),  # a group's rows in several warps
    ((3, 40, 7, 1, 17, 33), 1),
    ((2, 40, 7, 3, 5, 4), 3),
    ((2, 40, 7, 13, 48, 70), 2),
    ((1, 200, 5, 128, 24, 12), 1),
    ((1, 200, 3, 130, 100, 300), 1),
    ((2, 40, 7, 6, 1, 2), 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("sizes", "units"), SIZES, ids=str)
def test_within_twice_the_error_of_torch(sizes: tuple[int, ...], units: int) -> None:
    kwargs = samples(sizes, units)
    for dtype in (*LOW, torch.float32):
        for normalize, guard in (("scan", True), ("mn40", True), ("mn40", False)):
            check(kwargs | {"normalize": normalize, "guard": guard}, dtype)


@pytest.mark.gpu
def test_tf32_where_torch_allows_it(precision: str) -> None:
    check(samples((2, 100, 17, 81, 96, 96), 2), torch.float32)
    check(samples((2, 40, 7, 13, 48, 70), 2), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2, 40, 7, 13, 48, 70), (2, 40, 7, 13, 96, 96)], ids=str)
def test_missing_neighbours_nan_and_flat_groups(sizes: tuple[int, ...]) -> None:
    for dtype in (*LOW, torch.float32):
        kwargs = samples(sizes, 2)
        kwargs["neighbor"][0, 2, 1:3] = -1
        kwargs["center"][1, 4] = -1
        kwargs["neighbor"][1, 4] = -1
        kwargs["points"][0, :, 2] = 0.25
        check(kwargs, dtype)
        kwargs["features"] = kwargs["features"].to(dtype)
        official = fused(kwargs | {"guard": False})
        assert official[0].isnan().all()
        assert not official[1, :4].isnan().any()
        row = kwargs["neighbor"][1, 2, 5]
        kwargs["features"][1, row, 3] = torch.nan
        hit = (kwargs["neighbor"] == row).any(-1) | (kwargs["center"] == row)
        got = fused(kwargs)
        assert torch.equal(got[1].isnan().all(-1), hit[1])
        assert torch.equal(got[1].isnan().any(-1), hit[1])
        kwargs["points"][0, kwargs["neighbor"][0, 0, 3], 1] = torch.inf
        assert fused(kwargs)[0, 0].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((2, 40, 7, 13, 48, 70), torch.float32),
        ((2, 40, 8, 13, 192, 192), torch.float16),
        ((2, 40, 7, 13, 384, 32), torch.bfloat16),
    ],
    ids=str,
)
def test_index_outside_of_the_cloud_is_nan(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    kwargs = samples(sizes, 1)
    kwargs["features"] = kwargs["features"].to(dtype)
    want = fused(kwargs)
    kwargs["neighbor"][1, 3, 2] = 40
    kwargs["center"][0, 2] = 1 << 40
    got = fused(kwargs)
    wrong = torch.zeros(sizes[0], sizes[2], dtype=torch.bool, device="cuda")
    wrong[1, 3] = wrong[0, 2] = True
    assert torch.equal(got.isnan().all(-1), wrong)
    assert_same(got[~wrong], want[~wrong])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*LOW, torch.float32], ids=str)
def test_same_bits_on_every_run_stream_and_replay(dtype: torch.dtype) -> None:
    kwargs = samples((4, 300, 100, 81, 96, 96), 2)
    kwargs["features"] = kwargs["features"].to(dtype)
    want = fused(kwargs)
    torch.use_deterministic_algorithms(True)  # and fresh memory is NaN
    try:
        assert_same(fused(kwargs), want)
    finally:
        torch.use_deterministic_algorithms(False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert_same(fused(kwargs), want, "second stream")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        got = ops.local_aggregate(**kwargs)
    got.fill_(torch.nan)
    graph.replay()
    assert_same(got, want, "replay")
    small = kwargs | {"center": kwargs["center"].int(), "neighbor": kwargs["neighbor"].int()}
    small["features"] = kwargs["features"].mT.contiguous().mT
    assert_same(fused(small), want, "strides")
    alone = kwargs | {name: kwargs[name][1:2] for name in ("points", "features", "center", "neighbor")}
    assert_same(fused(alone), want[1:2], "one cloud alone")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(
    ("sizes", "units"),
    [
        ((3, 100, 9, 81, 96, 96), 2),
        ((3, 100, 9, 81, 192, 192), 1),
        ((3, 100, 9, 81, 384, 32), 1),
        ((2, 70, 33, 20, 96, 96), 2),
        ((2, 70, 33, 20, 192, 192), 1),
        ((2, 70, 33, 20, 384, 32), 1),
    ],
    ids=str,
)
def test_same_bits_whatever_was_in_memory(sizes: tuple[int, ...], units: int, dtype: torch.dtype) -> None:
    """Fresh memory holds NaN, large numbers or what the last run left there."""
    kwargs = samples(sizes, units)
    kwargs["features"] = kwargs["features"].to(dtype)
    kwargs["neighbor"][0, 3, -2:] = -1
    want = fused(kwargs)
    assert want.isfinite().all()
    for i in range(60):
        if i % 3:
            rubbish = torch.full((1 << 23,), torch.nan if i % 3 == 1 else 3e38, device="cuda")
            del rubbish
        assert_same(fused(kwargs), want, f"run {i}")


@pytest.mark.gpu
def test_large_batch_equals_its_clouds() -> None:
    """More rows than one launch takes, and groups that launches share."""
    kwargs = samples((40, 300, 257, 81, 192, 192), 1)
    kwargs["features"] = kwargs["features"].half()
    whole = fused(kwargs)
    for i in (0, 19, 20, 39):
        names = ("points", "features", "center", "neighbor")
        assert_same(fused(kwargs | {name: kwargs[name][i : i + 1] for name in names}), whole[i : i + 1])


@pytest.mark.gpu
def test_empty_compiled_and_autocast() -> None:
    kwargs = samples((2, 40, 7, 13, 48, 70), 1)
    empty = kwargs | {name: kwargs[name][:0] for name in ("points", "features", "center", "neighbor")}
    assert fused(empty).shape == (0, 7, 96)
    empty = kwargs | {name: kwargs[name][:, :0] for name in ("center", "neighbor")}
    assert fused(empty).shape == (2, 0, 96)
    with torch.no_grad():
        want = ops.local_aggregate(**kwargs)
        compiled = torch.compile(lambda kw: ops.local_aggregate(**kw), fullgraph=True)
        # Inductor has its own power for the wavelengths.
        torch.testing.assert_close(compiled(kwargs), want, rtol=1e-4, atol=1e-4)
    half = kwargs | {"features": kwargs["features"].bfloat16()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_same(fused(kwargs), fused(half))
        assert fused(kwargs).dtype == torch.bfloat16


@pytest.mark.gpu
def test_memory() -> None:
    kwargs = samples((8, 300, 128, 64, 96, 96), 2)
    kwargs["features"] = kwargs["features"].half()
    fused(kwargs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(kwargs)
    assert torch.cuda.max_memory_allocated() - before < 16e6, "a tensor [B, S, K, C] would take 25 MB"
