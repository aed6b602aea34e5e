"""Writes the tables of README.md that come from measured rows.

    python -m benchmarks.readme            # after rows were added to benchmarks/results
    python -m benchmarks.readme --check    # exit code 1 if README.md says something else than the rows

A table stands between `<!-- rows: NAME -->` and `<!-- end -->`. Best peer: the fastest of all other providers
in the same file at the same shape; graph replay is compared with graph replay where a peer can be captured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from any2point.bench.table import Row, best_peer, by_case, peer_name, read_rows, time_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


@dataclass(frozen=True)
class Line:
    """A line of a table: `label` and `size` for people; the row by op, shape and mode.

    Lines whose row is not in the file are left out.
    """

    label: str
    size: str
    op: str
    shape: str
    mode: str = "forward"
    dtype: str = "float32"


FPS, KNN, LOCAL, GUIDED = "farthest_point_sample", "knn", "local_aggregate", "guided_aggregate"
HIERARCHY, PROJECT = "farthest_point_hierarchy", "virtual_project"
BOTH = "forward+backward"
TRAIN, CPU = f"{BOTH} graph", "forward, CPU time"
CLIP, REPLAY = "clip-text 32,1024", "whole step graph"
STAGES = {
    "stage 1": "32,1024,96 -> 512x81 H=96x2",
    "stage 2": "32,512,192 -> 256x81 H=192x1",
    "stage 3": "32,256,384 -> 128x81 H=32x1",
    "all three": "32 clouds, three stages of the tokenizer, k=81",
}
TABLES: dict[str, tuple[str, list[Line]]] = {
    "h200": (
        "h200.csv",
        [
            Line(FPS, "32 x 1024 -> 512", FPS, "32,1024,512"),
            Line(FPS, "32 x 8192 -> 2048", FPS, "32,8192,2048"),
            Line(FPS, "8 x 16384 -> 4096", FPS, "8,16384,4096"),
            Line(FPS, "1 x 100k -> 25k", FPS, "1,100000,25000"),
            Line(HIERARCHY, "32 x 1024 -> 512, 256, 128", HIERARCHY, "32,1024,512+256+128"),
            Line(KNN, "32 x 512 of 1024, k = 81 (graph)", KNN, "32,512,1024,81", "forward graph"),
            Line(KNN, "32 x 2048 of 8192, k = 32 (graph)", KNN, "32,2048,8192,32", "forward graph"),
            Line(KNN, "25k of 100k, k = 32 (graph)", KNN, "1,25000,100000,32", "forward graph"),
            Line(KNN, "100k of 100k, k = 16", KNN, "1,100000,100000,16"),
            Line("group", "32 x 1024 x 96 -> 512 x 81", "group", "32,1024,96 -> 512x81"),
            Line("group, backward", "the same", "group", "32,1024,96 -> 512x81", "backward"),
            *(
                Line(label, f"{name}, float16 (graph)", LOCAL, f"{shape} float16", mode)
                for label, mode in ((LOCAL, "forward graph"), (f"{LOCAL}, training", TRAIN))
                for name, shape in STAGES.items()
            ),
            Line(PROJECT, "32 x 128, 77 positions (graph)", PROJECT, "32,128 77,768 V=6", "forward graph"),
            Line(PROJECT, "32 x 128, 37 x 37 (graph)", PROJECT, "32,128 37x37,768 V=6", "forward graph"),
            Line(GUIDED, "32 x 128 x 768 (graph)", GUIDED, "32,128,768 V=6 cells=39", "forward graph"),
            Line(f"{GUIDED}, training", "the same (graph)", GUIDED, "32,128,768 V=6 cells=39", TRAIN),
        ],
    ),
    "h200-step": (
        "h200_step.csv",
        [
            Line("train step, bf16", "CLIP text, 32 x 1024", "train step", CLIP, "whole step", "bf16"),
            Line("as one graph", "the same", "train step", CLIP, REPLAY, "bf16"),
            Line("train step, tf32, as one graph", "the same", "train step", CLIP, REPLAY, "tf32"),
            Line("evaluation, bf16", "the same", "eval step", CLIP, "whole step", "bf16"),
            Line("as one graph", "the same", "eval step", CLIP, REPLAY, "bf16"),
            Line(
                "as one graph",
                "CLIP text, 1 x 1024",
                "eval step",
                "clip-text 1,1024",
                REPLAY,
                "bf16",
            ),
        ],
    ),
    "cpu": (
        "epyc-zen5.csv",
        [
            Line(FPS, "1024 -> 512", FPS, "1,1024,512", CPU),
            Line(FPS, "100k -> 25k", FPS, "1,100000,25000", CPU),
            Line(KNN, "512 of 1024, k = 81", KNN, "1,512,1024,81", CPU),
            Line(KNN, "100k of 100k, k = 16", KNN, "1,100000,100000,16", CPU),
            Line(
                "local_aggregate, evaluation",
                "the tokenizer's three stages, 8 clouds, k = 81",
                LOCAL,
                "8 clouds, three stages of the tokenizer, k=81, evaluation",
                CPU,
            ),
            Line(
                "the same in bfloat16",
                "the same",
                LOCAL,
                "8 clouds, three stages of the tokenizer, k=81, evaluation in bfloat16",
                CPU,
                "bfloat16",
            ),
            Line(
                "forward and backward",
                "the same, 4 clouds",
                LOCAL,
                "4 clouds, three stages of the tokenizer, k=81, forward and backward",
                CPU,
            ),
            Line(GUIDED, "4 clouds x 128 tokens x 768", GUIDED, "4,128,768 V=6 cells=39", CPU),
            Line(f"{GUIDED}, training", "the same", GUIDED, "4,128,768 V=6 cells=39", f"{BOTH}, CPU time"),
            Line(PROJECT, "32 x 128 centres, 77 positions", PROJECT, "32,128 77,768 V=6", CPU),
        ],
    ),
    "cpu-step": (
        "epyc-zen5_step.csv",
        [
            Line("train step", "MiniLM, 8 x 1024", "train step", "minilm 8,1024", "whole step", "fp32"),
            Line("evaluation", "the same", "eval step", "minilm 8,1024", "whole step", "fp32"),
        ],
    ),
}


# What stands above a table, if it has lines.
ABOVE = {
    "h200-step": """A whole step of a frozen CLIP text transformer, against the official code on the same
GPU; the floor counts the bytes and matrix products of every part ([profile](docs/benchmarks.md)):

"""
}


def find(rows: Sequence[Row], line: Line) -> tuple[Row, Row | None] | None:
    """Our row of a line and the best peer's."""
    for group in by_case(rows).values():
        for own in group:
            same = (own.op, own.shape, own.mode, own.dtype) == (line.op, line.shape, line.mode, line.dtype)
            if same and own.provider == "any2point":
                return own, best_peer(own, group)
    return None


def ratio_text(ratio: float) -> str:
    """`0.60x`, `2.6x`, `48x`, `5,850x`: two digits, or three where they are before the point."""
    if ratio < 100:
        return f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"
    return f"{round(ratio, -1):,.0f}x"


def render(name: str) -> str:
    """A table in Markdown."""
    file, lines = TABLES[name]
    path = RESULTS / file
    rows = read_rows(path) if path.exists() else []
    on_gpu = name.startswith("h200")
    text: list[str] = []
    before = ""
    for line in lines:
        found = find(rows, line)
        if found is None:
            continue
        own, best = found
        peer = f"{time_text(best.p50_us)} ({peer_name(best)})" if best else ""
        ratio = ratio_text(best.p50_us / own.p50_us) if best else ""
        cells = [line.label if line.label != before else "", line.size, time_text(own.p50_us), peer, ratio]
        if on_gpu:
            # The bytes of farthest point sampling say nothing: its picks depend on each other.
            cells.append(time_text(own.floor_us) if own.op not in (FPS, HIERARCHY) else "")
        before = line.label
        text.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    if not text:
        return ""
    head = ["| op | size | any2point | best peer | |", "|---|---|---|---|---|"]
    head = [line + end for line, end in zip(head, (" floor |", "---|"))] if on_gpu else head
    return ABOVE.get(name, "") + "\n".join([*head, *text])


def updated(text: str) -> str:
    """README.md with its tables made anew."""
    for name in TABLES:
        pattern = re.compile(rf"(<!-- rows: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md: expected <!-- rows: {name} --> ... <!-- end -->, found none")
        table = render(name)
        text = pattern.sub(rf"\1\n{table}\n\n\2" if table else r"\1\2", text)
    return text


def main() -> int:
    before = README.read_text()
    after = updated(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
