"""Two files of measurements side by side: what became faster, what slower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from any2point.bench.table import Row, is_ours, read_rows, time_text


def compare(before: Path, after: Path, threshold: float) -> tuple[str, bool]:
    """A table of the times of ours in both files, and whether one became slower by more than `threshold`.

    Args:
        before: CSV or JSON of rows.
        after: the same, measured later, or with another version, or on another machine.
        threshold: ratio of the times after and before above which a row is a regression, such as 1.1.

    Raises:
        ValueError: the files have no measurement in common.
    """
    first, second = _ours(read_rows(before)), _ours(read_rows(after))
    common = [key for key in first if key in second]
    if not common:
        raise ValueError(f"{after}: expected measurements that {before} has, too, found none")
    machines = [", ".join(sorted({row.device for row in rows.values()})) for rows in (first, second)]
    lines = [f"before: {before} ({machines[0]})", f"after:  {after} ({machines[1]})", ""]
    lines.append(f"{'op':<25} {'shape':<34} {'mode':<24} {'before':>10} {'after':>10} {'ratio':>6}")
    slower = 0
    for key in common:
        old, new = first[key], second[key]
        ratio = new.p50_us / old.p50_us if old.p50_us else float("inf") if new.p50_us else 1.0
        op, provider, shape, mode, _ = key
        verdict = "  SLOWER" if ratio > threshold else "  faster" if ratio * threshold < 1 else ""
        slower += ratio > threshold
        name = mode if provider == "any2point" else f"{mode} [{provider.removeprefix('any2point ')}]"
        lines.append(
            f"{op:<25} {shape[:34]:<34} {name[:24]:<24} {time_text(old.p50_us):>10} "
            f"{time_text(new.p50_us):>10} {ratio:>6.2f}{verdict}"
        )
    lines.append(f"\n{len(common)} in both, {slower} slower by more than {threshold:g} times")
    return "\n".join(lines), slower > 0


def _ours(rows: Sequence[Row]) -> dict[tuple[str, str, str, str, str], Row]:
    return {(r.op, r.provider, r.shape, r.mode, r.dtype): r for r in rows if is_ours(r)}
