"""local_aggregate in training that keeps no rows: as the normal mode, in chunks of clouds or in one."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from local_aggregate_training import Step, train
from neighbour_clouds import LEVELS, simd
from op_contract import Recorder, Sample, assert_same
from test_local_aggregate import make, make_unit
from torch import Tensor

from any2point import ops, reference
from any2point.ops import _local_aggregate_recompute
from any2point.ops._local_aggregate_train import backward
from any2point.reference.batch_norm import shared_statistics

TRAIN = torch.ops.any2point._local_aggregate_train.default
again = functools.partial(ops.local_aggregate, recompute=True)
# Channels, hidden channels and units that have kernels on sm_90
HOPPER = {192: (96, 2), 384: (192, 1), 768: (32, 1)}


def samples(k: int = 7, width: int = 12, hidden: int = 5, units: int = 2, batch: int = 5) -> dict[str, Any]:
    kwargs = make(batch, 29, 11, k, width, 0)
    generator = torch.Generator().manual_seed(k)
    kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i != 1) for i in range(units)]
    kwargs["neighbor"][0, 2, : k // 2] = -1
    kwargs["neighbor"][1, 3] = kwargs["center"][1, 3] = -1
    return kwargs


def flat(step: Step) -> dict[str, Tensor]:
    return {"out": step.out} | step.gradients | step.statistics


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp(min=1e-3))


@pytest.fixture(params=[1, 30_000])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one cloud, or of some."""
    monkeypatch.setattr(_local_aggregate_recompute, "ROOM", request.param)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("k", "width", "hidden", "units"), [(5, 6, 4, 1), (1, 12, 5, 2), (6, 17, 33, 1), (13, 8, 20, 4)]
)
def test_in_chunks(level: str, k: int, width: int, hidden: int, units: int) -> None:
    for normalize, guard in (("scan", True), ("mn40", False)):
        kwargs = samples(k, width, hidden, units) | {"normalize": normalize, "guard": guard}
        with simd(level):
            got = flat(train(again, kwargs, torch.float32))
        for name, want in flat(train(reference.local_aggregate, kwargs, torch.float64)).items():
            assert error(got[name], want) < 3e-5, f"{normalize}: {name}"


def test_small_and_in_the_composition() -> None:
    """There the same bits as without, running statistics included."""
    for dtype in (torch.float32, torch.float64):
        kwargs = samples()
        assert_same(flat(train(again, kwargs, dtype)), flat(train(ops.local_aggregate, kwargs, dtype)))


def kept(function: Any, kwargs: dict[str, Any]) -> int:
    """Bytes that are held between forward and backward."""
    sizes: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    kwargs["features"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(**kwargs, training=True)
    del out
    return sum(sizes.values())


def test_keeps_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_local_aggregate_recompute, "ROOM", 1)
    for dtype in (torch.float32, torch.float64):
        kwargs = samples(k=60)
        kwargs["features"] = kwargs["features"].to(dtype)
        rows = kwargs["neighbor"].numel() * kwargs["features"].element_size()
        assert kept(again, kwargs) < kwargs["neighbor"].nbytes + 5 * rows
        assert kept(ops.local_aggregate, kwargs) > 2 * 5 * rows


@pytest.mark.usefixtures("chunked")
def test_gradcheck_and_second_derivatives() -> None:
    """In float64 the composition; kernels differentiate once."""
    kwargs = samples(k=3, width=3, hidden=4, units=1, batch=2)
    kwargs["units"] = [
        unit._replace(
            in_weight=unit.in_weight.double(),
            in_bias=None,
            in_norm=type(unit.in_norm)(*(x.double() for x in unit.in_norm)),
            out_weight=unit.out_weight.double(),
            out_bias=None,
            out_norm=type(unit.out_norm)(*(x.double() for x in unit.out_norm)),
        )
        for unit in kwargs["units"]
    ]
    features = kwargs["features"].double().requires_grad_()
    weight = kwargs["units"][0].in_weight.requires_grad_()

    def step(features: Tensor, weight: Tensor) -> Tensor:
        units = [kwargs["units"][0]._replace(in_weight=weight)]
        return again(**(kwargs | {"features": features, "units": units}), training=True)

    assert torch.autograd.gradcheck(step, (features, weight))
    kwargs = samples()
    kwargs["features"].requires_grad_()
    out = again(**kwargs, training=True)
    (grad,) = torch.autograd.grad(out.square().sum(), kwargs["features"], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


@pytest.mark.usefixtures("chunked")
def test_opcheck_and_compiled() -> None:
    kwargs = samples(batch=3)
    with Recorder() as recorder:
        again(**kwargs, training=True)
    (call,) = [call for call in recorder.calls if call[0] is TRAIN]
    torch.library.opcheck(*call)
    kwargs["features"].requires_grad_()

    def step(function: Any) -> tuple[Tensor, Tensor]:
        out = function(**kwargs, training=True)
        return out.detach(), torch.autograd.grad(out.square().sum(), kwargs["features"])[0]

    with Recorder() as recorder:
        want = step(again)
    (call,) = [call for call in recorder.calls if call[0] is backward._opoverload]
    torch.library.opcheck(*torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, call))
    got = step(torch.compile(again, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("chunked")
def test_statistics_of_processes() -> None:
    """Two processes with the same rows; sums are shared as often however many chunks there are."""
    calls = []

    def twice(x: Tensor) -> Tensor:
        calls.append(x.numel())
        return 2 * x

    kwargs = samples()
    want = flat(train(again, kwargs, torch.float32))
    with shared_statistics(twice):
        got = flat(train(again, kwargs, torch.float32))
        count = len(calls)
        train(ops.local_aggregate, kwargs, torch.float32)
    assert len(calls) == 2 * count
    for name, value in want.items():
        if "var" not in name:
            assert error(got[name], value) < 1e-4, name


def test_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = samples(batch=7)
    monkeypatch.setattr(_local_aggregate_recompute, "ROOM", 30_000)
    want = train(again, kwargs, torch.float32)
    threads = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_same(flat(train(again, kwargs, torch.float32)), flat(want))
    finally:
        torch.set_num_threads(threads)


def on_hopper(width: int, dtype: torch.dtype, sizes: tuple[int, ...] = (5, 300, 100, 27)) -> dict[str, Any]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    hidden, units = HOPPER[width]
    kwargs = make(*sizes, width // 2, 0)
    generator = torch.Generator().manual_seed(1)
    kwargs["units"] = [make_unit(width, hidden, generator, bias=i == 0) for i in range(units)]
    kwargs["features"] = kwargs["features"].to(dtype).float()
    kwargs["neighbor"][0, 2, 1:3] = -1
    kwargs["neighbor"][-1, 4] = kwargs["center"][-1, 4] = -1
    return Sample("", kwargs).to("cuda").kwargs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", HOPPER)
def test_on_hopper(width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float64 as the normal mode; the same bits where rows fit, and on every run."""
    # With few points the gradient of their features takes the place of that of the result.
    kwargs = on_hopper(width, dtype, (5, 150 if dtype == torch.float16 else 300, 100, 27))
    features = None if dtype == torch.float32 else dtype
    kwargs |= {"operand_dtype": torch.float16 if features is None else None}
    scale = 32.0 if dtype == torch.float16 else 1.0
    normal = flat(train(ops.local_aggregate, kwargs, torch.float32, features, scale))
    whole = flat(train(again, kwargs, torch.float32, features, scale))
    assert_same(whole, normal)
    monkeypatch.setattr(_local_aggregate_recompute, "ROOM", 500_000 if width == 768 else 3 << 20)
    with Recorder() as recorder:
        got = flat(train(again, kwargs, torch.float32, features, scale))
    assert TRAIN in [call[0] for call in recorder.calls], "the composition ran"
    assert_same(flat(train(again, kwargs, torch.float32, features, scale)), got)
    exact = {name: value for name, value in kwargs.items() if name != "operand_dtype"}
    want = flat(train(reference.local_aggregate, exact, torch.float64))
    found = {name: (error(x, want[name]), error(normal[name], want[name])) for name, x in got.items()}
    text = ", ".join(f"{name} {mine:.1e} ({other:.1e})" for name, (mine, other) in found.items())
    print(f"{width} {dtype}: {text}")
    bad = [name for name, (mine, other) in found.items() if not mine <= 1.25 * other + 2e-5]
    assert not bad, f"{bad} of {text}"


@pytest.mark.gpu
@pytest.mark.parametrize("width", HOPPER)
def test_statistics_of_processes_on_hopper(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kwargs = on_hopper(width, torch.float16)
    with shared_statistics(lambda x: 2 * x):
        normal = flat(train(ops.local_aggregate, kwargs, torch.float32, torch.float16, 32.0))
        monkeypatch.setattr(_local_aggregate_recompute, "ROOM", 500_000)
        got = flat(train(again, kwargs, torch.float32, torch.float16, 32.0))
    bad = {name: error(x, normal[name]) for name, x in got.items() if not error(x, normal[name]) < 2e-2}
    assert not bad


@pytest.mark.gpu
def test_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_local_aggregate_recompute, "ROOM", 3 << 20)
    kwargs = on_hopper(192, torch.float16)
    kwargs["features"] = kwargs["features"].half().requires_grad_()
    weight = kwargs["units"][1].in_weight.requires_grad_()

    def step() -> list[Tensor]:
        out = again(**kwargs, training=True)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [kwargs["features"], weight])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        want = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want, "replay")


@pytest.mark.gpu
def test_memory() -> None:
    """[M, H] once, chunks of rows and what is not rows."""
    kwargs = on_hopper(192, torch.float16, (24, 1024, 512, 81))
    kwargs["features"] = kwargs["features"].half().requires_grad_()

    def step() -> None:
        out = again(**kwargs, training=True)
        torch.autograd.grad(out.float().square().sum(), kwargs["features"])

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    hidden = kwargs["neighbor"].numel() * 96 * 2
    assert torch.cuda.max_memory_allocated() - before < hidden + 2 * _local_aggregate_recompute.ROOM + 50e6
