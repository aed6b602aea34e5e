"""Readers for the files that point clouds and meshes come in, written for bad files as much as for good ones.

Every reader takes the whole file as bytes and returns a `Mesh`; whatever is wrong with the file becomes one
ValueError that says what was expected and what was found. The caller adds the file's name.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from any2point.data.features import COLORS, NORMALS
from any2point.data.ply import read_ply


class Mesh(NamedTuple):
    """Vertices and, where the file has them, triangles.

    Attributes:
        vertices: [N, 3] float64.
        faces: [F, 3] int64 rows of `vertices`, or None for a cloud.
        columns: [N, A] float64, what else the file says of a vertex, or None.
        names: a name per column, "" where the file gives none.
    """

    vertices: np.ndarray
    faces: np.ndarray | None
    columns: np.ndarray | None = None
    names: tuple[str, ...] = ()


def read_text(data: bytes) -> Mesh:
    """Rows of numbers (.xyz, .txt, .csv, .pts): x y z first, then further columns.

    Columns are separated by blanks, commas or semicolons; `#` and `//` start comments. One heading line is
    allowed; if it names x, y and z, those columns are taken.
    """
    text = _decode(data)
    lines = text.splitlines()
    rows = [i for i, line in enumerate(lines) if line.strip() and not line.lstrip().startswith(("#", "//"))]
    if not rows:
        raise ValueError("expected rows of x y z, got no row")
    columns: tuple[int, ...] = (0, 1, 2)
    names: list[str] = []
    first = _cells(lines[rows[0]])
    if not _all_numbers(first):
        names = [cell.strip("\"'").lower() for cell in first]
        if len(rows) < 2 or not _all_numbers(_cells(lines[rows[1]])):
            raise ValueError(
                f"expected rows of numbers, got {lines[rows[0]].strip()[:40]!r} in line {rows[0] + 1}"
            )
        if {"x", "y", "z"} <= set(names):
            columns = tuple(names.index(axis) for axis in "xyz")
        rows = rows[1:]
    elif len(first) == 1 and len(rows) > 1 and first[0].isdigit():
        if int(first[0]) != len(rows) - 1:  # a .pts file: the first line holds the number of points
            raise ValueError(f"expected {first[0]} rows as the first line says, got {len(rows) - 1}")
        rows = rows[1:]
    width = len(_cells(lines[rows[0]]))
    if width <= max(columns):
        raise ValueError(f"expected at least 3 columns, got {width} in line {rows[0] + 1}")
    body = re.sub(r"[,;]", " ", "\n".join(lines[i] for i in rows))
    try:
        values = np.array(body.split(), dtype=np.float64)
        if len(values) != width * len(rows):
            raise ValueError
        return _cloud(values.reshape(len(rows), width), columns, names)
    except ValueError:
        raise ValueError(_bad_row(lines, rows, width)) from None


def read_npy(data: bytes) -> Mesh:
    """A NumPy array [N, 3 or more]: x y z first, then further columns."""
    if data[:4] == b"PK\x03\x04":
        raise ValueError("expected one array, got an archive of several (.npz)")
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read_header = (
            np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read_header(file)
    except Exception as error:  # the header is a Python literal, and a broken one fails in every way there is
        raise ValueError(f"expected a .npy file holding an array of numbers, got {_short(error)}") from None
    # Checked before NumPy allocates what the header claims.
    size, left = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if size > left and not dtype.hasobject:
        raise ValueError(f"expected {size} bytes of data, got {left} (file cut short?)")
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"expected a .npy file holding an array of numbers, got {_short(error)}") from None
    if array.dtype.kind not in "fiu":
        raise ValueError(f"expected an array of numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] < 3:
        raise ValueError(f"expected an array of shape [N, 3], got {list(array.shape)}")
    return _cloud(array.astype(np.float64))


def _cloud(table: np.ndarray, axes: Sequence[int] = (0, 1, 2), names: Sequence[str] = ()) -> Mesh:
    """A table [N, A], the columns of x y z and, if the file has them, the names of all columns."""
    others = [i for i in range(table.shape[1]) if i not in axes]
    named = tuple(names[i] if i < len(names) else "" for i in others)
    return Mesh(table[:, list(axes)], None, table[:, others] if others else None, named)


def read_obj(data: bytes) -> Mesh:
    """A Wavefront mesh: `v` and `f` lines; polygons become fans, negative indices count from the end.

    A vertex may carry its colour: `v x y z red green blue`.
    """
    vertices: list[list[float]] = []
    colors: list[list[str]] = []
    corners: list[int] = []
    lengths: list[int] = []
    text = _decode(data).replace("\\\r\n", " ").replace("\\\n", " ")
    for number, line in enumerate(text.splitlines(), start=1):
        kind, _, rest = line.strip().partition(" ")
        try:
            if kind == "v":
                words = rest.split()
                vertices.append([float(word) for word in words[:3]])
                if len(words) < 3:
                    raise ValueError
                if len(words) >= 6:
                    colors.append(words[3:6])
            elif kind == "f":
                face = [int(corner.split("/", 1)[0]) for corner in rest.split()]
                # A negative index counts back from the vertices read so far.
                corners.extend(c - 1 if c > 0 else len(vertices) + c for c in face)
                lengths.append(len(face))
        except ValueError:
            what = "3 coordinates" if kind == "v" else "a face of vertex numbers"
            raise ValueError(f"expected {what}, got {line.strip()[:40]!r} in line {number}") from None
    if not vertices:
        raise ValueError("expected `v x y z` lines, got none")
    faces = triangulate(np.array(corners, np.int64), np.array(lengths, np.int64), len(vertices))
    if len(colors) == len(vertices) and all(_all_numbers(color) for color in colors):
        return Mesh(np.array(vertices), faces, np.array(colors, np.float64), COLORS)
    return Mesh(np.array(vertices), faces)


def read_off(data: bytes) -> Mesh:
    """An Object File Format mesh or cloud; the counts may stand on the first line, as in ModelNet's files."""
    text = re.sub(r"#.*", "", _decode(data))
    head = re.match(r"\s*(ST)?(C)?(N)?OFF", text)
    if head is None:
        raise ValueError(f"expected the word OFF first, got {text[:20].strip()!r}")
    tokens = text[head.end() :].split()
    try:
        num_vertices, num_faces = int(tokens[0]), int(tokens[1])
        if num_vertices < 0 or num_faces < 0:
            raise ValueError
    except (IndexError, ValueError):
        raise ValueError(
            f"expected the numbers of vertices, faces and edges, got {' '.join(tokens[:3])!r}"
        ) from None
    width = 3 + 2 * bool(head[1]) + 4 * bool(head[2]) + 3 * bool(head[3])
    end = 3 + num_vertices * width
    if len(tokens) < end:
        raise ValueError(
            f"expected {num_vertices} vertices, got {max(0, len(tokens) - 3) // width} (file cut short?)"
        )
    try:
        table = np.array(tokens[3:end], dtype=np.float64).reshape(num_vertices, width)
    except ValueError as error:
        raise ValueError(f"expected vertices as numbers: {_short(error)}") from None
    # The order of the format: coordinates, normal, colour, texture.
    names = (NORMALS if head[3] else ()) + ((*COLORS, "alpha") if head[2] else ())
    # Faces may carry colours after their corners, so they are read line by line where lines are there.
    faces = _off_faces(tokens[end:], text, num_vertices, num_faces)
    return Mesh(table[:, :3], faces, table[:, 3 : 3 + len(names)] if names else None, names)


def _off_faces(tokens: list[str], text: str, num_vertices: int, num_faces: int) -> np.ndarray | None:
    if num_faces == 0:
        return None
    lines = [line.split() for line in text.splitlines() if line.strip()][-num_faces:]
    by_line = len(lines) == num_faces and sum(map(len, lines)) == len(tokens)
    corners: list[int] = []
    lengths: list[int] = []
    at = 0
    for row in range(num_faces):
        try:
            words, start = (lines[row], 0) if by_line else (tokens, at)
            size = int(words[start])
            face = [int(word) for word in words[start + 1 : start + 1 + size]]
            if size < 0 or len(face) < size:
                raise ValueError
        except (IndexError, ValueError):
            raise ValueError(f"expected {num_faces} faces, got {row} good ones (file cut short?)") from None
        at += size + 1
        corners.extend(face)
        lengths.append(size)
    return triangulate(np.array(corners, np.int64), np.array(lengths, np.int64), num_vertices)


def triangulate(corners: np.ndarray, lengths: np.ndarray, num_vertices: int) -> np.ndarray | None:
    """Cut polygons into triangle fans.

    Args:
        corners: [sum of lengths] int64, the vertex numbers of all polygons after each other.
        lengths: [P] int64, corners of each polygon; those of 1 and 2 (real files hold them) are left out.
        num_vertices: numbers must be below this.

    Returns:
        [F, 3] int64, or None if there is no polygon.

    Raises:
        ValueError: a number outside the vertices.
    """
    keep = lengths >= 3
    corners, lengths = corners[np.repeat(keep, lengths)], lengths[keep]
    if len(lengths) == 0:
        return None
    outside = (corners < 0) | (corners >= num_vertices)
    if outside.any():
        bad = int(corners[outside][0])
        raise ValueError(
            f"expected face indices within the {num_vertices} vertices, got {bad} (counted from 0)"
        )
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    triangles = lengths - 2
    polygon = np.repeat(np.arange(len(lengths)), triangles)
    step = np.arange(len(polygon)) - np.repeat(np.cumsum(triangles) - triangles, triangles)
    start = first[polygon]
    return corners[np.stack([start, start + step + 1, start + step + 2], axis=1)]


def _ply(data: bytes) -> Mesh:
    columns, corners, lengths = read_ply(data)
    vertices = np.stack([columns.pop(axis) for axis in "xyz"], axis=1)
    further = np.stack(list(columns.values()), axis=1) if columns else None
    return Mesh(vertices, triangulate(corners, lengths, len(vertices)), further, tuple(columns))


READERS: dict[str, Callable[[bytes], Mesh]] = {
    ".ply": _ply,
    ".obj": read_obj,
    ".off": read_off,
    ".npy": read_npy,
    ".xyz": read_text,
    ".txt": read_text,
    ".csv": read_text,
    ".pts": read_text,
}


def read_mesh_or_cloud(data: bytes, suffix: str) -> Mesh:
    """Read a file's bytes by its suffix.

    Args:
        data: the whole file.
        suffix: one of `READERS`, in any case.

    Returns:
        `Mesh`, at least one vertex, all coordinates finite.

    Raises:
        ValueError: what was expected and what was found.
    """
    reader = READERS.get(suffix.lower())
    if reader is None:
        raise ValueError(f"expected one of {' '.join(READERS)}, got {suffix or 'no suffix'!r}")
    if not data.strip():
        raise ValueError("expected points, got an empty file")
    mesh = reader(data)
    if len(mesh.vertices) == 0:
        raise ValueError("expected at least 1 point, got 0")
    bad = int((~np.isfinite(mesh.vertices).all(axis=1)).sum())
    if bad:
        raise ValueError(
            f"expected finite coordinates, got NaN or infinity in {bad} of {len(mesh.vertices)} points"
        )
    return mesh


def _decode(data: bytes) -> str:
    if b"\0" in data[:4096]:
        raise ValueError("expected a text file, got binary data")
    return data.decode("utf-8-sig", errors="replace")


def _cells(line: str) -> list[str]:
    line = re.split(r"#|//", line, maxsplit=1)[0]
    return re.sub(r"[,;]", " ", line).split()


def _all_numbers(cells: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in cells])
    except ValueError:
        return False


def _bad_row(lines: list[str], rows: list[int], width: int) -> str:
    for i in rows:
        cells = _cells(lines[i])
        if len(cells) != width or not _all_numbers(cells):
            return f"expected {width} numbers per row, got {lines[i].strip()[:40]!r} in line {i + 1}"
    return f"expected {width} numbers per row"


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:100] if str(error) else type(error).__name__
