"""Farthest point sampling of a million points on a GPU: ours as always, each peer by one call (minutes).

python benchmarks/farthest_point_million.py --peers DIR [--only pointops] --output benchmarks/results/NAME.csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from any2point.bench import cases, peers, timing
from any2point.bench.cases import Provider
from any2point.bench.run import measure_cases
from any2point.bench.table import Row, write_csv

SHAPE = (1, 1_000_000, 250_000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", required=True, help="folder with peers.py")
    parser.add_argument("--only", nargs="+", default=["pointops"], help="which peers")
    parser.add_argument("--output", type=Path, required=True, help="CSV to add the rows to")
    parser.add_argument("--commit", default="", help="revision to write into the rows (default: from git)")
    args = parser.parse_args()
    rivals = peers.gpu_peers(args.peers)
    (case,) = cases.farthest_point_sample("cuda", [SHAPE])
    settings = timing.Settings(0.2, 0.5)
    rows, wrong = measure_cases([case], "cuda", settings, print, revision=args.commit)
    write_csv(args.output, rows)
    if wrong:
        raise SystemExit("\n".join(["wrong results:", *wrong]))
    machine = timing.gpu()
    floor, direct = case.floor(machine, "forward")
    for name in args.only:
        peer = Provider.of(name, rivals[name].fps)
        given = peer.prepare(*case.inputs[0])
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = peer.run(*given)
        end.record()
        torch.cuda.synchronize()
        row = Row(case.op, name, case.shape, "forward").times([start.elapsed_time(end) * 1e3])
        row.match = case.check(peer.finish(result, *case.inputs[0]), 0, False)
        row.floor_us, row.direct_us = floor, direct
        rows.append(row.place(machine, revision=args.commit))
        print(f"{name}: {row.p50_us / 1e6:.1f} s, {row.match:.1%} as ours", flush=True)
        write_csv(args.output, rows)


if __name__ == "__main__":
    main()
