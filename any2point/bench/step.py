"""Which part of a training or evaluation step takes what: times by part, against each part's floor.

The parts of a model are labelled while a profiler runs. What belongs to a label in the forward pass is seen
directly; a step of the backward pass belongs to the part whose forward made it, which autograd's sequence
numbers tell. On a GPU a part's time is that of its kernels, on a CPU that of its operations. Whole steps are
timed apart from the profiler, eagerly and as one CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from any2point.bench.timing import Call, Settings, event_times, interleave, peak, products
from any2point.models import Any2Point
from any2point.train.captured import capture
from any2point.train.optimizer import AdamW
from any2point.train.runtime import autocast

_LABEL = "any2point part: "
# Ops that are a part by themselves, wherever they are called.
_OPS = {
    "any2point::farthest_point": "farthest points",
    "any2point::knn": "nearest neighbours",
    "any2point::voxel_cluster": "virtual projection",
}
REST = "the rest"
LOSS, OPTIMIZER = "loss", "optimizer"


def parts_of(model: Any2Point) -> list[str]:
    """The parts of a model in the order in which they compute, and those of a training step behind them."""
    stages = getattr(model.tokenizer, "sizes", ())
    aggregation = [f"local aggregation {stage + 1}" for stage in range(len(stages))]
    tokenizer = ["farthest points", "nearest neighbours", *aggregation, "tokenizer, other"]
    encoder = ["attention", "MLP", "adapter", "guided aggregation"]
    return [*tokenizer, "virtual projection", *encoder, "head", LOSS, OPTIMIZER, REST]


@dataclass
class Part:
    """What one part of a step takes: microseconds forward and backward, and launches of kernels."""

    forward: float = 0.0
    backward: float = 0.0
    launches: int = 0


@dataclass
class Profile:
    """A step by parts, and as a whole.

    Attributes:
        parts: by name, in the order of computation.
        eager: microseconds of whole steps.
        graph: of whole steps replayed as one CUDA graph, or None.
        launches: kernels, copies and fills of an eager step; 0 on a CPU.
        memory: peak MB of a step beyond the model.
        note: why there is no graph.
    """

    parts: dict[str, Part]
    eager: list[float]
    graph: list[float] | None = None
    launches: int = 0
    memory: float = 0.0
    note: str = ""


@dataclass
class Step:
    """A model with data, and what is done in a step.

    Attributes:
        model: on its device.
        points: `[B, N, 3]`.
        precision: "fp32" (of products torch's own setting decides), "tf32", "bf16" or "fp16".
        training: forward, backward, clipping and AdamW, or evaluation alone.
    """

    model: Any2Point
    points: Tensor
    precision: str
    training: bool
    optimizer: AdamW = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.labels = torch.arange(len(self.points), device=self.points.device)
        self.labels %= self.model.config.num_classes
        self.optimizer = AdamW(self.model.parameter_groups(), lr=1e-5)
        self.model.train(self.training)

    def logits(self) -> Tensor:
        with autocast(self.precision, self.points.device):
            return self.model(self.points)

    def gradients(self, *_: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward; gradients are left in the parameters."""
        with products(self.precision):
            logits = self.logits()
            with record_function(_LABEL + LOSS):
                loss = nn.functional.cross_entropy(logits.float(), self.labels)
            loss.backward()
        return loss.detach(), logits.detach()

    def update(self) -> None:
        with record_function(_LABEL + OPTIMIZER):
            self.optimizer.clipped_step(10.0)

    def __call__(self) -> Any:
        if not self.training:
            with torch.no_grad():
                return self.logits()
        self.optimizer.zero_grad(set_to_none=True)
        result = self.gradients()
        self.update()
        return result

    def captured(self) -> Call:
        """The same as one CUDA graph (with an update behind it that is launched by itself)."""
        if self.training:
            replay = capture(self.gradients, self.model, [self.labels])

            def run() -> None:
                replay()
                self.update()

            return run
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay


def profile_step(step: Step, settings: Settings, *, parts: bool = True) -> Profile:
    """Parts (unless there shall be none) and whole of a step, after a check that its results are finite."""
    for _ in range(3):
        result = step()
    values = result if isinstance(result, Tensor) else result[0]
    if not bool(values.isfinite().all()):
        raise AssertionError("the step's results are not finite")
    each, launches = _parts(step) if parts else ({}, 0)
    memory = peak(step, step.points.device.type)
    if not step.points.is_cuda:
        times = interleave({"": step}, rounds=max(3, int(settings.seconds * 10)), clock=settings.clock)[""]
        return Profile(each, [1e6 * seconds for seconds in times], memory=memory)
    eager = event_times([step], warmup=settings.warmup, seconds=max(settings.seconds, 0.5))
    found = Profile(each, eager, launches=launches, memory=memory)
    if settings.graph:
        try:
            replay = step.captured()
            found.graph = event_times([replay], warmup=settings.warmup, seconds=max(settings.seconds, 0.5))
        except (RuntimeError, ValueError) as error:
            found.note = (str(error).splitlines() or [repr(error)])[0]
    return found


@contextlib.contextmanager
def labelled(model: Any2Point) -> Iterator[None]:
    """The parts of the model under their names in a profile, while inside."""
    wrapped: list[tuple[nn.Module, str]] = []

    def wrap(module: Any, method: str, name: str, *, numbered: bool = False) -> None:
        function: Callable[..., Any] | None = getattr(module, method, None)
        if function is None:
            return

        def run(*args: Any, **options: Any) -> Any:
            with record_function(_LABEL + (f"{name} {args[0] + 1}" if numbered else name)):
                return function(*args, **options)

        setattr(module, method, run)
        wrapped.append((module, method))

    wrap(model.tokenizer, "forward", "tokenizer, other")
    wrap(model.tokenizer, "_aggregate", "local aggregation", numbered=True)
    wrap(model.projection, "forward", "virtual projection")
    if model.positions is not None:
        wrap(model.positions, "forward", "virtual projection")
    for block, guided in zip(model.encoder.source.blocks, model.encoder.adapters):
        for method in ("attend", "attend_ahead", "attend_stacked"):
            wrap(block, method, "attention")
        for method in ("transform", "transform_stacked"):
            wrap(block, method, "MLP")
        wrap(guided, "forward", "guided aggregation")
        for method in ("forward", "join", "join_stacked"):
            wrap(getattr(guided, "adapter", None), method, "adapter")
    wrap(model.head, "forward", "head")
    try:
        yield
    finally:
        for module, method in wrapped:
            delattr(module, method)


def _parts(step: Step) -> tuple[dict[str, Part], int]:
    """The quietest of a few steps, part by part; a GPU is quiet by itself."""
    runs = [_trace(step) for _ in range(1 if step.points.is_cuda else 3)]
    best = {name: Part() for name in parts_of(step.model)}
    for name, part in best.items():
        part.forward = min(run[name].forward for run in runs)
        part.backward = min(run[name].backward for run in runs)
        part.launches = runs[-1][name].launches
    return best, sum(part.launches for part in best.values())


def _trace(step: Step) -> dict[str, Part]:
    """Times by part in one step."""
    on_gpu = step.points.is_cuda
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with labelled(step.model), profile(activities=activities, acc_events=True) as trace:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CPU]
    made: dict[int, str] = {}  # sequence number -> part whose forward made that step of the backward pass
    for event in events:
        if event.sequence_nr >= 0 and _backward_root(event) is None:
            made[event.sequence_nr] = _part(event)
    parts = {name: Part() for name in parts_of(step.model)}
    for event in events:
        root = _backward_root(event)
        name = _part(event) if root is None else made.get(root.sequence_nr, REST)
        part = parts[name if name in parts else REST]
        # A label comes back from the GPU as if it were a kernel.
        kernels = [kernel for kernel in event.kernels if not kernel.name.startswith(_LABEL)]
        spent = sum(kernel.duration for kernel in kernels) if on_gpu else event.self_cpu_time_total
        if root is None:
            part.forward += spent
        else:
            part.backward += spent
        part.launches += len(kernels)
    return parts


def _backward_root(event: Any) -> Any | None:
    """The step of the backward pass that an event is part of."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def _part(event: Any) -> str:
    """The innermost part that an event of the forward pass is in."""
    while event is not None:
        if event.name.startswith(_LABEL):
            return event.name[len(_LABEL) :]
        for prefix, name in _OPS.items():
            if event.name.startswith(prefix):
                return name
        event = event.cpu_parent
    return REST
