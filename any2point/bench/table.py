"""The row of a measurement, files of rows (CSV and JSON), and the table that people read."""

from __future__ import annotations

import csv
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from any2point._version import __version__
from any2point.bench.timing import Machine

KEY = ("op", "provider", "shape", "mode", "dtype", "device")


@dataclass
class Row:
    """One measurement. Times in microseconds; `match` = fraction of results equal to ours."""

    op: str
    provider: str
    shape: str
    mode: str
    dtype: str = "float32"
    p20_us: float = 0.0
    p50_us: float = 0.0
    p80_us: float = 0.0
    floor_us: float = 0.0
    direct_us: float = 0.0
    launches: int | None = None
    mem_mb: float | None = None
    match: float | None = None
    device: str = ""
    driver: str = ""
    cuda: str = ""
    torch: str = ""
    triton: str = ""
    clock_mhz: float | None = None
    commit: str = ""
    command: str = ""
    date: str = ""

    def times(self, microseconds: Sequence[float]) -> Row:
        """Fills in the quantiles."""
        p20, p50, p80 = np.quantile(microseconds, [0.2, 0.5, 0.8])
        self.p20_us, self.p50_us, self.p80_us = float(p20), float(p50), float(p80)
        return self

    def place(self, machine: Machine, *, revision: str = "") -> Row:
        """Fills in where, when and by which command."""
        self.device, self.driver, self.cuda = machine.device, machine.driver, machine.cuda
        self.torch, self.triton, self.clock_mhz = machine.torch, machine.triton, machine.clock_mhz
        self.commit = revision or commit()
        self.command = self.command or command_line(sys.argv)
        self.date = datetime.date.today().isoformat()
        return self


def command_line(arguments: Sequence[str]) -> str:
    """A command as it is noted with a row: without the files that it wrote, and without anybody's folders."""
    program = Path(arguments[0]).name
    words, rest = ["any2point" if program == "__main__.py" else program], list(arguments[1:])
    while rest:
        word = rest.pop(0)
        if word in ("--json", "--csv", "--plot", "--output", "--rows"):
            rest = rest[1:]
        elif word == "--peers":
            words, rest = [*words, "--peers", "DIR"], rest[1:]
        else:
            words.append(word)
    return " ".join(words)


@cache
def commit() -> str:
    """The revision of the checkout that the package is in, else its version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        command = ["git", "rev-parse", "--short", "HEAD"]
        try:
            done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        except OSError:
            return __version__
        return done.stdout.strip() or __version__
    return __version__


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to a CSV; a row measured before under the same name is replaced."""
    kept: dict[tuple[str, ...], dict[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for old in csv.DictReader(file):
                kept[tuple(old[name] for name in KEY)] = old
    for row in rows:
        values = {
            k: (f"{v:.5g}" if isinstance(v, float) else "" if v is None else v)
            for k, v in asdict(row).items()
        }
        kept[tuple(str(values[name]) for name in KEY)] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
    temporary.replace(path)


def write_json(path: Path, rows: Sequence[Row], machine: Machine) -> None:
    """A file with the machine's ceilings and all rows."""
    report = {"any2point": __version__, "machine": asdict(machine), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV or JSON file that was written by this module."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file of measurements")
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            stored = list(csv.DictReader(file))
    else:
        try:
            stored = json.loads(path.read_text())["rows"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: expected what `any2point bench --json` wrote, got something else"
            ) from None
    return [_row(values, path) for values in stored]


def _row(values: dict[str, Any], path: Path) -> Row:
    known = {field.name: field for field in fields(Row)}
    missing = [name for name in ("op", "provider", "shape", "mode", "p50_us") if name not in values]
    if missing:
        raise ValueError(f"{path}: expected rows with {missing[0]!r}, got {sorted(values)}")
    taken: dict[str, Any] = {}
    for name, value in values.items():
        if name in known and value not in ("", None):
            kind = str(known[name].type)
            taken[name] = float(value) if "float" in kind else int(value) if "int" in kind else value
    return Row(**taken)


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str, str, str, str], list[Row]]:
    """Rows by (op, shape, mode without "graph", dtype, device)."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in rows:
        mode = row.mode.removesuffix(" graph")
        groups.setdefault((row.op, row.shape, mode, row.dtype, row.device), []).append(row)
    return groups


def is_ours(row: Row) -> bool:
    return row.provider.startswith("any2point")


def best_peer(own: Row, group: Sequence[Row]) -> Row | None:
    """The fastest row of another provider: like with like where a peer could be captured, else eager."""
    graph = own.mode.endswith("graph")
    others = [row for row in group if not is_ours(row) and (graph or not row.mode.endswith("graph"))]
    return min(others, key=lambda row: row.p50_us, default=None)


def peer_name(row: Row) -> str:
    """The name of a provider, marked where its result is not ours: ties apart, nobody's should differ."""
    if row.match is None or row.match >= 0.999:
        return row.provider
    share = f"{100 * row.match:.3g} % equal" if row.match > 0 else "another result"
    return f"{row.provider}, {share}"


def time_text(microseconds: float) -> str:
    """`36 us`, `1.08 ms`, `5,420 ms`: three digits."""
    if microseconds >= 1e6:
        return f"{round(microseconds / 1e3, -1):,.0f} ms"
    unit, value = ("ms", microseconds / 1e3) if microseconds >= 1e3 else ("us", microseconds)
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def summary(rows: Sequence[Row]) -> str:
    """Per op, shape and mode: our time, its floor and the best peer's."""
    names = f"{'op':<25} {'shape':<30} {'mode':<15} {'any2point':>10} {'floor':>9} {'direct':>9}"
    lines = [f"{names} {'memory':>9} {'best peer':>10} {'ratio':>6}  peer"]
    for (op, shape, *_), group in by_case(rows).items():
        for own in filter(is_ours, group):
            text = f"{op:<25} {shape[:30]:<30} {own.mode:<15} {time_text(own.p50_us):>10} "
            text += f"{time_text(own.floor_us):>9} {time_text(own.direct_us):>9} "
            text += f"{'' if own.mem_mb is None else f'{own.mem_mb:.1f} MB':>9}"
            if best := best_peer(own, group):
                text += f" {time_text(best.p50_us):>10} {best.p50_us / own.p50_us:>5.1f}x  "
                text += f"{peer_name(best)} ({best.mode})"
            lines.append(text + ("" if own.provider == "any2point" else f"  [{own.provider}]"))
    return "\n".join(lines)


Reporter = Callable[[str], None]
