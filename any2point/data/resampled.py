"""The text files of modelnet40_normal_resampled, read once and kept as one file."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from any2point.data.checksums import verify
from any2point.data.dataset import Progress

_BATCH = 64  # clouds sampled at a time: enough to keep a GPU busy


class Clouds(NamedTuple):
    """One split as it was read.

    Attributes:
        table: [n, N, 3] float32, or with normals [n, N, 6].
        labels: [n] int64.
        names: a name per cloud.
        files: what it was read from.
    """

    table: np.ndarray
    labels: np.ndarray
    names: list[str]
    files: list[Path]


def read_lines(path: Path) -> list[str]:
    """The lines of a list, without blank ones."""
    return [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]


def read_resampled(
    folder: Path,
    part: str,
    class_names: Sequence[str],
    num_points: int,
    normals: bool,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Clouds:
    """Read the clouds that modelnet40_{part}.txt lists, and take the farthest points of each.

    Args:
        folder: modelnet40_normal_resampled.
        part: "train" or "test".
        class_names: in the order of their labels.
        num_points: points to take of each cloud by farthest point sampling from the first one, which is also
            their order.
        normals: give them too.
        cache: folder to keep the result in; None for `folder`, or where that cannot be written the user's
            cache folder. It is found again as long as the names, sizes and times of the text files and
            `num_points` are the same.
        progress: called with (files read, files in all).

    Returns:
        `Clouds`.

    Raises:
        FileNotFoundError: a listed file that is not there.
        ValueError: naming the file, what was expected and what was found.
    """
    listed = folder / f"modelnet40_{part}.txt"
    names = read_lines(listed)
    kinds = [name.rpartition("_")[0] for name in names]
    for name, kind in zip(names, kinds):
        if kind not in class_names:
            raise ValueError(f"{listed}: expected names such as {class_names[0]}_0001, got {name!r}")
    if not names:
        raise ValueError(f"{listed}: expected names of clouds, got none")
    files = [folder / kind / f"{name}.txt" for name, kind in zip(names, kinds)]
    labels = np.array([class_names.index(kind) for kind in kinds], np.int64)
    mark = _fingerprint(folder, files, num_points)
    places = _places(folder, cache)
    kept = f"modelnet40_{part}_{num_points}pts_fps.npz"
    table = None
    for place in places:
        table = _load(place / kept, mark, normals) if table is None else table
    if table is None:
        verify(folder, files=files)
        whole = np.empty((len(files), num_points, 6), np.float32)
        for row, cloud in enumerate(_sampled(files, num_points)):
            whole[row] = cloud
            if progress is not None:
                progress(row + 1, len(files))
        _keep(places, kept, mark, whole)
        table = whole if normals else whole[..., :3]
    return Clouds(table, labels, names, files)


def read_table(path: Path, num_points: int) -> np.ndarray:
    """One file: rows x,y,z,nx,ny,nz, at least `num_points` of them. [N, 6] float32."""
    try:
        table = np.loadtxt(path, np.float32, delimiter=",", ndmin=2)
    except (ValueError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{path}: expected rows x,y,z,nx,ny,nz, got {reason}") from None
    if table.shape[1] != 6 or len(table) < num_points:
        raise ValueError(
            f"{path}: expected {num_points} or more rows x,y,z,nx,ny,nz, got {len(table)} rows of "
            f"{table.shape[1]} (file cut short?)"
        )
    if not np.isfinite(table).all():
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity")
    return table


def _sampled(files: Sequence[Path], num_points: int) -> Iterator[np.ndarray]:
    import torch

    from any2point.ops import farthest_point_sample

    device = "cuda" if torch.cuda.is_available() else "cpu"  # both give the same points
    for start in range(0, len(files), _BATCH):
        tables = [read_table(file, num_points) for file in files[start : start + _BATCH]]
        longest = max(map(len, tables))
        points = torch.zeros(len(tables), longest, 3)
        for row, table in enumerate(tables):
            points[row, : len(table)] = torch.from_numpy(table[:, :3])
        lengths = torch.tensor([len(table) for table in tables])
        index = farthest_point_sample(points.to(device), num_points, lengths=lengths.to(device)).cpu().numpy()
        for table, rows in zip(tables, index):
            yield table[rows]


def _fingerprint(folder: Path, files: Sequence[Path], num_points: int) -> str:
    digest = hashlib.sha256(f"1 {num_points}".encode())
    for file in files:
        try:
            state = file.stat()
        except FileNotFoundError:
            missing = sum(not other.exists() for other in files)
            raise FileNotFoundError(
                f"{file}: no such file; {missing} of the {len(files)} listed ones are missing"
            ) from None
        name = file.relative_to(folder).as_posix()
        digest.update(f"\n{name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()


def _places(folder: Path, cache: str | Path | None) -> list[Path]:
    """Where the result may be kept, the best place first."""
    if cache is not None:
        return [Path(cache)]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [folder, home / "any2point" / hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]]


def _load(path: Path, mark: str, normals: bool) -> np.ndarray | None:
    """What was kept, if it is there, whole and of these files."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["fingerprint"]) != mark:
                return None
            parts = [kept["points"], kept["normals"]] if normals else [kept["points"]]
    except Exception:  # absent, or damaged in one of many ways: made again, which is all that is lost
        return None
    return np.concatenate(parts, axis=2) if normals else parts[0]


def _keep(places: Sequence[Path], name: str, mark: str, table: np.ndarray) -> None:
    """Write the file in the first place that can be written, whole or not at all."""
    reason: OSError | None = None
    for place in places:
        temporary = None
        try:
            place.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=place, prefix=f".{name}.")
            with os.fdopen(handle, "wb") as file:
                np.savez(file, fingerprint=mark, points=table[..., :3], normals=table[..., 3:])
            os.chmod(temporary, 0o644)
            os.replace(temporary, place / name)
            return
        except OSError as error:
            reason = error
        finally:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
    warnings.warn(f"the text files have to be read again next time: {reason}", stacklevel=2)
