"""GPU times of the ops and of their peers, on one CUDA device.

    python benchmarks/gpu.py --output benchmarks/results/NAME.csv [--peers DIR] [--commit SHA] [--only knn]

Per measurement: inputs rotated, at least a second of warm-up, then CUDA events around each call (`forward`,
`backward`) or around replays of one CUDA graph with a call per input set (`forward graph`). A provider's
result is checked first against this library's CPU op; a wrong one is not timed. Peers: benchmarks/peers.py.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, peers
from benchmarks.gpu_cases import Case, Provider, fps_cases, group_cases, hierarchy_cases, knn_cases


@dataclass
class Settings:
    warmup: float
    seconds: float
    graph: bool
    side: torch.cuda.Stream  # where graphs are captured


def event_times(calls: Sequence[Callable[[], Any]], settings: Settings) -> list[float]:
    """Microseconds per call, in turn over `calls`."""
    begin, count = time.perf_counter(), 0
    while count < 1 or time.perf_counter() - begin < settings.warmup:
        calls[count % len(calls)]()
        torch.cuda.synchronize()
        count += 1
    each = (time.perf_counter() - begin) / count
    repeats = int(np.clip(settings.seconds / each, 3, 200))
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for i, (start, end) in enumerate(events):
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def graph_times(calls: Sequence[Callable[[], Any]], settings: Settings) -> list[float]:
    """Microseconds per call inside one graph of all `calls`; the replay must give what the calls gave."""
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
    times = event_times([graph.replay], settings)
    graph.reset()
    return [each / len(calls) for each in times]


def tensors(result: Any) -> list[Tensor]:
    """The tensors of an op's result, in order."""
    if isinstance(result, Tensor):
        return [result.detach()]
    return [part for item in result if item is not None for part in tensors(item)]


def peak(call: Callable[[], Any]) -> float:
    """MB that a call has allocated at its peak beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def check_gradient(case: Case, provider: Provider, i: int) -> None:
    """The gradient of a provider's native leaf, in our layout, against index_add in float64."""
    features, index = case.inputs[i]
    leaf, *rest = provider.prepare(features, index)
    out = provider.finish(provider.run(leaf, *rest), features, index)
    grad = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaf, grad)[0]
    batch, rows, width = features.shape
    actual = actual.transpose(1, 2) if actual.shape == (batch, width, rows) else actual.view(features.shape)
    flat = (index + torch.arange(batch, device=index.device).view(-1, 1, 1) * rows).flatten()
    wanted = torch.zeros(batch * rows, width, dtype=torch.float64, device=index.device)
    wanted.index_add_(0, flat, grad.double().reshape(-1, width))
    torch.testing.assert_close(actual, wanted.view(features.shape).float(), rtol=1e-3, atol=1e-3)


def calls_of(
    case: Case, provider: Provider, mode: str, function: Callable[..., Any]
) -> list[Callable[[], Any]]:
    calls = []
    for inputs in case.inputs:
        args = provider.prepare(*inputs)
        if mode == "backward":
            out = function(*args)
            calls.append(
                functools.partial(torch.autograd.grad, out, args[0], torch.randn_like(out), retain_graph=True)
            )
        else:
            plain = [a.detach() if isinstance(a, Tensor) else a for a in args]
            calls.append(functools.partial(function, *plain))
    return calls


def measure(case: Case, provider: Provider, settings: Settings, machine: common.Machine) -> list[common.Row]:
    """The rows of one provider: modes and graph replay where it can be captured."""
    exact = provider.name == "any2point"
    match = 1.0
    for i in range(len(case.inputs) if exact else 1):
        result = provider.finish(provider.run(*provider.prepare(*case.inputs[i])), *case.inputs[i])
        match = case.check(result, i, exact)
        del result
    if case.backward:
        check_gradient(case, provider, 0)
    rows = []
    floor, direct = case.cost.us(machine)
    for mode in ("forward", "backward") if case.backward else ("forward",):
        variants = [(mode, event_times, provider.run)]
        # A backward whose forward was not captured with it reaches back to another stream: events only.
        if settings.graph and provider.graph is not None and mode == "forward":
            variants.append((f"{mode} graph", graph_times, provider.graph))
        for name, timer, function in variants:
            torch.cuda.synchronize()
            calls = calls_of(case, provider, mode, function)
            try:
                memory = peak(calls[0])
                times = timer(calls, settings)
            except (RuntimeError, AssertionError) as error:
                print(f"  {provider.name} {name}: not measured ({first_line(error)})", flush=True)
                continue
            p20, p50, p80 = np.quantile(times, [0.2, 0.5, 0.8])
            row = common.Row(case.op, provider.name, case.shape, name, mem_mb=memory, match=match)
            row.p20_us, row.p50_us, row.p80_us = float(p20), float(p50), float(p80)
            row.floor_us, row.direct_us = floor, direct
            rows.append(row)
    return rows


def summary(rows: list[common.Row]) -> str:
    """Per op, shape and mode: our time and the best peer's."""
    names = f"{'op':<26}{'shape':<26}{'mode':<16}{'ours us':>10}{'floor':>9}"
    lines = [names + f"{'best peer us':>14}{'ratio':>8}  peer"]
    keys = dict.fromkeys((row.op, row.shape, row.mode.split()[0]) for row in rows)
    for op, shape, mode in keys:
        group = [row for row in rows if (row.op, row.shape, row.mode.split()[0]) == (op, shape, mode)]
        ours = [row for row in group if row.provider.startswith("any2point")]
        others = [row for row in group if not row.provider.startswith("any2point")]
        for own in ours:
            # Like with like where the peer can be captured, else its eager call.
            graph = own.mode.endswith("graph")
            best = min(
                (row for row in others if graph or not row.mode.endswith("graph")), key=_median, default=None
            )
            text = f"{op:<26}{shape:<26}{own.mode:<16}{own.p50_us:>10.1f}{own.floor_us:>9.1f}"
            if best:
                text += f"{best.p50_us:>14.1f}{best.p50_us / own.p50_us:>8.2f}  {best.provider} ({best.mode})"
            lines.append(text + ("" if own.provider == "any2point" else f"  [{own.provider}]"))
    return "\n".join(lines)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:150]


def _median(row: common.Row) -> float:
    return row.p50_us


def main() -> None:
    kinds = ["fps", "hierarchy", "knn", "group"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="CSV to add the rows to")
    parser.add_argument("--peers", help="folder with peers.py")
    parser.add_argument("--commit", default="", help="revision to write into the rows (default: from git)")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds before each measurement")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long a measurement takes")
    parser.add_argument("--max-rows", type=int, default=1 << 30, help="leave out shapes of larger clouds")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: expected a CUDA device, found none")
    machine, rivals = common.gpu(), peers.gpu_peers(args.peers)
    settings = Settings(args.warmup, args.seconds, not args.no_graph, torch.cuda.Stream())
    print(f"{machine.device}, driver {machine.driver}, torch {machine.torch}")
    print(f"copy {machine.bandwidth / 1e12:.2f} TB/s, {machine.lanes / 1e12:.1f} T lane operations/s")
    names = ", ".join(f"{name} {peer.version}" for name, peer in rivals.items())
    print(f"peers: {names or 'none'}", flush=True)
    makers: dict[str, Callable[[], list[Case]]] = {
        "fps": lambda: fps_cases(rivals),
        "hierarchy": lambda: hierarchy_cases(rivals),
        "knn": lambda: knn_cases(rivals, not args.no_compile),
        "group": lambda: group_cases(rivals),
    }
    rows: list[common.Row] = []
    for kind in args.only:
        for case in makers[kind]():
            if max(part.shape[1] for part in case.inputs[0] if isinstance(part, Tensor)) > args.max_rows:
                continue
            for provider in case.providers:
                begin = time.perf_counter()
                try:
                    new = measure(case, provider, settings, machine)
                except (AssertionError, RuntimeError) as error:
                    print(
                        f"  {case.op} {case.shape} {provider.name}: NOT TIMED: {first_line(error)}",
                        flush=True,
                    )
                    torch.cuda.synchronize()
                    continue
                finally:
                    torch.cuda.empty_cache()
                rows += [row.place(machine, revision=args.commit) for row in new]
                cells = "; ".join(f"{r.mode} {r.p50_us:.1f} [{r.p20_us:.1f} {r.p80_us:.1f}] us" for r in new)
                spent = time.perf_counter() - begin
                print(f"  {case.op} {case.shape} {provider.name}: {cells} ({spent:.0f} s)", flush=True)
                if args.output:
                    common.write_rows(args.output, rows)
    print(summary(rows))


if __name__ == "__main__":
    main()
