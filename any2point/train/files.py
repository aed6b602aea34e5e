"""Files of a run folder, each replaced whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from any2point.models.hub import CONFIG, WEIGHTS, write_atomic

RECIPE = "recipe.yaml"
METRICS = "metrics.jsonl"
RESULTS = "results.json"
STATE = "state.pt"


@contextlib.contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """Make a folder and keep other processes from training in it, until this one ends, however it does.

    Raises:
        ValueError: another process has it.
    """
    import fcntl

    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: expected a folder of its own, got one that a run is using") from None
        yield
    finally:
        os.close(handle)
        if new:
            with contextlib.suppress(OSError):  # something was written
                folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """`write_atomic` for text."""
    write_atomic(path, text.encode())


def yaml_module() -> Any:
    """PyYAML, imported when it is needed; ImportError says how to get it."""
    try:
        import yaml
    except ImportError:
        raise ImportError("recipes need PyYAML: pip install 'any2point[train]'") from None
    return yaml


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` for JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_yaml(path: Path, value: Mapping[str, Any]) -> None:
    """`write_atomic` for YAML, keys in the order given."""
    yaml = yaml_module()
    write_text(path, yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None))


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """`write_atomic` for what `torch.load(weights_only=True)` reads."""
    import torch

    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomic(path, buffer.getvalue())


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of a process that was killed while writing."""
    for name in (RECIPE, METRICS, RESULTS, STATE, CONFIG, WEIGHTS):
        for file in folder.glob(f".{name}.*"):
            file.unlink(missing_ok=True)


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """`write_atomic` for JSON lines."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one JSON line, in one write."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
