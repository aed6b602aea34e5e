"""Checksums of data files: to record what a run was trained on, and to find files that came down damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

SUMS = "SHA256SUMS"


def checksum(files: Iterable[str | Path], algorithm: str = "sha256") -> dict[str, str]:
    """Hash files, for example `PointDataset.files`.

    Args:
        files: their paths.
        algorithm: one of `hashlib`.

    Returns:
        Hexadecimal checksums by name; a name is the path from the folder that all files lie in.

    Example:
        >>> checksum(load_dataset("modelnet40", "test", root).files)  # doctest: +SKIP
        {'ply_data_test0.h5': '...', 'ply_data_test1.h5': '...'}
    """
    paths = [Path(file) for file in files]
    if not paths:
        return {}
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    return {path.absolute().relative_to(folder).as_posix(): _hash(path, algorithm) for path in paths}


def verify(
    folder: str | Path, sums: Mapping[str, str] | None = None, files: Iterable[Path] | None = None
) -> int:
    """Compare files with their checksums.

    Args:
        folder: where the files are.
        sums: SHA-256 by path within `folder`, as `checksum` gives it; None reads them from `SHA256SUMS` in
            that folder, as the command sha256sum writes it, and without one there is nothing to compare.
        files: compare only these; None for all that `sums` names.

    Returns:
        How many files were compared, all of them right.

    Raises:
        FileNotFoundError: a file that `sums` names is not there.
        ValueError: naming the file, the checksum expected and the one found.
    """
    folder = Path(folder)
    if sums is None:
        if not (folder / SUMS).is_file():
            return 0
        sums = _read_sums(folder / SUMS)
    wanted = None if files is None else {path.absolute() for path in files}
    count = 0
    for name, expected in sums.items():
        path = folder / name
        if wanted is not None and path.absolute() not in wanted:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, though its checksum is known")
        found = _hash(path, "sha256")
        if found != expected.lower():
            raise ValueError(f"{path}: expected SHA-256 {expected}, got {found} (damaged or another version)")
        count += 1
    return count


def _read_sums(path: Path) -> dict[str, str]:
    sums = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        digest, _, name = line.strip().partition(" ")
        name = name.lstrip(" *")
        if not line.strip() or line.startswith("#"):
            continue
        if len(digest) != 64 or not set(digest.lower()) <= set("0123456789abcdef") or not name:
            raise ValueError(
                f"{path}: expected a SHA-256 and a file name, got {line[:40]!r} in line {number}"
            )
        sums[name] = digest
    return sums


def _hash(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
