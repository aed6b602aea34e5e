"""The commands `any2point bench`: op, step, all, compare."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

# torch's profiler and its allocator announce themselves otherwise; read when torch is imported.
_QUIET = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}

bench = typer.Typer(
    help="Measure the ops and a whole step on this machine, against torch, other libraries and the floor.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)

Json = Annotated[Path | None, typer.Option("--json", help="Write machine and rows to this file.")]
Csv = Annotated[Path | None, typer.Option("--csv", help="Add the rows to this table.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Quick = Annotated[bool, typer.Option(help="The smallest size of every op, short times.")]
Threads = Annotated[int, typer.Option(help="Of the CPU, for everybody; 0 for all.", min=0)]
CpuTime = Annotated[bool, typer.Option("--cpu-time", help="On a busy CPU: its time instead of the wall's.")]
Compile = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="torch.compile as a peer; default: on GPUs.")
]
Peers = Annotated[str | None, typer.Option(help="Folder with GPU libraries (any2point/bench/peers.py).")]
Source = Annotated[str, typer.Option(help="The frozen transformer: random:clip-text, a checkpoint, minilm.")]
Batch = Annotated[int, typer.Option(help="Clouds per step; 0: 32 on a GPU, 8 on a CPU.", min=0)]
Points = Annotated[int, typer.Option(help="Points per cloud.", min=128)]
Precision = Annotated[str, typer.Option(help="auto, fp32, tf32, bf16 or fp16.")]
Against = Annotated[bool, typer.Option("--torch", help="CPU: also the model with all ops composed in torch.")]
Plot = Annotated[Path | None, typer.Option(help="Draw the profile to this PNG or SVG file.")]


@bench.command("op")
def bench_op(
    ops: Annotated[list[str] | None, typer.Argument(help="knn, group, ...; default: all.")] = None,
    as_json: Json = None,
    csv: Csv = None,
    device: Device = "auto",
    quick: Quick = False,
    scaling: Annotated[
        str | None, typer.Option(help="Sampling, neighbours and groups over `points` or `clouds` instead.")
    ] = None,
    compile_: Compile = None,
    peers: Peers = None,
    threads: Threads = 1,
    cpu_time: CpuTime = False,
) -> None:
    """Every op, forward and backward: time, floor, memory, the best peer."""
    where = _prepare(device, threads)
    settings = _settings(where, quick, compile_, cpu_time)
    rows, wrong = _measure_ops(ops or [], where, settings, quick, scaling, peers, csv)
    _finish(rows, wrong, where, as_json, csv)


@bench.command("step")
def bench_step(
    as_json: Json = None,
    csv: Csv = None,
    plot: Plot = None,
    source: Source = "random:clip-text",
    batch: Batch = 0,
    points: Points = 1024,
    precision: Precision = "auto",
    device: Device = "auto",
    against_torch: Against = False,
    scaling: Annotated[bool, typer.Option(help="Whole evaluations of 1, 2, 4, ... clouds instead.")] = False,
    threads: Threads = 0,
    cpu_time: CpuTime = False,
) -> None:
    """A training and an evaluation step by parts, against their floors."""
    if scaling and plot is not None:
        raise ValueError("plot: expected a step by parts, got --scaling")
    where = _prepare(device, threads)
    settings = _settings(where, False, None, cpu_time)
    rows = _measure_step(source, batch, points, precision, where, settings, against_torch, scaling)
    if plot is not None:
        from any2point.bench.step_report import step_picture

        step_picture(rows, plot)
    _finish(rows, [], where, as_json, csv)


@bench.command("all")
def bench_all(
    as_json: Json = None,
    csv: Csv = None,
    device: Device = "auto",
    quick: Quick = False,
    compile_: Compile = None,
    peers: Peers = None,
    threads: Threads = 1,
    cpu_time: CpuTime = False,
) -> None:
    """All ops, then a step with the default options."""
    where = _prepare(device, threads)
    settings = _settings(where, quick, compile_, cpu_time)
    rows, wrong = _measure_ops([], where, settings, quick, None, peers, csv)
    rows += _measure_step("random:clip-text", 0, 1024, "auto", where, settings)
    _finish(rows, wrong, where, as_json, csv)


@bench.command("compare")
def bench_compare(
    before: Annotated[Path, typer.Argument(help="Rows as JSON or CSV.", show_default=False)],
    after: Annotated[Path, typer.Argument(help="Rows measured later or elsewhere.", show_default=False)],
    threshold: Annotated[
        float, typer.Option(help="Ratio of times above which a row counts as slower.", min=1.0)
    ] = 1.1,
) -> None:
    """Two files side by side; exit code 1 if something became slower."""
    from any2point.bench.compare import compare

    text, slower = compare(before, after, threshold)
    print(text)
    raise typer.Exit(1 if slower else 0)


def _prepare(device: str, threads: int) -> str:
    if "torch" not in sys.modules:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        if threads:
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ.setdefault(name, str(threads))
    import torch

    from any2point.train.runtime import pick_device

    if threads:
        torch.set_num_threads(threads)
    return pick_device(device).type


def _settings(device: str, quick: bool, compile_: bool | None, cpu_time: bool) -> Any:
    from any2point.bench.timing import Settings

    chosen = device == "cuda" if compile_ is None else compile_
    settings = Settings(compile=chosen and not quick, cpu_time=cpu_time)
    if quick:
        settings.warmup, settings.seconds = 0.1, 0.05
    return settings


def _measure_ops(
    names: list[str],
    device: str,
    settings: Any,
    quick: bool,
    scaling: str | None,
    folder: str | None,
    csv: Path | None,
) -> tuple[list[Any], list[str]]:
    from any2point.bench import peers
    from any2point.bench.run import measure_cases, op_cases, scaling_cases
    from any2point.bench.table import summary, write_csv

    for reason in peers.skipped() if device == "cpu" else ():
        print(f"without {reason}", file=sys.stderr)
    if scaling is not None:
        found = scaling_cases(names, device, scaling, folder=folder)
    else:
        found = op_cases(names, device, quick=quick, folder=folder)
    done = (lambda rows: write_csv(csv, rows)) if csv is not None else None
    rows, wrong = measure_cases(found, device, settings, _say, done=done)
    print(summary(rows))
    return rows, wrong


def _measure_step(
    source: str,
    batch: int,
    points: int,
    precision: str,
    device: str,
    settings: Any,
    against_torch: bool = False,
    scaling: bool = False,
) -> list[Any]:
    import torch

    from any2point.bench.step_report import Choice, measure_batches, measure_step
    from any2point.train.runtime import pick_precision

    chosen = pick_precision(precision, torch.device(device))
    size = batch or (32 if device == "cuda" else 8)
    measure = measure_batches if scaling else measure_step
    return measure(Choice(source, size, points, chosen, against_torch), device, settings, print)


def _finish(rows: list[Any], wrong: list[str], device: str, as_json: Path | None, csv: Path | None) -> None:
    from any2point.bench.table import write_csv, write_json
    from any2point.bench.timing import machine_of

    if as_json is not None:
        write_json(as_json, rows, machine_of(device))
    if csv is not None:
        write_csv(csv, rows)
    if wrong:
        raise typer.Exit(_tell(wrong))


def _tell(wrong: list[str]) -> int:
    for line in wrong:
        print(f"any2point: wrong result, not timed: {line}", file=sys.stderr)
    return 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
