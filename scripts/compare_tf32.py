"""Errors against float64 in precision tf32: of this package and of the composition of torch ops under TF32.

    python scripts/compare_tf32.py [--variants clip-text/scanobjectnn ...] [--batches 6] [--csv FILE]

The official variants with `hot` weights (tests/models/golden.py), on clouds of the sample set: logits in
evaluation, logits and gradients of a training step, and of each stage of the tokenizer alone the result and
its gradients. Neighbours, cells and voxels are those of float32 in all runs; a maximum or a ReLU that goes
the other way counts as it comes, in both alike. An error is the root mean square over the batches of each
batch's relative error; beside the ratio of the two stand the median and the range of the batches' own ratios.
With `--replace PART ...` also the model in which one of these at a time is the composition of torch ops.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import golden  # noqa: E402
from tf32_errors import PARTS, TORCH, Model, Table, batch_of, measure  # noqa: E402

from any2point.bench.table import commit  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=list(golden.FOLDERS))
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--size", type=int, default=16, help="clouds in a batch")
    parser.add_argument("--replace", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--csv", type=Path, help="write the errors to this file")
    parser.add_argument("--seconds", type=float, default=1e9, help="no batch begins after these")
    arguments = parser.parse_args()
    began = time.perf_counter()
    tables = {variant: Table() for variant in arguments.variants}
    with ThreadPoolExecutor() as pool:
        models = dict(zip(arguments.variants, pool.map(Model, arguments.variants)))
    for seed in range(arguments.batches):
        for variant, model in models.items():
            if time.perf_counter() - began > arguments.seconds:
                break
            measure(model, *batch_of(seed, arguments.size), tables[variant], arguments.replace)
            print(f"{variant}, batch {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    for variant, table in tables.items():
        print(variant)
        print(*table.lines(), sep="\n", flush=True)
    if arguments.csv:
        write(arguments.csv, tables)


def write(path: Path, tables: dict[str, Table]) -> None:
    where = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "commit": commit()}
    rows = [
        {
            "variant": variant,
            "of": name,
            "how": how,
            "batches": len(errors),
            "error": f"{table.error(name, how):.3e}",
            "torch_error": f"{table.error(name, TORCH):.3e}",
            "ratio": f"{table.error(name, how) / table.error(name, TORCH):.2f}",
            **where,
        }
        for variant, table in tables.items()
        for name, each in table.errors.items()
        for how, errors in each.items()
        if how != TORCH
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
