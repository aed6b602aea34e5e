"""Times on CPU and CUDA: warm-up, events, graph replay, peak memory, and the ceilings of the machine."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from any2point.sources.linear import Linear

Call = Callable[[], Any]


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from, with the ceilings measured on it (of the threads in use, or of one GPU).

    Attributes:
        device: the name of the processor.
        bandwidth: bytes per second of a large copy, read and write.
        lanes: float32 multiply-adds (or other lane operations) per second.
        matrix: multiply-adds per second of a large matrix product, in half precision on a GPU.
        clock_mhz: of the multiprocessors, warm, or of the first core.
    """

    device: str
    driver: str
    cuda: str
    torch: str
    triton: str
    simd: str
    bandwidth: float
    lanes: float
    matrix: float
    clock_mhz: float


@cache
def cpu() -> Machine:
    """This machine's CPU with the threads that torch uses at the first call; the copy is one thread's."""
    source = np.ones(1 << 24, dtype=np.float32)
    target = np.empty_like(source)
    copy = min(timed(lambda: np.copyto(target, source)) for _ in range(5))
    rate = matrix_rate("cpu", "fp32")
    import any2point.ops  # noqa: F401  (registers the ops)

    name, clock = _cpu_name()
    return Machine(
        device=name,
        driver="",
        cuda="",
        torch=torch.__version__,
        triton="",
        simd=torch.ops.any2point._simd(""),
        bandwidth=2 * source.nbytes / copy,
        lanes=rate,
        matrix=rate,
        clock_mhz=clock,
    )


@cache
def gpu() -> Machine:
    """The current CUDA device; its lane rate is 128 per multiprocessor and clock at the highest clock."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    floats = min(1 << 28, properties.total_memory // 64)
    source = torch.ones(floats, device="cuda")
    target = torch.empty_like(source)
    copy = min(event_times([lambda: target.copy_(source)], warmup=0.2, seconds=0.1)) / 1e6
    driver, clock, highest = _nvidia_smi("driver_version", "clocks.sm", "clocks.max.sm")
    return Machine(
        device=properties.name,
        driver=driver,
        cuda=torch.version.cuda or "",
        torch=torch.__version__,
        triton=_triton_version(),
        simd="",
        bandwidth=2 * 4 * floats / copy,
        lanes=properties.multi_processor_count * 128 * float(highest or 1000) * 1e6,
        matrix=matrix_rate("cuda", "fp16"),
        clock_mhz=float(clock or 0),
    )


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """Products of float32 with rounded operands on a GPU, for "tf32", while inside."""
    before = torch.backends.cuda.matmul.fp32_precision
    if precision == "tf32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@cache
def matrix_rate(device: str, precision: str) -> float:
    """Multiply-adds a second of a large product in "fp32" (as torch is set), "tf32", "bf16" or "fp16"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 512 if device == "cpu" else 8192
    if device == "cuda" and torch.cuda.get_device_properties(0).total_memory < 8e9:
        size = 4096
    a = torch.randn(size, size, device=device).to(dtype)
    if device == "cuda":
        with products(precision):
            return size**3 / (min(event_times([lambda: a @ a], warmup=0.2, seconds=0.1)) / 1e6)
    layer = Linear(size, size, bias=False, dtype=dtype).requires_grad_(False)
    ways: list[Call] = [lambda: a @ a, lambda: layer(a)]
    return size**3 / min(timed(way) for way in ways for _ in range(50))


def machine_of(device: str) -> Machine:
    """The machine behind "cpu" or "cuda"."""
    return gpu() if device == "cuda" else cpu()


def _nvidia_smi(*names: str) -> list[str]:
    query = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return [""] * len(names)
    values = [value.strip() for value in line.split(",")]
    return values if len(values) == len(names) else [""] * len(names)


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return triton.__version__


def _cpu_name() -> tuple[str, float]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    values = dict(reversed([line.split(":", 1) for line in lines if ":" in line]))
    fields = {name.strip(): value.strip() for name, value in values.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, float(fields.get("cpu MHz", 0))


def timed(function: Call, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    begin = clock()
    function()
    return clock() - begin


def interleave(
    functions: dict[str, Call],
    *,
    rounds: int = 15,
    slice_seconds: float = 0.01,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds per call, one value a round; every round runs all functions, so that noise hits all alike.

    By default CPU time of the process: on a busy machine short calls fit between two interruptions and long
    ones do not, so wall time would favour the faster function. More threads than one count as what they cost.

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
                calls.append(timed(functions[name], clock))
            times[name].append(float(np.median(calls)))
    return times


@dataclass
class Settings:
    """How long and by which clock something is measured.

    Attributes:
        warmup: seconds before each measurement on a GPU.
        seconds: about how long a measurement takes.
        graph: also replay CUDA graphs.
        compile: also measure what torch.compile makes of the composition in torch.
        cpu_time: count the CPU's time instead of the wall's.
    """

    warmup: float = 0.5
    seconds: float = 0.3
    graph: bool = True
    compile: bool = False
    cpu_time: bool = False
    side: Any = field(default=None, repr=False)  # the stream on which graphs are captured

    @property
    def clock(self) -> Callable[[], float]:
        return time.process_time if self.cpu_time else time.perf_counter


def event_times(calls: Sequence[Call], *, warmup: float, seconds: float) -> list[float]:
    """Microseconds per call between CUDA events, in turn over `calls`."""
    begin, count = time.perf_counter(), 0
    while count < 1 or time.perf_counter() - begin < warmup:
        calls[count % len(calls)]()
        torch.cuda.synchronize()
        count += 1
    each = (time.perf_counter() - begin) / count
    repeats = int(np.clip(seconds / each, 3, 200))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def graph_times(calls: Sequence[Call], settings: Settings) -> list[float]:
    """Microseconds per call inside one graph of all `calls`; the replay must give what the calls gave."""
    if settings.side is None:
        settings.side = torch.cuda.Stream()
    side = settings.side
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [[part.clone() for part in tensors(call())] for call in calls]
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = [tensors(call()) for call in calls]
    for parts in captured:
        for part in parts:
            part.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    for parts, wanted in zip(captured, expected):
        for part, want in zip(parts, wanted):
            torch.testing.assert_close(part, want, rtol=1e-3, atol=1e-3)
    times = event_times([graph.replay], warmup=settings.warmup, seconds=settings.seconds)
    graph.reset()
    return [each / len(calls) for each in times]


def tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists, in order, detached."""
    return [part.detach() for part in flatten(value)]


def flatten(value: Any) -> list[Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [part for item in value for part in flatten(item)]
    return []


def peak(call: Call, device: str) -> float:
    """MB that a call has allocated through torch at its peak beyond what was there."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as trace:
        result = call()  # kept until the trace ends, as on a GPU
    del result
    changes = [
        (event.start_ns(), event.nbytes())
        for event in trace.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    total = highest = 0
    for _, size in sorted(changes):
        total += size
        highest = max(highest, total)
    return highest / 1e6
