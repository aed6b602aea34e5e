"""GPU times of the ops and of their peers, on one CUDA device.

    python benchmarks/gpu.py --output benchmarks/results/NAME.csv [--peers DIR] [--commit SHA] [--only knn]
    python benchmarks/gpu.py --output benchmarks/results/NAME_scaling.csv --scaling clouds [--only fps knn]

Per measurement: inputs rotated, warm-up, then CUDA events around each call (`forward`, `backward`,
`forward+backward`) or around replays of one CUDA graph with a call per input set (`forward graph`, ...). A
provider's result is checked first; a wrong one is not timed. Peers: any2point/bench/peers.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from any2point.bench import peers, timing
from any2point.bench.cases import Case
from any2point.bench.run import OPS, SCALING, measure_cases, op_cases, scaling_cases
from any2point.bench.table import summary, write_csv

_SHORT = {"farthest_point_sample": "fps", "farthest_point_hierarchy": "hierarchy"}
_OP_OF = {_SHORT.get(op, op): op for op in OPS}  # what `--only` takes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="CSV to add the rows to")
    parser.add_argument("--peers", help="folder with peers.py")
    parser.add_argument("--commit", default="", help="revision to write into the rows (default: from git)")
    parser.add_argument("--only", nargs="+", choices=_OP_OF, help="default: all")
    parser.add_argument("--match", default="", help="only shapes with this text, such as float16")
    parser.add_argument("--scaling", choices=SCALING, help="forward over the number of points or of clouds")
    parser.add_argument("--warmup", type=float, default=1.0, help="seconds at first, a tenth of it each time")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long a measurement takes")
    parser.add_argument("--max-rows", type=int, default=1 << 30, help="leave out shapes of larger clouds")
    parser.add_argument("--min-rows", type=int, default=0, help="leave out shapes of smaller clouds")
    parser.add_argument("--no-graph", action="store_true")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: expected a CUDA device, found none")
    machine, rivals = timing.gpu(), peers.gpu_peers(args.peers)
    timing.event_times([lambda: torch.ones(1 << 24, device="cuda").sum()], warmup=args.warmup, seconds=0.1)
    settings = timing.Settings(args.warmup / 10, args.seconds, not args.no_graph, not args.no_compile)
    print(f"{machine.device}, driver {machine.driver}, torch {machine.torch}")
    print(f"copy {machine.bandwidth / 1e12:.2f} TB/s, {machine.lanes / 1e12:.1f} T lane operations/s")
    names = ", ".join(f"{name} {peer.version}" for name, peer in rivals.items())
    print(f"peers: {names or 'none'}", flush=True)

    def wanted() -> Iterator[Case]:
        names = [_OP_OF[name] for name in args.only or ()]
        if args.scaling:
            found = scaling_cases(names, "cuda", args.scaling, folder=args.peers)
        else:
            found = op_cases(names, "cuda", folder=args.peers)
        for case in found:
            longest = max(part.shape[1] for part in timing.flatten(case.inputs[0]) if part.dim() > 1)
            if args.match in case.shape and args.min_rows <= longest <= args.max_rows:
                yield case

    rows, wrong = measure_cases(
        wanted(),
        "cuda",
        settings,
        lambda line: print(line, flush=True),
        done=(lambda rows: write_csv(args.output, rows)) if args.output else None,
        revision=args.commit,
    )
    print(summary(rows))
    raise SystemExit("\n".join(["wrong results:", *wrong]) if wrong else 0)


if __name__ == "__main__":
    main()
