"""The cases of benchmarks/gpu.py: shapes, inputs, providers and checks of each op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from any2point import ops
from benchmarks import common, peers

FPS = [(32, 1024, 512), (32, 2048, 512), (32, 8192, 2048), (8, 16384, 4096), (1, 100_000, 25_000)]
HIERARCHY = [(32, 1024, (512, 256, 128))]
KNN = [
    (32, 512, 1024, 81),
    (32, 2048, 8192, 32),
    (1, 25_000, 100_000, 32),
    (1, 100_000, 100_000, 16),
    (1, 1_000_000, 1_000_000, 16),
]
GROUP = [(32, 1024, 96, 512, 81)]


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
    """One op at one shape: the inputs of every set, and `check(result of set i, i, exact) -> match`."""

    op: str
    shape: str
    inputs: list[tuple[Any, ...]]
    check: Callable[[Any, int, bool], float]
    cost: common.Cost
    providers: list[Provider] = field(default_factory=list)
    backward: bool = False


def covering(points: Tensor, index: Tensor) -> float:
    """Largest squared distance of a point to the picks (first cloud), without those a peer never picks."""
    chosen = points[0, index[0]]
    some = points[0][points[0].square().sum(-1) > 1e-3]
    parts = [torch.cdist(part, chosen).amin(1).amax() for part in some.split(8192)]
    return float(torch.stack(parts).amax().square())


def fps_cases(rivals: dict[str, Any]) -> list[Case]:
    cases = []
    for batch, rows, samples in FPS:
        sets = 4 if rows < 50_000 else 1
        clouds = [torch.from_numpy(common.cloud("ball", batch, rows, seed)) for seed in range(sets)]
        inputs = [(points.cuda(), samples) for points in clouds]

        def check(
            index: Tensor, i: int, exact: bool, clouds: list[Tensor] = clouds, samples: int = samples
        ) -> float:
            expected = cpu_picks(clouds[i], samples)
            match = common.check_samples(index.cpu(), expected, exact=exact)
            # A peer may order ties, or what rounding makes ties, in another way: its cover must be as good.
            points = clouds[i].cuda()
            ours, theirs = covering(points, expected.cuda()), covering(points, index)
            if theirs > 1.02 * ours:
                raise AssertionError(f"covering distance {theirs:.3e}, expected {ours:.3e}")
            return match

        providers = [Provider.plain("any2point", ops.farthest_point_sample)]
        providers += [Provider.of(name, peer.fps) for name, peer in rivals.items() if peer.fps]
        cost = common.cost_farthest_point_sample(batch, rows, samples)
        cases.append(
            Case("farthest_point_sample", f"{batch},{rows},{samples}", inputs, check, cost, providers)
        )
    return cases


@functools.lru_cache(maxsize=8)
def cpu_picks(points: Tensor, samples: int) -> Tensor:
    return ops.farthest_point_sample(points, samples)


def hierarchy_cases(rivals: dict[str, Any]) -> list[Case]:
    cases = []
    for batch, rows, sizes in HIERARCHY:
        clouds = [torch.from_numpy(common.cloud("ball", batch, rows, seed)) for seed in range(4)]
        inputs = [(points.cuda(), sizes) for points in clouds]

        def check(
            levels: list[Tensor], i: int, exact: bool, clouds: list[Tensor] = clouds, sizes: Any = sizes
        ) -> float:
            expected = ops.farthest_point_hierarchy(clouds[i], list(sizes))
            pairs = list(zip(levels, expected))
            return min(common.check_samples(a.cpu(), b, exact=exact, match=0.5) for a, b in pairs)

        def chain(function: Callable[..., Any], op: Any) -> Callable[..., Any]:
            def run(points: Tensor, counts: Sequence[int]) -> list[Tensor]:
                levels, total = [], None
                for size in counts:
                    index = op.finish(function(*op.prepare(points, size)), points, size)
                    points = points.gather(1, index[..., None].expand(-1, -1, 3))
                    total = index if total is None else total.gather(1, index)
                    levels.append(total)
                return levels

            return run

        providers = [
            Provider.plain(
                "any2point", lambda points, sizes: ops.farthest_point_hierarchy(points, list(sizes))
            )
        ]
        for name, peer in rivals.items():
            if peer.fps:
                graph = chain(peer.fps.graph, peer.fps) if peer.fps.graph else None
                providers.append(Provider(name, chain(peer.fps.run, peer.fps), graph=graph))
        cost = common.cost_farthest_point_sample(batch, rows, sizes[0])
        name = f"{batch},{rows},{'+'.join(map(str, sizes))}"
        cases.append(Case("farthest_point_hierarchy", name, inputs, check, cost, providers))
    return cases


def expanded_knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """|a|^2 + |b|^2 - 2ab and an unsorted topk, as the published code computes it."""
    distance = -2 * query @ points.transpose(1, 2) + query.square().sum(-1)[..., None]
    distance = distance + points.square().sum(-1)[:, None]
    values, index = distance.topk(k, dim=-1, largest=False, sorted=False)
    return index, values


def knn_cases(rivals: dict[str, Any], compile_: bool) -> list[Case]:
    cases = []
    for batch, queries, rows, k in KNN:
        sets = 4 if rows < 50_000 else 2
        clouds = [torch.from_numpy(common.cloud("ball", batch, rows, seed)) for seed in range(sets)]
        host = [(points[:, :queries].contiguous(), points, k) for points in clouds]
        inputs = [(query.cuda(), points.cuda(), k) for query, points, k in host]

        def check(
            result: tuple[Tensor, Tensor],
            i: int,
            exact: bool,
            host: list[Any] = host,
            inputs: list[Any] = inputs,
        ) -> float:
            expected = cpu_knn(*host[i])
            if exact:
                torch.testing.assert_close(result[1].cpu(), expected[1], rtol=0, atol=0)
                return common.check_samples(result[0].cpu(), expected[0])
            index = result[0]
            # Distances again from the indices: `cdist` returns roots, the expanded form cancels.
            query, points, _ = inputs[i]
            near = points[torch.arange(len(points), device=index.device)[:, None, None], index]
            distance = (near - query[:, :, None]).square().sum(-1)
            pair = (index.cpu(), distance.cpu())
            return common.check_neighbors(*pair, expected, tolerance=1e-2, match=0.99)

        providers = [
            Provider.plain("any2point", lambda *args: tuple(ops.knn(*args))),
            Provider.plain("any2point unsorted", lambda *args: tuple(ops.knn(*args, sorted=False))),
        ]
        if rows < 1_000_000:  # scans would take seconds
            providers += [Provider.of(name, peer.knn) for name, peer in rivals.items() if peer.knn]
        if 4 * batch * queries * rows * 3 < torch.cuda.get_device_properties(0).total_memory:
            providers.append(Provider.plain("torch cdist+topk", peers.torch_knn))
            if compile_ and rows < 50_000:
                fused = torch.compile(expanded_knn, dynamic=False)
                providers.append(Provider.plain("torch.compile expanded+topk", fused))
        cost = common.cost_knn(batch, queries, rows, k)
        cases.append(Case("knn", f"{batch},{queries},{rows},{k}", inputs, check, cost, providers))
    return cases


@functools.lru_cache(maxsize=4)
def cpu_knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    index, distance = ops.knn(query, points, k)
    return index, distance


def group_cases(rivals: dict[str, Any]) -> list[Case]:
    cases = []
    for batch, rows, width, queries, k in GROUP:
        inputs = []
        for seed in range(4):
            points = torch.from_numpy(common.cloud("ball", batch, rows, seed))
            index = cpu_knn(points[:, :queries].contiguous(), points, k)[0].cuda()
            inputs.append((torch.randn(batch, rows, width, device="cuda").requires_grad_(), index))

        def check(out: Tensor, i: int, exact: bool, inputs: list[Any] = inputs) -> float:
            if not torch.equal(
                out.detach().cpu(), ops.group(inputs[i][0].detach().cpu(), inputs[i][1].cpu())
            ):
                raise AssertionError("grouped features differ from the CPU op's")
            return 1.0

        providers = [
            Provider.plain("any2point", ops.group),
            *(Provider.of(name, peer.group) for name, peer in rivals.items() if peer.group),
            Provider.plain("torch index", peers.torch_group),
            Provider.plain("torch gather", peers.torch_group_gather),
        ]
        cost = common.cost_group(batch, rows, queries, k, width)
        name = f"{batch},{rows},{width} -> {queries}x{k}"
        cases.append(Case("group", name, inputs, check, cost, providers, backward=True))
    return cases
