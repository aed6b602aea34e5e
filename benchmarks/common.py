"""What every benchmark shares: inputs, floors, checks, interleaved timing, and the row that is written down.

Inputs are made from seeds. A floor is what no implementation can beat: the bytes that must move, over the
machine's measured copy bandwidth. `direct` is the arithmetic of the direct (all pairs) method over the
machine's rate: methods that prune may beat it.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def cloud(kind: str, batch: int, rows: int, seed: int = 0) -> np.ndarray:
    """Clouds as float32 [batch, rows, 3]: `cube`, `ball` (uniform volumes) or `surface` (a bumpy shell)."""
    rng = np.random.default_rng(seed)
    if kind == "cube":
        return rng.random((batch, rows, 3), dtype=np.float32)
    direction = rng.standard_normal((batch, rows, 3))
    direction /= np.linalg.norm(direction, axis=-1, keepdims=True)
    if kind == "ball":
        radius = rng.random((batch, rows, 1)) ** (1 / 3)
    elif kind == "surface":
        waves = np.sin(5 * direction[..., 0]) * np.sin(7 * direction[..., 1])
        radius = 0.7 + 0.2 * waves[..., None] + 0.005 * rng.standard_normal((batch, rows, 1))
    else:
        raise ValueError(f"`kind`: expected 'cube', 'ball' or 'surface', got {kind!r}")
    return (direction * radius).astype(np.float32)


@dataclass(frozen=True)
class Cost:
    """Bytes that must move (inputs read, outputs written, once) and lane operations of the direct method."""

    bytes: int
    operations: int = 0

    def us(self, machine: Machine) -> tuple[float, float]:
        """(floor, direct) in microseconds."""
        return self.bytes / machine.bandwidth * 1e6, self.operations / machine.lanes * 1e6


def cost_farthest_point_sample(batch: int, rows: int, samples: int) -> Cost:
    # A pair: 3 differences, 3 multiply-adds, min, running maximum.
    return Cost(batch * (12 * rows + 8 * samples), batch * rows * max(samples - 1, 0) * 8)


def cost_knn(batch: int, queries: int, rows: int, k: int) -> Cost:
    # A pair: 3 differences, 3 multiply-adds, 1 comparison.
    return Cost(batch * (12 * (queries + rows) + 12 * queries * k), batch * queries * rows * 7)


def cost_group(batch: int, rows: int, queries: int, k: int, width: int) -> Cost:
    return Cost(batch * (4 * rows * width + 8 * queries * k + 4 * queries * k * width))


def cost_interpolate(batch: int, rows: int, queries: int, k: int, width: int) -> Cost:
    return Cost(
        batch * (4 * rows * width + 12 * queries * k + 4 * queries * width), batch * queries * k * width
    )


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from, with the two ceilings measured on it (one thread, or one GPU)."""

    device: str
    driver: str
    cuda: str
    torch: str
    simd: str
    bandwidth: float  # bytes per second of a large copy, read + write
    lanes: float  # float32 multiply-adds (or other lane operations) per second


@cache
def cpu() -> Machine:
    source = np.ones(1 << 24, dtype=np.float32)
    target = np.empty_like(source)
    copy = min(_timed(lambda: np.copyto(target, source)) for _ in range(5))
    a = torch.randn(512, 512)
    product = min(_timed(lambda: a @ a) for _ in range(5))
    import any2point.ops  # noqa: F401  (registers the ops)

    return Machine(
        device=_cpu_name(),
        driver="",
        cuda="",
        torch=torch.__version__,
        simd=torch.ops.any2point._simd(""),
        bandwidth=2 * source.nbytes / copy,
        lanes=512**3 / product,
    )


@cache
def gpu() -> Machine:
    """The current CUDA device; its lane rate is 128 per multiprocessor and clock at the highest clock."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        driver, clock = (
            subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
        )
    except (OSError, IndexError, ValueError):
        driver, clock = "", "1000"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return Machine(
        device=properties.name,
        driver=driver,
        cuda=torch.version.cuda or "",
        torch=torch.__version__,
        simd="",
        bandwidth=2 * 4 * source.numel() / min(times),
        lanes=properties.multi_processor_count * 128 * float(clock) * 1e6,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def check_samples(index: Any, reference: Any, *, exact: bool = True, match: float = 0.0) -> float:
    """The fraction of equal picks; raises where it is under `match` (1 if `exact`)."""
    index, reference = np.asarray(index).astype(np.int64), np.asarray(reference).astype(np.int64)
    if index.shape != reference.shape:
        raise AssertionError(f"picks: expected shape {reference.shape}, got {index.shape}")
    same = float((index == reference).mean())
    if same < (1.0 if exact else match):
        raise AssertionError(f"picks: only {same:.4%} are those of the reference")
    return same


def check_neighbors(
    index: Any, distance: Any, reference: Any, *, tolerance: float = 1e-5, match: float = 0.999
) -> float:
    """Neighbours as sets, and their squared distances; returns the fraction of equal entries."""
    index, expected = np.sort(np.asarray(index), -1), np.sort(np.asarray(reference[0]), -1)
    same = float((index == expected).mean())
    if same < match:
        raise AssertionError(f"neighbours: only {same:.4%} are those of the reference")
    np.testing.assert_allclose(
        np.sort(np.asarray(distance), -1), np.sort(np.asarray(reference[1]), -1), rtol=tolerance, atol=1e-6
    )
    return same


def _timed(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    begin = clock()
    function()
    return clock() - begin


def interleave(
    functions: dict[str, Callable[[], Any]], *, rounds: int = 15, slice_seconds: float = 0.01
) -> dict[str, list[float]]:
    """CPU seconds per call, one value a round; every round runs all functions, so that noise hits all alike.

    CPU time of the process: on a busy machine short calls fit between two interruptions and long ones do not,
    so wall time would favour the faster function. More threads than one count as what they cost.

    A value is the median call of a slice of at least `slice_seconds` (at least one call).
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for turn in range(rounds):
        names = list(functions)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            calls: list[float] = []
            while sum(calls) < slice_seconds:
                calls.append(_timed(functions[name], time.process_time))
            times[name].append(float(np.median(calls)))
    return times


@dataclass
class Row:
    """One measurement. Times in microseconds; `match` = fraction of results equal to ours."""

    op: str
    provider: str
    shape: str
    mode: str
    dtype: str = "float32"
    p20_us: float = 0.0
    p50_us: float = 0.0
    p80_us: float = 0.0
    floor_us: float = 0.0
    direct_us: float = 0.0
    mem_mb: float | None = None
    match: float | None = None
    device: str = ""
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    commit: str = ""
    command: str = ""
    date: str = ""

    def place(self, machine: Machine, *, revision: str = "") -> Row:
        """Fills in where, when and by which command."""
        self.device, self.driver, self.cuda, self.torch = (
            machine.device,
            machine.driver,
            machine.cuda,
            machine.torch,
        )
        self.commit = revision or commit()
        self.command = self.command or " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        self.date = datetime.date.today().isoformat()
        return self


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV; a row measured before under the same name is replaced."""
    names = [field.name for field in fields(Row)]
    key = ("op", "provider", "shape", "mode", "dtype", "device")
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for old in csv.DictReader(file):
                kept[tuple(old[name] for name in key)] = old
    for row in rows:
        values = {
            k: (f"{v:.5g}" if isinstance(v, float) else "" if v is None else v)
            for k, v in asdict(row).items()
        }
        kept[tuple(str(values[name]) for name in key)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    temporary.replace(path)
