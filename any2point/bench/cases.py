"""What is measured: for every op its sizes, inputs, check, floor, and who else computes it.

`farthest_point_sample(device)`, `knn(device)`, ... make the cases of an op, the smallest first. A case checks
results against the reference; on a GPU the results of exact ops must also be the bits of the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from any2point import ops, reference
from any2point.bench import costs, peers
from any2point.bench.costs import Cost, cloud
from any2point.bench.timing import Machine, flatten


def _same(*args: Any) -> tuple[Any, ...]:
    return args


def _result(result: Any, *args: Any) -> Any:
    return result


@dataclass(frozen=True)
class Provider:
    """How someone computes an op: `run` is timed, `prepare` and `finish` are not, `graph` is captured."""

    name: str
    run: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]] = _same
    finish: Callable[..., Any] = _result
    graph: Callable[..., Any] | None = None

    @staticmethod
    def of(name: str, op: Any) -> Provider:
        return Provider(name, op.run, op.prepare, op.finish, op.graph)

    @staticmethod
    def plain(name: str, function: Callable[..., Any]) -> Provider:
        return Provider(name, function, graph=function)


@dataclass
class Case:
    """One op at one shape.

    Attributes:
        op: its name.
        shape: as text, for people and files.
        inputs: the arguments, several sets where a cache could hold one.
        check: `check(result of set i, i, exact) -> match`; raises AssertionError where a result is wrong.
        cost: what has to be done.
        providers: ours first.
        backward: whether gradients are measured, too. Leaves are the inputs that require one.
        reference: the op in torch, by which gradients are checked.
        tolerance: relative error of gradients.
        training: arguments added where gradients are measured.
        compilable: what torch.compile is given for the baseline.
        low: whether operands of products have 16 bits, on a GPU.
        precision: "tf32" where providers may round operands of float32 products so, on a GPU.
    """

    op: str
    shape: str
    inputs: list[tuple[Any, ...]]
    check: Callable[[Any, int, bool], float]
    cost: Cost
    providers: list[Provider] = field(default_factory=list)
    backward: bool = False
    reference: Callable[..., Any] | None = None
    tolerance: float = 1e-3
    training: dict[str, Any] = field(default_factory=dict)
    compilable: Callable[..., Any] | None = None
    low: bool = False
    precision: str = "fp32"

    def floor(self, machine: Machine, mode: str) -> tuple[float, float]:
        """(floor, direct) of a mode in microseconds.

        A backward pass reads and writes at least as much as the forward pass, and has two products for each.
        """
        passes = {"forward": (1, 1), "backward": (1, 2), "both": (2, 3)}[mode]
        if machine.cuda and not self.low:  # TF32
            machine = replace(machine, matrix=machine.matrix / 2)
        moved, products = self.cost.us(machine, *passes)
        least = products if self.cost.products else 0.0
        return max(moved, least), products


Shapes = Sequence[tuple[Any, ...]]


def check_samples(index: Any, expected: Any, *, exact: bool = True, match: float = 0.0) -> float:
    """The fraction of equal picks; raises where it is under `match` (1 if `exact`)."""
    index, expected = np.asarray(index).astype(np.int64), np.asarray(expected).astype(np.int64)
    if index.shape != expected.shape:
        raise AssertionError(f"picks: expected shape {expected.shape}, got {index.shape}")
    same = float((index == expected).mean())
    if same < (1.0 if exact else match):
        raise AssertionError(f"picks: only {same:.4%} are those of the reference")
    return same


def check_neighbors(
    index: Any, distance: Any, expected: Any, *, tolerance: float = 1e-5, match: float = 0.999
) -> float:
    """Neighbours as sets, and their squared distances; returns the fraction of equal entries."""
    index, wanted = np.sort(np.asarray(index), -1), np.sort(np.asarray(expected[0]), -1)
    same = float((index == wanted).mean())
    if same < match:
        raise AssertionError(f"neighbours: only {same:.4%} are those of the reference")
    np.testing.assert_allclose(
        np.sort(np.asarray(distance), -1), np.sort(np.asarray(expected[1]), -1), rtol=tolerance, atol=1e-6
    )
    return same


def check_close(result: Any, expected: Any, tolerance: float, *, least: float = 1e-30) -> float:
    """Relative error of every tensor, over all of its elements; norms below `least` count as that."""
    got, wanted = flatten(result), flatten(expected)
    if len(got) != len(wanted):
        raise AssertionError(f"expected {len(wanted)} tensors, got {len(got)}")
    for part, want in zip(got, wanted):
        if part.shape != want.shape:
            raise AssertionError(f"expected shape {list(want.shape)}, got {list(part.shape)}")
        error = float((part.detach().double() - want.detach().double()).norm())
        error /= max(float(want.detach().double().norm()), least)
        if not error <= tolerance:
            raise AssertionError(f"relative error {error:.1e}, expected at most {tolerance:.0e}")
    return 1.0


def near_reference(function: Callable[..., Any], inputs: list[Any], tolerance: float) -> Callable[..., float]:
    """The check of an op with floating point results: against the reference on the same device."""

    @lru_cache(maxsize=1)
    def expected(i: int) -> Any:
        with torch.no_grad():
            return function(*inputs[i])

    return lambda result, i, exact: check_close(result, expected(i), tolerance)


def covering(points: Tensor, index: Tensor) -> float:
    """Largest squared distance of a point to the picks (first cloud), without those a peer never picks."""
    chosen = points[0, index[0]]
    some = points[0][points[0].square().sum(-1) > 1e-3]
    parts = [torch.cdist(part, chosen).amin(1).amax() for part in some.split(8192)]
    return float(torch.stack(parts).amax().square())


def clouds(batch: int, rows: int, kind: str = "ball", sets: int | None = None) -> list[Tensor]:
    """Several sets of clouds on the CPU where one could stay in a cache, fewer of large ones."""
    count = sets or (4 if batch * rows < 400_000 else 1)
    return [torch.from_numpy(cloud(kind, batch, rows, seed)) for seed in range(count)]


FPS = {
    "cpu": [(1, 1024, 512), (1, 8192, 2048), (1, 100_000, 25_000)],
    "cuda": [(32, 1024, 512), (32, 2048, 512), (32, 8192, 2048), (8, 16384, 4096), (1, 100_000, 25_000)],
}


def farthest_point_sample(device: str, shapes: Shapes | None = None, kind: str = "ball") -> Iterator[Case]:
    for batch, rows, samples in shapes or FPS[device]:
        once = device == "cpu" or samples > 10_000  # peers take seconds
        host = clouds(batch, rows, kind, 1 if once else None)

        def check(
            index: Tensor, i: int, exact: bool, host: list[Tensor] = host, samples: int = samples
        ) -> float:
            where, index = index.device, index.cpu()
            expected = ops.farthest_point_sample(host[i], samples)
            if exact:  # a few clouds and picks by the definition, all of them by the CPU
                few = min(samples, 512, max(16, (1 << 24) // host[i].shape[1]))
                start = expected[:2, 0]
                first = reference.farthest_point_sample(host[i][:2], few, start=start)
                check_samples(index[:2, :few], first)
                return check_samples(index, expected)
            # A peer may begin elsewhere, and order ties, or what rounding makes ties, in another way.
            if not bool((index[:, 0] == expected[:, 0]).all()):
                expected = ops.farthest_point_sample(host[i], samples, start=index[:, 0])
            points = host[i].to(where)
            ours, theirs = covering(points, expected.to(where)), covering(points, index.to(where))
            if theirs > 1.02 * ours:
                raise AssertionError(f"covering distance {theirs:.3e}, expected {ours:.3e}")
            return check_samples(index, expected, exact=False)

        providers = [Provider.plain("any2point", ops.farthest_point_sample)]
        if samples <= 4096:
            providers.append(Provider("torch loop", peers.torch_farthest_points))
        if device == "cpu" and batch == 1:
            for name, sample in peers.samplers().items():
                if rows > 10_000 and name in ("fpsample vanilla", "torch_cluster"):
                    continue  # seconds a call
                providers.append(_on_arrays(name, sample, lambda index: _as_tensors([index])[0]))
        cost = costs.cost_farthest_point_sample(batch, rows, samples)
        inputs = [(points.to(device), samples) for points in host]
        yield Case("farthest_point_sample", f"{batch},{rows},{samples}", inputs, check, cost, providers)


def _on_arrays(name: str, function: Callable[..., Any], finish: Callable[..., Any]) -> Provider:
    """A function of NumPy arrays of one cloud."""

    def prepare(*args: Any) -> tuple[Any, ...]:
        return tuple(arg[0].numpy() if isinstance(arg, Tensor) else arg for arg in args)

    return Provider(name, function, prepare, lambda result, *args: finish(result))


def _as_tensors(parts: Sequence[np.ndarray]) -> list[Tensor]:
    index, *rest = parts
    return [torch.from_numpy(part)[None] for part in (index.astype(np.int64), *rest)]


def farthest_point_hierarchy(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    default = [(1 if device == "cpu" else 32, 1024, (512, 256, 128))]
    for batch, rows, sizes in shapes or default:
        host = clouds(batch, rows)

        def check(
            levels: list[Tensor], i: int, exact: bool, host: list[Tensor] = host, sizes: Any = sizes
        ) -> float:
            expected = ops.farthest_point_hierarchy(host[i], list(sizes))
            if exact:
                check_samples(expected[0][:1], reference.farthest_point_sample(host[i][:1], sizes[0]))
            pairs = list(zip(levels, expected))
            return min(check_samples(a.cpu(), b, exact=exact, match=0.5) for a, b in pairs)

        providers = [
            Provider.plain("any2point", ops.farthest_point_hierarchy),
            Provider("torch loop", peers.torch_farthest_hierarchy),
        ]
        cost = costs.cost_farthest_point_sample(batch, rows, sizes[0])
        name = f"{batch},{rows},{'+'.join(map(str, sizes))}"
        inputs = [(points.to(device), list(sizes)) for points in host]
        yield Case("farthest_point_hierarchy", name, inputs, check, cost, providers)


KNN = {
    "cpu": [(1, 512, 1024, 81), (1, 2048, 8192, 32), (1, 100_000, 100_000, 16)],
    "cuda": [
        (32, 512, 1024, 81),
        (32, 2048, 8192, 32),
        (1, 25_000, 100_000, 32),
        (1, 100_000, 100_000, 16),
        (1, 1_000_000, 1_000_000, 16),
    ],
}


def knn(device: str, shapes: Shapes | None = None, kind: str = "ball") -> Iterator[Case]:
    for batch, queries, rows, k in shapes or KNN[device]:
        host = [
            (points[:, :queries].contiguous(), points, k)
            for points in clouds(batch, rows, kind, 1 if device == "cpu" else None)
        ]

        def check(result: Any, i: int, exact: bool, host: list[Any] = host) -> float:
            query, points, k = host[i]
            few = min(256, max(8, (1 << 24) // points.shape[1]))
            some = torch.from_numpy(np.random.default_rng(1).permutation(query.shape[1])[:few].copy())
            index = result[0].cpu()
            expected = _cpu_knn(query, points, k)
            if exact:
                wanted = reference.knn(query[:2, some], points[:2], k)
                check_samples(index[:2, some], wanted[0])
                torch.testing.assert_close(result[1].cpu(), expected[1], rtol=0, atol=0)
                return check_samples(index, expected[0])
            # Distances again from the indices: some return roots, the expanded form cancels.
            near = points[torch.arange(len(points))[:, None, None], index]
            distance = (near - query[:, :, None]).square().sum(-1)
            return check_neighbors(index, distance, expected, tolerance=1e-2, match=0.99)

        providers = [
            Provider.plain("any2point", _knn),
            Provider.plain("any2point unsorted", _knn_unsorted),
        ]
        if device == "cpu" and batch == 1:
            for name, search in peers.searches().items():
                providers.append(_on_arrays(name, search, _as_tensors))
        fits = batch * queries * rows * 12 < (_memory(device) if device == "cuda" else 1 << 30)
        if fits:
            providers.append(Provider.plain("torch cdist+topk", peers.torch_knn))
        compilable = peers.expanded_knn if fits and rows < 50_000 else None
        cost = costs.cost_knn(batch, queries, rows, k)
        inputs = [(query.to(device), points.to(device), k) for query, points, k in host]
        name = f"{batch},{queries},{rows},{k}"
        yield Case("knn", name, inputs, check, cost, providers, compilable=compilable)


def _memory(device: str) -> int:
    return torch.cuda.get_device_properties(device).total_memory


def _knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return tuple(ops.knn(query, points, k))  # type: ignore[return-value]


def _knn_unsorted(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return tuple(ops.knn(query, points, k, sorted=False))  # type: ignore[return-value]


@lru_cache(maxsize=4)
def _cpu_knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return tuple(ops.knn(query, points, k))  # type: ignore[return-value]


def ball_query(device: str, shapes: Shapes | None = None) -> Iterator[Case]:
    sizes = {
        "cpu": [(1, 512, 1024, 0.2, 32), (1, 2048, 8192, 0.1, 32)],
        "cuda": [(32, 512, 1024, 0.2, 32), (1, 25_000, 100_000, 0.03, 16)],
    }
    for batch, queries, rows, radius, k in shapes or sizes[device]:
        host = [(p[:, :queries].contiguous(), p, radius, k) for p in clouds(batch, rows)]
        inputs = [(query.to(device), points.to(device), *rest) for query, points, *rest in host]

        def check(result: Any, i: int, exact: bool, host: list[Any] = host) -> float:
            if not exact:
                return float("nan")  # a search without the radius, which only bounds what one costs
            query, points, *rest = host[i]
            some = torch.from_numpy(np.random.default_rng(1).permutation(query.shape[1])[:256].copy())
            for got, want in zip(result, reference.ball_query(query[:2, some], points[:2], *rest)):
                if not torch.equal(got[:2].cpu()[:, some], want):
                    raise AssertionError("neighbours in the ball differ from the reference's")
            for got, want in zip(result, ops.ball_query(*host[i])):
                if not torch.equal(got.cpu(), want):
                    raise AssertionError("neighbours in the ball differ from the CPU's")
            return 1.0

        providers = [
            Provider.plain("any2point", lambda *args: tuple(ops.ball_query(*args))),
            Provider.plain("torch cdist+topk", lambda q, p, radius, k: peers.torch_knn(q, p, k)),
        ]
        cost = costs.cost_knn(batch, queries, rows, k)
        name = f"{batch},{queries},{rows},r={radius},{k}"
        yield Case("ball_query", name, inputs, check, cost, providers)
