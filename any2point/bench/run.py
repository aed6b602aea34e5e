"""Measures cases: each provider's result is checked first, and only what is right is timed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch._functorch.config as functorch

from any2point.bench import cases, feature_cases, peers
from any2point.bench.cases import Case, Provider, check_close
from any2point.bench.table import Reporter, Row, is_ours, time_text
from any2point.bench.timing import (
    Call,
    Machine,
    Settings,
    event_times,
    flatten,
    graph_times,
    interleave,
    machine_of,
    peak,
    products,
)

MODES = {"both": "forward+backward"}
# op -> its cases on a device
OPS: dict[str, Callable[[str], Iterator[Case]]] = {
    "farthest_point_sample": cases.farthest_point_sample,
    "farthest_point_hierarchy": cases.farthest_point_hierarchy,
    "knn": cases.knn,
    "ball_query": cases.ball_query,
    "group": feature_cases.group,
    "interpolate": feature_cases.interpolate,
    "voxel_cluster": feature_cases.voxel_cluster,
    "segment_pool": feature_cases.segment_pool,
    "virtual_project": feature_cases.virtual_project,
    "local_aggregate": feature_cases.local_aggregate,
    "guided_aggregate": feature_cases.guided_aggregate,
}


def op_cases(
    names: Sequence[str], device: str, *, quick: bool = False, folder: str | None = None
) -> Iterator[Case]:
    """The cases of ops, made when they are asked for.

    Args:
        names: of `OPS`, or none for all.
        device: "cpu" or "cuda".
        quick: the smallest of every op alone.
        folder: with other libraries for GPUs, see `any2point.bench.peers`.
    """
    for name in names:
        if name not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {name!r}")
    rivals = peers.gpu_peers(folder) if device == "cuda" else {}
    for name in names or OPS:
        for case in OPS[name](device):
            _add_rivals(case, rivals)
            yield case
            if quick:
                break


def _add_rivals(case: Case, rivals: dict[str, Any]) -> None:
    """The libraries that have the op of a case, under its name or, if it is a chain of theirs, its parts'."""
    if case.op == "knn" and case.inputs[0][1].shape[1] >= 1_000_000:
        return  # scans would take seconds
    known = {"farthest_point_sample": "fps", "farthest_point_hierarchy": "fps"}
    for name, peer in rivals.items():
        op = getattr(peer, known.get(case.op, case.op), None) or getattr(peer, "extra", {}).get(case.op)
        if op is None:
            continue
        if case.op == "farthest_point_hierarchy":
            graph = _levels(op.graph, op) if op.graph else None
            case.providers.append(Provider(name, _levels(op.run, op), graph=graph))
        else:
            case.providers.append(Provider.of(name, op))


def _levels(function: Callable[..., Any], op: Any) -> Callable[..., Any]:
    """Farthest points of another library, level after level."""

    def run(points: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
        levels: list[torch.Tensor] = []
        for size in counts:
            index = op.finish(function(*op.prepare(points, size)), points, size)
            points = points.gather(1, index[..., None].expand(-1, -1, 3))
            levels.append(levels[-1].gather(1, index) if levels else index)
        return levels

    return run


# `any2point bench op --scaling`: what is varied -> op -> shapes by that number
SCALING: dict[str, dict[str, Callable[[int], tuple[Any, ...]]]] = {
    "points": {
        "farthest_point_sample": lambda rows: (1, rows, rows // 4),
        "knn": lambda rows: (1, rows, rows, 16),
    },
    "clouds": {
        "farthest_point_sample": lambda batch: (batch, 1024, 512),
        "knn": lambda batch: (batch, 512, 1024, 32),
        "group": lambda batch: (batch, 1024, 96, 512, 32),
    },
}
_MOST_OF_OTHERS = 1 << 14  # points: more take other libraries seconds a call


def scaling_cases(
    names: Sequence[str], device: str, over: str, *, folder: str | None = None
) -> Iterator[Case]:
    """Forward of some ops over the number of points or of clouds.

    Args:
        names: of `SCALING[over]`, or none for all.
        device: "cpu" or "cuda".
        over: "points" of one cloud, or "clouds" of 1024 points.
        folder: with other libraries for GPUs, see `any2point.bench.peers`.
    """
    if over not in SCALING:
        raise ValueError(f"scaling: expected one of {', '.join(SCALING)}, got {over!r}")
    for name in names:
        if name not in SCALING[over]:
            raise ValueError(f"op: expected one of {', '.join(SCALING[over])}, got {name!r}")
    largest = {"points": 17 if device == "cpu" else 20, "clouds": 4 if device == "cpu" else 7}[over]
    numbers = [1 << power for power in range(10 if over == "points" else 0, largest + 1)]
    rivals = peers.gpu_peers(folder) if device == "cuda" else {}
    for name in names or SCALING[over]:
        make: Any = OPS[name]
        for case in make(device, [SCALING[over][name](number) for number in numbers]):
            if over == "clouds" or case.inputs[0][0].shape[1] <= _MOST_OF_OTHERS:
                _add_rivals(case, rivals)
            case.backward = False
            yield case


def measure_cases(
    found: Iterable[Case],
    device: str,
    settings: Settings,
    say: Reporter,
    *,
    done: Callable[[list[Row]], None] | None = None,
    revision: str = "",
) -> tuple[list[Row], list[str]]:
    """Rows of all cases, and what was wrong with results of ours.

    Args:
        found: the cases.
        device: "cpu" or "cuda".
        settings: how they are timed.
        say: takes lines on what is going on.
        done: takes all rows after every case.
        revision: what to write into the rows as commit.
    """
    machine = machine_of(device)
    rows: list[Row] = []
    wrong: list[str] = []
    for case in found:
        begin = time.perf_counter()
        new, errors = measure(case, device, settings, machine)
        for provider, error in errors.items():
            say(f"  {case.op} {case.shape} {provider}: NOT TIMED: {error}")
        if any(provider.startswith("any2point") for provider in errors):
            wrong.append(f"{case.op} {case.shape}: {'; '.join(errors.values())}")
        rows += [row.place(machine, revision=revision) for row in new]
        cells = ", ".join(f"{r.provider} {r.mode} {time_text(r.p50_us)}" for r in new if is_ours(r))
        say(f"  {case.op} {case.shape}: {cells} ({time.perf_counter() - begin:.0f} s)")
        if done is not None:
            done(rows)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows, wrong


def measure(
    case: Case, device: str, settings: Settings, machine: Machine
) -> tuple[list[Row], dict[str, str]]:
    """Rows of a case, and why a provider has none: without a right result of ours nobody has one."""
    providers = list(case.providers)
    if settings.compile and case.compilable is not None:
        providers.append(compiled(case))
    matches: dict[str, float] = {}
    errors: dict[str, str] = {}
    for provider in providers:
        try:
            matches[provider.name] = check(case, provider)
        except Exception as error:  # whatever goes wrong in other libraries is a reason, not an end
            errors[provider.name] = first_line(error)
            if provider.name == "any2point":
                return [], errors
    right = [provider for provider in providers if provider.name in matches]
    rows: list[Row] = []
    for mode in ("forward", "backward", "both") if case.backward else ("forward",):
        timer = _on_gpu if device == "cuda" else _on_cpu
        with products(case.precision):
            new, failed = timer(case, right, mode, settings)
        errors |= failed
        for row in new:
            row.match = matches[row.provider]
            row.floor_us, row.direct_us = case.floor(machine, mode)
        rows += new
    return rows, errors


def compiled(case: Case) -> Provider:
    """The baseline: what torch.compile makes of the composition in torch."""
    assert case.compilable is not None
    functorch.donated_buffer = False  # or a backward could not be run twice behind one forward
    torch._dynamo.reset()  # the recompilations of all functions are limited together
    return Provider.plain("torch.compile", torch.compile(functools.partial(case.compilable), dynamic=False))


def check(case: Case, provider: Provider) -> float:
    """The part of a provider's results that equals ours; raises AssertionError where they are wrong."""
    exact = provider.name == "any2point"
    match = 1.0
    for i in range(len(case.inputs) if exact else 1):
        with torch.no_grad(), products(case.precision):
            result = provider.run(*provider.prepare(*case.inputs[i]))
        match = case.check(provider.finish(result, *case.inputs[i]), i, exact)
    if case.backward and case.reference is not None:
        _check_gradient(case, provider)
    return match


def _check_gradient(case: Case, provider: Provider) -> None:
    """Gradients of a provider's own leaves, in our layout, against the reference's."""
    inputs = case.inputs[0]
    args = provider.prepare(*inputs)
    with products(case.precision):
        out = provider.finish(provider.run(*args, **case.training), *inputs)
        grad = _gradient(out)
        actual = torch.autograd.grad(out, _leaves(args), grad)
    assert case.reference is not None
    wanted = torch.autograd.grad(case.reference(*inputs, **case.training), _leaves(inputs), grad)
    # Where the true gradient is zero (a bias before a normalisation) only rounding is left.
    least = 1e-3 * max(float(want.norm()) for want in wanted)
    for got, want in zip(actual, wanted):
        if got.shape != want.shape:  # channels first, or flat rows
            turned = want.transpose(1, 2) if got.dim() == want.dim() else want
            want = turned.reshape(got.shape)
        check_close(got, want, case.tolerance, least=least)


def _leaves(args: Any) -> list[torch.Tensor]:
    return [part for part in flatten(args) if part.requires_grad]


def calls_of(case: Case, provider: Provider, mode: str, function: Callable[..., Any]) -> list[Call]:
    """A call per set of inputs: the op alone, its gradient alone, or both."""
    calls: list[Call] = []
    for inputs in case.inputs:
        args = provider.prepare(*inputs)
        if mode == "forward":
            calls.append(torch.no_grad()(functools.partial(function, *args)))
            continue
        run = functools.partial(function, *args, **case.training)
        leaves, out = _leaves(args), run()
        grad = _gradient(out)
        if mode == "backward":
            calls.append(functools.partial(torch.autograd.grad, out, leaves, grad, retain_graph=True))
        else:
            calls.append(functools.partial(_both, run, leaves, grad))
    return calls


@functools.lru_cache(maxsize=1)
def _drawn(shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _gradient(out: torch.Tensor) -> torch.Tensor:
    """Drawn on the CPU, because a failed capture leaves the GPU's generator unusable."""
    return _drawn(out.shape).to(out, copy=True)


def _both(run: Call, leaves: list[torch.Tensor], grad: torch.Tensor) -> Any:
    return torch.autograd.grad(run(), leaves, grad)


def _on_gpu(
    case: Case, providers: Sequence[Provider], mode: str, settings: Settings
) -> tuple[list[Row], dict[str, str]]:
    rows, failed = [], {}
    for provider in providers:
        variants: list[tuple[str, Callable[..., Any]]] = [("", provider.run)]
        # A backward whose forward was not captured with it reaches back to another stream: events only.
        if settings.graph and provider.graph is not None and mode != "backward":
            variants.append((" graph", provider.graph))
        for suffix, function in variants:
            torch.cuda.synchronize()
            try:
                calls = calls_of(case, provider, mode, function)
                memory = peak(calls[0], "cuda")
                if suffix:
                    times = graph_times(calls, settings)
                else:
                    times = event_times(calls, warmup=settings.warmup, seconds=settings.seconds)
            except (RuntimeError, AssertionError) as error:
                failed[f"{provider.name} {mode}{suffix}".replace("any2point", "ours")] = first_line(error)
                torch.cuda.synchronize()
                continue
            rows.append(_row(case, provider, mode, suffix, memory).times(times))
    return rows, failed


def _on_cpu(
    case: Case, providers: Sequence[Provider], mode: str, settings: Settings
) -> tuple[list[Row], dict[str, str]]:
    calls = {provider.name: calls_of(case, provider, mode, provider.run)[0] for provider in providers}
    rows = {
        provider.name: _row(case, provider, mode, ", CPU time" if settings.cpu_time else "", None)
        for provider in providers
    }
    first = 0.0
    for provider in providers:
        begin = time.perf_counter()
        memory = peak(calls[provider.name], "cpu")
        first += time.perf_counter() - begin
        # What NumPy takes is not seen.
        rows[provider.name].mem_mb = memory if provider.graph is not None or memory else None
    rounds = int(np.clip(settings.seconds * len(providers) / first, 3, 25))
    for name, times in interleave(calls, rounds=rounds, clock=settings.clock).items():
        rows[name].times([seconds * 1e6 for seconds in times])
    return list(rows.values()), {}


def _row(case: Case, provider: Provider, mode: str, suffix: str, memory: float | None) -> Row:
    return Row(case.op, provider.name, case.shape, MODES.get(mode, mode) + suffix, mem_mb=memory)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:150]
