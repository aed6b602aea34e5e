"""The PLY reader: ASCII and both binary byte orders, any order and type of properties."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from any2point.data.features import COLORS

_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1",
    "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4",
    "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_ORDER = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_FACES = ("vertex_indices", "vertex_index")


class _Property(NamedTuple):
    name: str
    type: str  # NumPy code without byte order
    count_type: str | None  # set for a list: the type of its length


class _Element(NamedTuple):
    name: str
    rows: int
    properties: list[_Property]


def read_ply(data: bytes) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Read a PLY file's vertices and faces.

    Args:
        data: the whole file.

    Returns:
        the vertices' properties by name, x, y and z among them, each [N] float64, colours stored in bytes
        divided by 255; the corners of all polygons one after the other [sum of lengths] int64; and the
        polygons' lengths [P] int64 (both empty for a cloud).

    Raises:
        ValueError: what was expected and what was found.
    """
    order, elements, start = _header(data)
    body = data[start:]
    walk = _walk_ascii(body, elements) if order == "" else _walk_binary(body, elements, order)
    by_name = dict(zip((element.name for element in elements), walk))
    columns, _ = by_name["vertex"]
    types = {p.name: p.type for element in elements if element.name == "vertex" for p in element.properties}
    vertices = {
        name: column.astype(np.float64) / (255 if name.endswith(COLORS) and types[name] == "u1" else 1)
        for name, column in columns.items()
    }
    _, lists = by_name.get("face", ({}, {}))
    corners, lengths = next((lists[name] for name in _FACES if name in lists), (np.empty(0), np.empty(0)))
    return vertices, corners.astype(np.int64), lengths.astype(np.int64)


def _header(data: bytes) -> tuple[str, list[_Element], int]:
    if not data.startswith(b"ply"):
        raise ValueError(f"expected a PLY file (first word 'ply'), got {data[:12]!r}")
    end = re.search(rb"end_header[ \t]*(\r\n|\n|\r)", data)
    if end is None:
        raise ValueError("expected a PLY header closed by 'end_header', got none (file cut short?)")
    order: str | None = None
    elements: list[_Element] = []
    for line in re.split(r"[\r\n]+", data[: end.start()].decode("latin-1"))[1:]:
        words = line.split()
        try:
            if not words or words[0] in ("comment", "obj_info"):
                continue
            if words[0] == "format":
                order = _ORDER[words[1]]
            elif words[0] == "element":
                elements.append(_Element(words[1], int(words[2]), []))
                if elements[-1].rows < 0:
                    raise ValueError
            elif words[0] == "property" and words[1] == "list":
                elements[-1].properties.append(_Property(words[4], _TYPES[words[3]], _TYPES[words[2]]))
            elif words[0] == "property":
                elements[-1].properties.append(_Property(words[2], _TYPES[words[1]], None))
            else:
                raise ValueError
        except (IndexError, KeyError, ValueError):
            raise ValueError(f"expected a PLY header line, got {line.strip()[:60]!r}") from None
    if order is None:
        raise ValueError("expected a 'format' line in the PLY header, got none")
    vertex = next((element for element in elements if element.name == "vertex"), None)
    if vertex is None:
        raise ValueError(f"expected an element 'vertex', got {[element.name for element in elements]}")
    scalars = [p.name for p in vertex.properties if p.count_type is None]
    if not {"x", "y", "z"} <= set(scalars):
        raise ValueError(f"expected vertex properties x, y and z, got {scalars}")
    return order, elements, end.end()


# One element read: its scalar columns by name, its lists by name as (values after each other, lengths).
_Read = tuple[dict[str, np.ndarray], dict[str, tuple[np.ndarray, np.ndarray]]]


def _walk_ascii(body: bytes, elements: list[_Element]) -> list[_Read]:
    tokens = body.split()
    at = 0
    result: list[_Read] = []
    for element in elements:
        scalars = not any(p.count_type for p in element.properties)
        width = len(element.properties)
        if scalars:
            taken = tokens[at : at + element.rows * width]
            if len(taken) < element.rows * width:
                raise _cut(element, len(taken) // max(width, 1))
            table = _numbers(taken, element).reshape(element.rows, width)
            at += len(taken)
            result.append(({p.name: table[:, i] for i, p in enumerate(element.properties)}, {}))
            continue
        columns: dict[str, list[bytes]] = {p.name: [] for p in element.properties}
        lengths: dict[str, list[int]] = {p.name: [] for p in element.properties}
        for row in range(element.rows):
            for p in element.properties:
                size = 1
                if p.count_type:
                    size = _length(tokens[at] if at < len(tokens) else None, element, row)
                    lengths[p.name].append(size)
                    at += 1
                if at + size > len(tokens):
                    raise _cut(element, row)
                columns[p.name].extend(tokens[at : at + size])
                at += size
        result.append(_pack({name: _numbers(v, element) for name, v in columns.items()}, lengths, element))
    return result


def _walk_binary(body: bytes, elements: list[_Element], order: str) -> list[_Read]:
    at = 0
    result: list[_Read] = []
    for element in elements:
        read = _uniform_rows(body, at, element, order)
        if read is None:
            read = _ragged_rows(body, at, element, order)
        at, parts = read
        result.append(parts)
    return result


def _uniform_rows(body: bytes, at: int, element: _Element, order: str) -> tuple[int, _Read] | None:
    """Read all rows at once if every list is as long as in the first row (plain clouds, triangle meshes)."""
    fields: list[tuple] = []
    cursor = at
    for i, p in enumerate(element.properties):
        if p.count_type is None:
            fields.append((f"v{i}", order + p.type))
            cursor += np.dtype(p.type).itemsize
            continue
        count = np.dtype(order + p.count_type)
        if element.rows == 0:
            size = 0
        elif cursor + count.itemsize > len(body):
            raise _cut(element, 0)
        else:
            size = int(np.frombuffer(body, count, 1, cursor)[0])
        if size < 0 or cursor + size > len(body):
            return None
        fields += [(f"n{i}", count), (f"v{i}", order + p.type, (size,))]
        cursor += count.itemsize + size * np.dtype(p.type).itemsize
    row = np.dtype(fields)
    if at + element.rows * row.itemsize > len(body):
        if not any(p.count_type for p in element.properties):
            raise _cut(element, max(0, len(body) - at) // max(row.itemsize, 1))
        return None
    if row.itemsize == 0:
        return at, ({}, {})
    table = np.frombuffer(body, row, element.rows, at)
    columns: dict[str, np.ndarray] = {}
    lists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for i, p in enumerate(element.properties):
        values = table[f"v{i}"]
        if p.count_type is None:
            columns[p.name] = values
            continue
        lengths = table[f"n{i}"].astype(np.int64)
        if (lengths != values.shape[1]).any():
            return None
        lists[p.name] = (values.reshape(-1), lengths)
    return at + element.rows * row.itemsize, (columns, lists)


def _ragged_rows(body: bytes, at: int, element: _Element, order: str) -> tuple[int, _Read]:
    columns: dict[str, list[np.ndarray]] = {p.name: [] for p in element.properties}
    lengths: dict[str, list[int]] = {p.name: [] for p in element.properties}
    for row in range(element.rows):
        for p in element.properties:
            size = 1
            if p.count_type:
                count = np.dtype(order + p.count_type)
                if at + count.itemsize > len(body):
                    raise _cut(element, row)
                size = int(np.frombuffer(body, count, 1, at)[0])
                lengths[p.name].append(size)
                at += count.itemsize
            value = np.dtype(order + p.type)
            if size < 0 or at + size * value.itemsize > len(body):
                raise _cut(element, row)
            columns[p.name].append(np.frombuffer(body, value, size, at))
            at += size * value.itemsize
    arrays = {name: np.concatenate(v) if v else np.empty(0) for name, v in columns.items()}
    return at, _pack(arrays, lengths, element)


def _pack(arrays: dict[str, np.ndarray], lengths: dict[str, list[int]], element: _Element) -> _Read:
    lists = {p.name for p in element.properties if p.count_type}
    return (
        {name: values for name, values in arrays.items() if name not in lists},
        {name: (arrays[name], np.array(lengths[name], np.int64)) for name in lists},
    )


def _numbers(tokens: list[bytes], element: _Element) -> np.ndarray:
    try:
        return np.array(tokens, dtype=np.float64) if tokens else np.empty(0)
    except ValueError as error:
        raise ValueError(f"expected numbers in element {element.name!r}: {str(error)[:60]}") from None


def _length(token: bytes | None, element: _Element, row: int) -> int:
    try:
        size = int(token or b"")
        if size < 0:
            raise ValueError
        return size
    except ValueError:
        raise _cut(element, row) from None


def _cut(element: _Element, got: int) -> ValueError:
    return ValueError(
        f"expected {element.rows} rows of element {element.name!r}, got {got} (file cut short?)"
    )
