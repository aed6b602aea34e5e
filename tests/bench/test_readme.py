"""README.md says what the rows say; the suites of `benchmarks` can be collected anywhere."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from any2point.bench import table
from benchmarks import readme

ROOT = Path(__file__).resolve().parents[2]


def test_tables_are_those_of_the_rows() -> None:
    text = readme.README.read_text()
    assert readme.updated(text) == text, "run: python -m benchmarks.readme"


def test_another_time_changes_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def slower(path: Path) -> list[table.Row]:
        return [dataclasses.replace(row, p50_us=3 * row.p50_us) for row in table.read_rows(path)]

    text = readme.README.read_text()
    monkeypatch.setattr(readme, "read_rows", slower)
    assert readme.updated(text) != text


@pytest.mark.parametrize("file", sorted(readme.RESULTS.glob("*.csv")), ids=lambda path: path.stem)
def test_rows_say_how_they_were_measured(file: Path) -> None:
    if "op" not in file.read_text().split("\n", 1)[0].split(","):
        pytest.skip("of another form, with a script of its own")
    rows = table.read_rows(file)
    assert rows
    for row in rows:
        assert row.device, row
        assert row.command, row
        assert row.commit, row
        assert row.torch, row
        assert row.p50_us > 0 or ": " in row.mode, row
    assert len({tuple(getattr(row, name) for name in table.KEY) for row in rows}) == len(rows)


@pytest.mark.slow
def test_suites_are_collected() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bench_knn.py" in done.stdout
