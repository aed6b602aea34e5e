"""Kernels of local_aggregate in training on sm_90a: every pass against the CPU's, and whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from local_aggregate_training import Step, train
from op_contract import Recorder, Sample, assert_same
from poison import poison
from test_local_aggregate import make, make_unit
from torch import Tensor

from any2point import ops, reference
from any2point.ops._local_aggregate_passes import CudaPasses, Passes, Unit
from any2point.ops._local_aggregate_train import _entries
from any2point.reference.batch_norm import shared_statistics
from any2point.reference.local_aggregate import wavelengths

TRAIN = torch.ops.any2point._local_aggregate_train.default
LOW = (torch.float16, torch.bfloat16)
HIDDEN = {192: (96, 2), 384: (192, 1), 768: (32, 1)}
# B, N, S, K
SIZES = [
    (2, 100, 17, 81),
    (1, 70, 9, 64),
    (3, 40, 7, 16),
    (2, 200, 33, 100),
    (1, 60, 11, 1),
    (16, 300, 257, 20),
]


@pytest.fixture(autouse=True)
def sm90() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().norm().clamp(min=1e-30))


def rows(sizes: tuple[int, ...], width: int, dtype: torch.dtype, divided: bool) -> tuple[Any, ...]:
    b, n, s, k = sizes
    generator = torch.Generator().manual_seed(k)
    center = torch.randint(0, n, (b, s), generator=generator)
    neighbor = torch.randint(0, n, (b, s, k), generator=generator)
    neighbor.view(-1)[::17] = -1
    center.view(-1)[-1] = -1
    points = torch.rand(b, n, 3, generator=generator)
    features = torch.randn(b, n, width // 2, generator=generator).to(dtype)
    divisor = torch.rand(b, generator=generator) + 0.1 if divided else None
    return points, features, center, neighbor, divisor, wavelengths(width, 1000.0, like=points), 100.0, True


def cuda(values: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, values)


def single(values: Any) -> Any:
    """In float32 on the CPU."""

    def move(x: Any) -> Any:
        return x.cpu().float() if isinstance(x, Tensor) and x.is_floating_point() else x

    return torch.utils._pytree.tree_map(move, values)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("width", HIDDEN)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_passes_forward(sizes: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    hidden, units = HIDDEN[width]
    limit = 3e-3 if dtype == torch.bfloat16 else 4e-4
    given = rows(sizes, width, dtype, sizes[0] % 2 == 0)
    on_cpu, on_cuda = Passes(single(given)), CudaPasses(cuda(given))
    generator = torch.Generator().manual_seed(0)
    done: list[Tensor] = []
    for _ in range(units):
        own = [
            (torch.randn(hidden, width, generator=generator) / width**0.5).to(dtype).float(),
            torch.randn(hidden, generator=generator),
            torch.rand(hidden, generator=generator) + 0.5,
            torch.randn(hidden, generator=generator),
            torch.randn(width, hidden, generator=generator) / hidden**0.5,
            torch.randn(width, generator=generator),
            torch.rand(width, generator=generator) + 0.5,
            torch.randn(width, generator=generator),
        ]
        layers = cuda(own)
        poison()
        before, *parts = on_cuda.project(done, layers[0], layers[1])
        want = on_cpu.project(single(done), own[0], own[1])[0]
        assert error(before, want) < limit
        assert parts[2].sum() == before.shape[0]
        poison()
        found = on_cuda.in_statistics(*parts, *layers[2:4], 1e-5)
        exact = before.double()
        assert error(found[0], exact.mean(0)) < limit
        assert error(found[1], (exact.var(0, unbiased=False) + 1e-5).rsqrt()) < 10 * limit
        for got, plain in zip(found, Passes.in_statistics(on_cuda, *parts, *layers[2:4], 1e-5)):
            assert got.dtype == plain.dtype
            assert error(got, plain) < 1e-6
        poison()
        scale, shift = found[2][:2]
        grams = on_cuda.gram(before, scale, shift)
        h = (before.float() * scale + shift).relu().to(dtype).double()
        assert error(grams[0].double().sum(0), h.T @ h) < 1e-5
        assert error(grams[1].double().sum(0), h.sum(0)) < 1e-5
        poison()
        rest = on_cuda.out_statistics(*grams, layers[4:], 1e-5)
        for got, plain in zip(rest, Passes.out_statistics(on_cuda, *grams, layers[4:], 1e-5)):
            assert got.dtype == plain.dtype
            assert error(got, plain) < (1e-6 if got.dtype != dtype else limit)
        done += Unit(*layers, before, *found, *rest).done
    poison()
    out, argmax = on_cuda.maximum(done)
    want, where = on_cpu.maximum(single(done))
    assert error(out, want) < limit
    assert argmax.dtype == torch.int32
    assert argmax.min() >= 0
    assert argmax.max() < sizes[3]
    same = (argmax.cpu() == where)[want > 0]
    assert same.float().mean() > 0.98
    assert_same(on_cuda.maximum(done), (out, argmax))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("width", HIDDEN)
def test_pull(width: int, dtype: torch.dtype) -> None:
    hidden, _ = HIDDEN[width]
    given = cuda(rows((2, 30, 5, 6), width, dtype, False))
    generator = torch.Generator(device="cuda").manual_seed(0)

    def random(*shape: int, double: bool = False) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda").to(
            torch.float64 if double else torch.float32
        )

    empty = torch.empty(0, device="cuda")
    unit = Unit(
        *[empty] * 4,
        random(width, hidden),
        empty,
        random(width),
        *[empty] * 5,
        empty,
        random(width, double=True),
        random(hidden, double=True),
        random(hidden, double=True),
        random(hidden, hidden, double=True),
        *[empty] * 3,
    )
    for dense in (None, empty):
        passes = CudaPasses(given)
        passes.dense = dense
        passes.sums = [random(1, width), random(1, width), random(1, width, hidden)]
        poison()
        got, want = passes.pull(unit), Passes.pull(passes, unit)
        for x, y in zip((*got[0], *got[1]), (*want[0], *want[1])):
            assert x.shape == y.shape
            assert error(x, y) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("width", HIDDEN)
def test_entries(width: int) -> None:
    hidden, _ = HIDDEN[width]
    generator = torch.Generator(device="cuda").manual_seed(0)
    empty = torch.empty(0, device="cuda")
    weight = torch.randn(width, hidden, generator=generator, device="cuda")
    scale = torch.rand(width, generator=generator, device="cuda")
    deviation = torch.rand(width, generator=generator, device="cuda", dtype=torch.float64) + 0.5
    fields = dict.fromkeys(Unit.__dataclass_fields__, empty)
    unit = Unit(**(fields | {"out_weight": weight, "out_scale": scale, "out_deviation": deviation}))
    out = torch.randn(3, 41, width, generator=generator, device="cuda")
    for size in (1e-6, 1.0, 3e5, 0.0):
        grad = size * torch.randn(3, 41, width, generator=generator, device="cuda")
        poison()
        got = _entries(grad, out, unit, scaled=True)
        with shared_statistics(lambda x: x):
            want = _entries(grad, out, unit, scaled=True)
        assert_same(got, want)
    assert_same(_entries(grad, out, unit, scaled=False)[0], torch.where(out > 0, grad, 0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("width", HIDDEN)
@pytest.mark.parametrize("sizes", [*SIZES, (1, 2500, 40, 9)], ids=str)
def test_points_grad(sizes: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    b, n, s, k = sizes
    hidden, half = HIDDEN[width][0], width // 2
    _, _, center, neighbor, *_ = rows(sizes, width, dtype, False)
    generator = torch.Generator().manual_seed(1)
    dy1 = torch.randn(b * s * k, hidden, generator=generator).to(dtype)
    grad = torch.randn(b, s, width, generator=generator)
    argmax = torch.randint(0, k, (b, s, width), generator=generator, dtype=torch.int32)
    dense = torch.randn(b * s * k, width, generator=generator).to(dtype)
    cloud = torch.arange(b)[:, None] * n
    near = torch.where(neighbor < 0, center[..., None], neighbor)
    used, owned = near.flatten() >= 0, center.flatten() >= 0
    near, middle = (near + cloud[..., None]).flatten()[used], (center + cloud).flatten()[owned]

    def add(index: Tensor, values: Tensor) -> Tensor:
        return torch.zeros(b * n, values.shape[-1], dtype=torch.float64).index_add_(0, index, values)

    weight, factor = torch.randn(hidden, width, generator=generator), torch.tensor(0.5)
    entries = torch.zeros(b * s, k, width, dtype=torch.float64)
    entries.scatter_(1, argmax.view(-1, 1, width).long(), grad.double().view(-1, 1, width))
    by_center = dense.double().view(b * s, k, width)[..., half:].sum(1).float()
    for given in ((grad, argmax, []), (None, None, [dense[:, :half].contiguous(), by_center])):
        poison()
        rest = cuda((center, neighbor, weight, factor))
        points_grad = torch.ops.any2point._local_aggregate_points_grad
        got = points_grad(*cuda((dy1, *given)), *rest, n, False, [])
        single = points_grad(*cuda((dy1, *given)), *rest, n, True, [])
        du = dense.double().view(b * s, k, width) if given[2] else entries
        by_group = torch.cat([dy1.double().view(b * s, k, hidden), du[..., half:]], 2).sum(1)
        by_neighbor = torch.cat([dy1.double(), du.view(b * s * k, width)[:, :half]], 1)
        by_group, by_neighbor = add(middle, by_group[owned]), add(near, by_neighbor[used])
        want = by_neighbor[:, :hidden] @ weight[:, :half].double() + by_neighbor[:, hidden:]
        want += by_group[:, :hidden] @ weight[:, half:].double() + by_group[:, hidden:]
        assert got.shape == (b, n, half)
        assert got.dtype == dtype
        assert single.dtype == torch.float32
        assert torch.equal(single.to(dtype), got)
        assert error(got.flatten(0, 1), 0.5 * want) < torch.finfo(dtype).eps
        if given[2]:  # by point beforehand, some clouds after others
            lists = torch.ops.any2point._local_aggregate_point_lists(*rest[:2], n)
            rows_, sums = cuda((given[2][0], torch.full((b, n, half), torch.nan)))
            for first, last in ((0, 1), (1, b)):
                if first < last:
                    some, to = rows_[first * s * k : last * s * k], sums[first:last]
                    torch.ops.any2point._local_aggregate_point_sums(some, lists, first, to)
            again = points_grad(*cuda((dy1, None, None)), [sums, given[2][1].cuda()], *rest, n, True, lists)
            assert torch.equal(again, single)


def samples(sizes: tuple[int, ...], width: int, dtype: torch.dtype) -> dict[str, Any]:
    """B, N, S and K."""
    b, n, s, k = sizes
    hidden, units = HIDDEN[width]
    kwargs = make(b, n, s, k, width // 2, 0)
    generator = torch.Generator().manual_seed(k)
    kwargs["units"] = [make_unit(width, hidden, generator, bias=i == 0) for i in range(units)]
    kwargs["features"] = kwargs["features"].to(dtype).float()
    return Sample("", kwargs).to("cuda").kwargs


def fused(kwargs: dict[str, Any], *args: Any) -> Step:
    with Recorder() as recorder:
        step = train(ops.local_aggregate, kwargs, *args)
    assert TRAIN in [call[0] for call in recorder.calls], "the composition ran"
    return step


def flat(step: Step) -> dict[str, Tensor]:
    return {"out": step.out} | step.gradients | step.statistics


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("width", HIDDEN)
@pytest.mark.parametrize(
    "sizes", [(3, 500, 200, 81), (2, 300, 77, 64), (1, 300, 150, 16), (2, 200, 61, 100)], ids=str
)
def test_within_twice_the_error_of_torch(sizes: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    """Of output, statistics and every gradient: as near to float64 as torch's own, within a factor of two.

    Errors of gradients are made of the few rows that are another maximum, or another side of a ReLU, than in
    float64: single ones scatter, all together less.
    """
    kwargs = samples(sizes, width, dtype)
    kwargs["neighbor"][0, 2, 1:3] = -1
    kwargs["center"][-1, 4] = -1
    kwargs["neighbor"][-1, 4] = -1
    for normalize, guard in (("scan", True), ("mn40", False)):
        given = kwargs | {"normalize": normalize, "guard": guard}
        want = flat(train(reference.local_aggregate, given, torch.float64))
        scale = 32.0 if dtype == torch.float16 else 1.0
        plain = flat(train(reference.local_aggregate, given, torch.float32, dtype, scale))
        poison()
        step = fused(given, torch.float32, dtype, scale)
        got, got_gradients = flat(step), step.gradients
        found = {name: (error(got[name], x), error(plain[name], x)) for name, x in want.items()}
        text = ", ".join(f"{name} {mine:.1e} ({other:.1e})" for name, (mine, other) in found.items())
        print(f"{sizes} {width} {dtype} {normalize}: {text}")
        loose = {name: 4 if name in got_gradients else 2 for name in found}
        eps = torch.finfo(dtype).eps
        bad = [name for name, (mine, other) in found.items() if not mine <= loose[name] * other + eps]
        assert not bad, f"{normalize}: {bad} of {text}"
        mine, other = (sum(found[name][i] ** 2 for name in got_gradients) ** 0.5 for i in (0, 1))
        assert mine <= 2 * other, f"{normalize}: {mine:.1e} ({other:.1e}) of {text}"


@pytest.mark.gpu
@pytest.mark.parametrize("width", HIDDEN)
def test_float32_with_float16_operands(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients as near to float64 as TF32 in torch, also those that float16 cannot hold.

    TF32 does not round the result, nor what is added to it.
    """
    kwargs = samples((3, 500, 200, 81), width, torch.float32)
    want = flat(train(reference.local_aggregate, kwargs, torch.float64))
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    plain = flat(train(reference.local_aggregate, kwargs, torch.float32))
    allowed = kwargs | {"operand_dtype": torch.float16}
    poison()
    got = fused(allowed, torch.float32)
    found = {name: (error(x, want[name]), error(plain[name], want[name])) for name, x in flat(got).items()}
    text = ", ".join(f"{name} {mine:.1e} ({other:.1e})" for name, (mine, other) in found.items())
    print(f"{width}: {text}")
    mine, other = (sum(found[name][i] ** 2 for name in got.gradients) ** 0.5 for i in (0, 1))
    assert found["out"][0] <= 2 * found["out"][1], text
    assert mine <= 1.5 * other, f"{mine:.1e} ({other:.1e}) of {text}"
    small = fused(allowed, torch.float32, None, 2.0**-30).gradients
    assert all(error(small[name], x) < 1e-5 for name, x in got.gradients.items())


@pytest.mark.gpu
def test_float16_operands_in_evaluation() -> None:
    kwargs = samples((2, 300, 77, 64), 192, torch.float32)
    with torch.no_grad():
        want = reference.local_aggregate(**Sample("", kwargs).to(torch.float64).kwargs)
        got = ops.local_aggregate(**kwargs, operand_dtype=torch.float16)
    assert got.dtype == torch.float32
    assert error(got, want) < 2 * torch.finfo(torch.float16).eps


@pytest.mark.gpu
def test_nan_reaches_everything() -> None:
    """Through the statistics, as in the composition; no gradient crashes."""
    kwargs = samples((2, 40, 7, 13), 384, torch.float16)
    kwargs["points"][0, :, 2] = 0.25
    step = fused(kwargs, torch.float32, torch.float16)
    assert all(x.isfinite().all() for x in flat(step).values())
    step = fused(kwargs | {"guard": False}, torch.float32, torch.float16)
    assert step.out.isnan().all()


def check_bits(kwargs: dict[str, Any], low: torch.dtype | None) -> None:
    """The same on every run, stream and layout."""
    want = flat(fused(kwargs, torch.float32, low))
    assert all(x.isfinite().all() for x in want.values())
    for _ in range(3):
        poison()
        assert_same(flat(fused(kwargs, torch.float32, low)), want)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        poison()
        assert_same(flat(fused(kwargs, torch.float32, low)), want, "second stream")
    torch.cuda.current_stream().wait_stream(stream)
    other = kwargs | {"center": kwargs["center"].int(), "neighbor": kwargs["neighbor"].int()}
    other["features"] = torch.cat([torch.zeros(1, device="cuda"), kwargs["features"].flatten()])[1:]
    other["features"] = other["features"].view_as(kwargs["features"])
    assert_same(flat(fused(other, torch.float32, low)), want, "layout")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("width", HIDDEN)
def test_same_bits_on_every_run_stream_and_layout(width: int, dtype: torch.dtype) -> None:
    check_bits(samples((4, 300, 100, 27), width, dtype), dtype)


def check_graph(kwargs: dict[str, Any], dtype: torch.dtype) -> None:
    """Two replays of a step are two steps."""
    kwargs["features"] = kwargs["features"].to(dtype).requires_grad_()
    unit = kwargs["units"][0]
    weights = [unit.in_weight.requires_grad_(), unit.out_weight.requires_grad_()]
    statistics = [x for unit in kwargs["units"] for x in (*unit.in_norm[2:], *unit.out_norm[2:])]

    def step() -> list[Tensor]:
        out = ops.local_aggregate(**kwargs, training=True)
        loss = out.float().square().sum()
        return [out.detach(), *torch.autograd.grad(loss, [kwargs["features"], *weights])]

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
def test_graph_of_two_steps() -> None:
    check_graph(samples((4, 300, 100, 27), 192, torch.float16), torch.float16)


@pytest.mark.gpu
def test_compiled_and_autocast() -> None:
    kwargs = samples((2, 60, 20, 13), 384, torch.bfloat16)
    leaf = kwargs["features"].clone().requires_grad_()

    def step(function: Any, features: Tensor) -> tuple[Tensor, Tensor]:
        out = function(**(kwargs | {"features": features}), training=True)
        return out, torch.autograd.grad(out.float().square().sum(), leaf)[0]

    want = step(ops.local_aggregate, leaf.bfloat16())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_same(step(ops.local_aggregate, leaf), want)
    compiled = torch.compile(ops.local_aggregate, fullgraph=True, backend="aot_eager")
    with Recorder() as recorder:
        got = step(compiled, leaf.bfloat16())
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    assert TRAIN in [call[0] for call in recorder.calls]


def check_processes(kwargs: dict[str, Any]) -> None:
    """Two processes with the same rows: everything as in one, statistics of twice as many rows."""
    want = fused(kwargs, torch.float32, torch.float16)
    with shared_statistics(lambda x: 2 * x):
        got = fused(kwargs, torch.float32, torch.float16)
    for name, value in got.gradients.items():
        assert error(value, want.gradients[name]) < 2e-3, name
    assert error(got.out, want.out) < 1e-3


@pytest.mark.gpu
def test_statistics_of_processes() -> None:
    check_processes(samples((2, 100, 40, 27), 192, torch.float16))


@pytest.mark.gpu
def test_memory() -> None:
    kwargs = samples((16, 300, 256, 64), 384, torch.float16)
    fused(kwargs, torch.float32, torch.float16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fused(kwargs, torch.float32, torch.float16)
    kept = 16 * 256 * 64 * 192 * 2
    assert torch.cuda.max_memory_allocated() - before < 3 * kept + 90e6, (
        "[B, S, K, C] in float32 would take 403 MB"
    )
