"""Times of farthest point sampling over sizes and kinds of clouds, on one CUDA GPU, as CSV for docs/fps.md.

python benchmarks/farthest_point_curves.py > benchmarks/results/h200_fps.csv
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from any2point.ops import farthest_point_sample

SIZES = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_000_000)


def cloud(kind: str, batch: int, n: int) -> Tensor:
    """``[B, N, 3]`` on the GPU."""
    generator = torch.Generator("cuda").manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cuda")

    if kind == "cube":
        return uniform(batch, n, 3)
    if kind == "ball":
        direction = torch.nn.functional.normalize(normal(batch, n, 3), dim=-1)
        return direction * uniform(batch, n, 1) ** (1 / 3)
    if kind == "sphere":
        return torch.nn.functional.normalize(normal(batch, n, 3), dim=-1)
    if kind == "clusters":
        group = torch.randint(0, 20, (batch, n), generator=generator, device="cuda")
        centers = uniform(batch, 20, 3).gather(1, group[..., None].expand(-1, -1, 3))
        return 2 * centers + 0.002 * (1 + group[..., None] ** 2) * normal(batch, n, 3)
    if kind == "lattice":
        return (uniform(batch, n, 3) * (16 if n <= 20_000 else 64)).floor()
    if kind == "rings":
        angle, ring = uniform(batch, n) * 6.2832, (uniform(batch, n) * 16).floor() + 1
        return torch.stack([ring * angle.cos(), ring * angle.sin(), torch.full_like(ring, -1.8)], -1)
    raise ValueError(f"kind: unknown {kind!r}")


def cases() -> Iterator[tuple[str, int, int, int]]:
    """(kind, B, N, M)."""
    for n in SIZES:
        yield "ball", 1, n, n // 4
    for batch, n, m in ((32, 1024, 512), (32, 2048, 512), (32, 8192, 2048), (8, 16_384, 4096)):
        for kind in ("ball", "sphere", "clusters", "lattice", "rings"):
            yield kind, batch, n, m
    for kind in ("ball", "sphere", "clusters", "lattice", "rings"):
        yield kind, 1, 100_000, 25_000
    for m in (64, 128, 256, 512, 1024, 4096, 16_384, 65_536, 100_000):
        yield "ball", 1, 100_000, m
    yield "ball", 1, 1_000_000, 250_000


def microseconds(points: Tensor, num_samples: int) -> list[float]:
    """Of each of up to 30 calls, after a warm-up of a quarter second."""
    begin, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - begin < 0.25:
        farthest_point_sample(points, num_samples)
        torch.cuda.synchronize()
        calls += 1
    times = []
    for _ in range(30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        farthest_point_sample(points, num_samples)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return times


def main() -> None:
    device, torch_version = torch.cuda.get_device_name(), torch.__version__
    print("cloud,batch,points,samples,p20_us,p50_us,p80_us,device,torch")
    for kind, batch, n, m in dict.fromkeys(cases()):
        fifths = statistics.quantiles(microseconds(cloud(kind, batch, n), m), n=10)
        times = ",".join(f"{fifths[k]:.5g}" for k in (1, 4, 7))
        print(f"{kind},{batch},{n},{m},{times},{device},{torch_version}", flush=True)


if __name__ == "__main__":
    main()
