"""Farthest point sampling on CUDA: the bits of the CPU, whichever kernel a cloud goes to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from farthest_point_sample_clouds import clouds, exact
from op_contract import assert_same
from torch import Tensor

from any2point.ops import FarthestPoints, farthest_point_sample

pytestmark = pytest.mark.gpu

SIZES = [
    1,
    2,
    31,
    32,
    33,
    1000,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
    4095,
    4096,
    4097,
    8191,
    8192,
    8193,
    20000,
]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7])
def test_cuda_equals_cpu(n: int, dim: int) -> None:
    for points in (torch.randn(3, n, dim), exact(3, n, dim, steps=8), torch.ones(3, n, dim)):
        num_samples = min(n + 2, 200)
        start = torch.tensor([0, n // 2, n + 5])
        want = farthest_point_sample(points, num_samples, start=start, return_distance=True)
        got = farthest_point_sample(points.cuda(), num_samples, start=start.cuda(), return_distance=True)
        assert_same(got, want, f"{n}, {dim}")


@pytest.mark.parametrize("n", [700, 5000, 30_000])
def test_cuda_equals_cpu_on_hard_clouds(n: int) -> None:
    for name, cloud in clouds(torch.Generator().manual_seed(0), n):
        num_samples = min(n, 1000)
        got = farthest_point_sample(cloud[None].cuda(), num_samples, return_distance=True)
        assert_same(got, farthest_point_sample(cloud[None], num_samples, return_distance=True), name)


@pytest.mark.parametrize("n", [1, 33, 1000, 2049, 20_000])
def test_cuda_equals_cpu_in_float64(n: int) -> None:
    """Also in the order of pointnet2, and there in float32."""
    points = torch.randn(2, n, 3, dtype=torch.float64)
    ties = exact(2, n, 3, steps=8)
    for cloud, tie in (
        (points, "lowest"),
        (points, "pointnet2"),
        (ties, "pointnet2"),
        (ties * 0.05, "pointnet2"),
    ):
        got = farthest_point_sample(cloud.cuda(), min(n + 1, 300), return_distance=True, tie=tie)
        assert_same(got, farthest_point_sample(cloud, min(n + 1, 300), return_distance=True, tie=tie), tie)


@pytest.mark.parametrize(
    "sizes", [[0, 900, 0, 2000, 33], [5000, 0, 12_000, 70, 2500, 8192, 8193, 1], [20_000]]
)
def test_cuda_ragged_batches(sizes: list[int]) -> None:
    """Sizes that no single kernel serves: registers, several blocks and nothing at all in one call."""
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    points = torch.randn(sum(sizes), 3)
    want = farthest_point_sample(points, 150, offsets=offsets, return_distance=True)
    got = farthest_point_sample(points.cuda(), 150, offsets=offsets.cuda(), return_distance=True)
    assert_same(got, want, "packed")
    padded = torch.randn(len(sizes), max(sizes), 3)
    lengths = torch.tensor(sizes)
    want = farthest_point_sample(padded, 150, lengths=lengths, return_distance=True)
    got = farthest_point_sample(padded.cuda(), 150, lengths=lengths.cuda(), return_distance=True)
    assert_same(got, want, "padded")


def test_cuda_more_blocks_than_the_device_holds() -> None:
    """Too many large clouds for the cooperative launch: they are streamed."""
    points = torch.randn(300, 9000, 3)
    got = farthest_point_sample(points.cuda(), 20, return_distance=True)
    assert_same(got, farthest_point_sample(points, 20, return_distance=True))


def test_cuda_large_cloud_and_graph_replay() -> None:
    points = torch.rand(1, 100_000, 3)
    want = farthest_point_sample(points, 5000, return_distance=True)
    static = points.cuda()
    assert_same(farthest_point_sample(static, 5000, return_distance=True), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = farthest_point_sample(static, 5000, return_distance=True)
    for _ in range(2):
        got.index.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same(got, want, "replay")


@pytest.mark.slow
def test_cuda_offsets_beyond_2_to_the_31() -> None:
    """B * N * D past 2^31 elements: the last cloud is read where it is."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("needs 24 GB")
    points = torch.zeros(700_001, 1024, 3, device="cuda")
    points[-1] = torch.rand(1024, 3)
    got = farthest_point_sample(points, 16)[-1:]
    assert_same(got, farthest_point_sample(points[-1:].cpu(), 16))


@pytest.mark.parametrize("n", [400, 1024, 2048, 2500, 9000, 20_000, 70_000])
def test_cuda_batches_on_hard_clouds(n: int) -> None:
    """Every kind of cloud in one call, of different sizes and starts, in one block or in several."""
    kinds = [cloud for _, cloud in clouds(torch.Generator().manual_seed(n), n)]
    for few in range(0, len(kinds), 6):
        points = torch.stack(kinds[few : few + 6])
        lengths = torch.tensor([n - 37 * b for b in range(len(points))])
        start = torch.tensor([b * n // 3 for b in range(len(points))])
        num_samples = min(n, 3000)
        want = farthest_point_sample(points, num_samples, lengths=lengths, start=start, return_distance=True)
        got = farthest_point_sample(
            points.cuda(), num_samples, lengths=lengths.cuda(), start=start.cuda(), return_distance=True
        )
        assert_same(got, want, f"kinds from {few}")


def start_sets(generator: torch.Generator, points: Tensor, starts: int) -> Tensor:
    """``[B, S]``: distinct points; with some that are none after them; with such and repeated ones anywhere;
    and picks of a run before. Not all points are finite."""
    batch, n, _ = points.shape
    sets = torch.stack([torch.randperm(n, generator=generator)[:starts] for _ in range(batch)])
    sets[1::4, starts // 2 :] = -1
    where = torch.randint(0, starts, (len(sets[2::4]), 3), generator=generator)
    sets[2::4] = sets[2::4].scatter(1, where, torch.tensor([n, 3, 3]).expand_as(where))
    sets[3::4] = farthest_point_sample(points[3::4], starts)
    return sets


@pytest.mark.parametrize("n", [40, 400, 1024, 2000, 5000, 20_000, 60_000])
def test_cuda_continues_from_given_picks(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    points = torch.stack([cloud for _, cloud in clouds(generator, n)][:: 1 if n <= 2000 else 5])
    lengths = torch.tensor([n - b * n // 80 for b in range(len(points))])
    for starts, num_samples in ((2, 30), (30, 20), (33, 500), (300, 500), (3000, 5000)):
        if starts > n // 2:
            continue
        sets = start_sets(generator, points, starts)
        for sizes in (None, lengths):
            want = farthest_point_sample(points, num_samples, lengths=sizes, start=sets, return_distance=True)
            got = farthest_point_sample(
                points.cuda(),
                num_samples,
                lengths=None if sizes is None else sizes.cuda(),
                start=sets.cuda(),
                return_distance=True,
            )
            assert_same(got, want, f"{starts} starts")


def test_cuda_continues_packed_clouds_and_replays() -> None:
    sizes = [900, 0, 5000, 33, 20_000, 2048]
    offsets = torch.tensor([0, *np.cumsum(sizes)])
    points = torch.randn(sum(sizes), 3)
    sets = torch.arange(600).expand(len(sizes), -1).contiguous()
    want = farthest_point_sample(points, 1000, offsets=offsets, start=sets, return_distance=True)
    static = points.cuda(), offsets.cuda(), sets.cuda()

    def run() -> FarthestPoints:
        return farthest_point_sample(
            static[0], 1000, offsets=static[1], start=static[2], return_distance=True
        )

    assert_same(run(), want, "packed")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    got.index.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(got, want, "replay")


VARIANTS = ["plain", "many picks", "starts", "start sets", "pointnet2", "float64", "half", "D"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_cuda_equals_cpu_on_ten_thousand_clouds(variant: str) -> None:
    """Bit for bit: 8 variants, 48 sizes and seeds, 27 kinds of clouds."""
    generator = torch.Generator().manual_seed(VARIANTS.index(variant))
    checked = 0
    for seed in range(48):
        n = int(torch.randint(300, (1100, 2100, 3000, 9000)[seed % 4], (), generator=generator))
        points = torch.stack([cloud for _, cloud in clouds(generator, n)])
        num_samples, options = 420 if n > 2100 else min(n, 600), {}
        if variant == "many picks":
            num_samples = n - seed
        elif variant == "starts":
            options["start"] = torch.randint(0, n + 9, (len(points),), generator=generator)
        elif variant == "start sets":
            options["start"] = start_sets(generator, points, 2 + 5 * seed)
        elif variant == "pointnet2":
            options["tie"], num_samples = "pointnet2", 100
        elif variant == "float64":
            points, num_samples = points.double() + (0.0 if seed % 2 else 1e-12), 100
        elif variant == "half":
            points = points.to(torch.float16 if seed % 2 else torch.bfloat16)
        elif variant == "D":
            points = torch.cat([points, points.flip(1)], -1)[..., : (1, 2, 4, 5)[seed % 4]].contiguous()
            num_samples = 100
        want = farthest_point_sample(points, num_samples, return_distance=True, **options)
        there = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in options.items()}
        got = farthest_point_sample(points.cuda(), num_samples, return_distance=True, **there)
        assert_same(got, want, f"{variant}, seed {seed}, {n} points")
        checked += len(points)
    assert checked * len(VARIANTS) >= 10_000
