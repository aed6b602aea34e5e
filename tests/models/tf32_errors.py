"""The model in precision tf32, and the composition of torch ops under TF32, against float64.

For a test and for scripts/compare_tf32.py, which says what is compared.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import golden
import torch
from torch import Tensor

from any2point import Any2Point, ops, reference
from any2point.bench import peers
from any2point.bench.timing import products
from any2point.data import sample_set
from any2point.train.runtime import autocast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OURS, TORCH = "ours", "torch"
QUIET = {"attention_dropout": 0.0, "drop_path": 0.0, "adapter_dropout": 0.0, "dropout": 0.0}


def _exact(*args: Any, operand_dtype: Any = None, recompute: bool = False, **options: Any) -> Tensor:
    return reference.local_aggregate(*args, **options, group=peers.torch_group)


def _guided(*args: Any, plan: Any = None, **options: Any) -> Tensor:
    return peers.torch_guided_aggregate(*args, **options)


# What a part of the model is replaced by: places and functions.
PARTS: dict[str, list[tuple[str, Callable[..., Any]]]] = {
    "local_aggregate": [("any2point.nn.tokenizer.local_aggregate", peers.torch_local_aggregate)],
    "guided_aggregate": [("any2point.nn.adapter.guided_aggregate", _guided)],
    "virtual_project": [("any2point.nn.projection.virtual_project", peers.torch_virtual_project)],
    "rounding": [("any2point.triton.local_aggregate_residual.add_rounding", lambda *_: None)],
    "MLP": [("any2point.sources.encoder.half_mlp", lambda *_: None)],
    "blocks": [("any2point.sources.glue.has_kernels", lambda _: False)],
}


@contextlib.contextmanager
def composed(*parts: str) -> Iterator[None]:
    """Parts of models made of torch ops, while inside."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            for place, function in PARTS[part]:
                stack.enter_context(mock.patch(place, function))
        yield


class Model:
    """An official variant, with the same one in float64."""

    def __init__(self, variant: str) -> None:
        state, table = golden.state_dict(variant, hot=True), golden.position_table(variant, hot=True)
        model = Any2Point.from_official(state, variant, position_table=table, **QUIET)
        self.single = model.to(DEVICE)
        self.double = copy.deepcopy(self.single).double()
        self.buffers = {name: value.clone() for name, value in self.single.named_buffers()}

    @torch.no_grad()
    def decide(self, points: Tensor) -> None:
        """Neighbours, cells and voxels for all runs."""
        self.near = self.single.neighborhoods(points)
        centers = ops.group(points, self.near.index)
        self.cell = self.single.projection(centers).cell
        self.voxels = ops.voxel_cluster(centers, self.single.config.voxel_size)

    @contextlib.contextmanager
    def decided(self, model: Any2Point) -> Iterator[None]:
        project = model.projection.forward
        with (
            mock.patch("any2point.models.any2point.voxel_cluster", return_value=self.voxels),
            mock.patch.object(
                model.projection, "forward", lambda centers: project(centers)._replace(cell=self.cell)
            ),
        ):
            yield

    def results(self, points: Tensor, labels: Tensor, precision: str) -> dict[str, Tensor]:
        """Logits in evaluation, and logits and gradients of a training step from the same state."""
        exact = precision == "fp64"
        model, points = (self.double, points.double()) if exact else (self.single, points)
        precision = "fp32" if exact else precision
        with self.decided(model), autocast(precision, points.device):
            with torch.no_grad():
                found = {"evaluation logits": model.eval()(points, neighborhoods=self.near).double()}
            logits = model.train()(points, neighborhoods=self.near)
        model.zero_grad()
        with products(precision):
            torch.nn.functional.cross_entropy(logits, labels).backward()
        found["training logits"] = logits.detach().double()
        groups = defaultdict(list)
        for name, p in model.named_parameters():
            if p.grad is not None:
                groups["gradients"].append(p.grad.flatten().double())
                if (part := model.part_of(name)) != "class token":  # rounding alone in the text model
                    groups[f"gradients: {part}"].append(p.grad.flatten().double())
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(self.buffers[name])
        return found | {name: torch.cat(each) for name, each in groups.items()}


def stage_results(
    function: Callable[..., Tensor],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    grad: Tensor,
    precision: str,
) -> dict[str, Tensor]:
    """Result and gradients of local aggregation; `grad` is that of the result."""
    dtype = grad.dtype
    leaves: list[Tensor] = []

    def cast(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point():
            return x.detach().to(dtype, copy=True)
        if isinstance(x, tuple):
            parts = [cast(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return [cast(part) for part in x] if isinstance(x, list) else x

    points, features, center, neighbor, units = (cast(x) for x in arguments)
    leaves.append(features.requires_grad_())
    for unit in units:
        leaves += [unit.in_weight, unit.out_weight, *unit.in_norm[:2], *unit.out_norm[:2]]
    for leaf in leaves:
        leaf.requires_grad_()
    with products(precision):
        out = function(points, features, center, neighbor, units, **options)
        found = torch.autograd.grad(out, leaves, grad)
    return {
        "result": out.detach().double(),
        "gradient of features": found[0].double(),
        "gradients of weights": torch.cat([each.flatten().double() for each in found[1:]]),
    }


class Table:
    """Relative errors by what was computed and how."""

    def __init__(self) -> None:
        self.errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, name: str, how: str, got: Tensor, want: Tensor) -> None:
        self.errors[name][how].append(float((got - want).norm() / want.norm()))

    def error(self, name: str, how: str) -> float:
        """The root mean square over the batches."""
        return statistics.fmean(each * each for each in self.errors[name][how]) ** 0.5

    def line(self, name: str, how: str) -> str:
        mine, other = self.error(name, how), self.error(name, TORCH)
        pairs = zip(self.errors[name][how], self.errors[name][TORCH])
        ratios = sorted(error / base for error, base in pairs)
        return (
            f"{name:32} {how:24} {mine:.2e}, torch {other:.2e}, ratio {mine / other:.2f}; batches: "
            f"median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )

    def lines(self) -> Iterator[str]:
        for name, each in self.errors.items():
            yield from (self.line(name, how) for how in each if how != TORCH)


def batch_of(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Clouds of 1024 points with noise, as a scanner has it (flat surfaces give NaN), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    data = sample_set("train")
    rows = torch.randperm(len(data), generator=generator)[:size]
    chosen = torch.randperm(data.points.shape[1], generator=generator)[:1024]
    points = data.points[rows][:, chosen]
    points = points + 0.002 * torch.randn(points.shape, generator=generator)
    return points.to(DEVICE), data.labels[rows].to(DEVICE)


def measure(model: Model, points: Tensor, labels: Tensor, table: Table, replace: Sequence[str] = ()) -> None:
    """One batch; `replace`: parts that the model is also measured without."""
    model.decide(points)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def recorded(*args: Any, **options: Any) -> Tensor:
        out = _exact(*args, **options)
        if options["training"]:
            out.retain_grad()
            calls.append((args, options, out))
        return out

    with mock.patch("any2point.nn.tokenizer.local_aggregate", recorded):
        want = model.results(points, labels, "fp64")
    for stage, (args, options, out) in enumerate(calls):
        options = options | {"momentum": 0.0}
        grad = out.grad
        exact = stage_results(_exact, args, options, grad, "fp32")
        half = options | {"operand_dtype": torch.float16}
        for how, function, given in (
            (OURS, ops.local_aggregate, half),
            (TORCH, peers.torch_local_aggregate, options),
            *((f"torch's {part}", ops.local_aggregate, half) for part in replace if part == "rounding"),
        ):
            with composed(*(part for part in replace if how == f"torch's {part}")):
                got = stage_results(function, args, given, grad.float(), "tf32")
            for name, value in got.items():
                table.add(f"stage {stage + 1}: {name}", how, value, exact[name])
        del exact
    calls.clear()
    runs: dict[str, tuple[str, ...]] = {OURS: (), TORCH: tuple(PARTS)}
    runs |= {f"torch's {part}": (part,) for part in replace}
    for how, parts in runs.items():
        with composed(*parts):
            for name, value in model.results(points, labels, "tf32").items():
                table.add(name, how, value, want[name])
