"""One function from a file to points, and area-weighted sampling of meshes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from any2point.data.features import feature_names, select
from any2point.data.formats import Mesh, read_mesh_or_cloud


def read_points(
    path: str | Path, num_points: int = 2048, seed: int = 0, features: Sequence[str] = ()
) -> np.ndarray:
    """Read a point cloud, or sample one from a mesh.

    A cloud (.ply, .xyz, .txt, .csv, .pts, .npy, .off or .obj without faces) is returned as it is, whatever
    its size. A mesh (.ply, .obj, .off with faces) gives `num_points` points spread evenly over its surface.

    Args:
        path: the file; its suffix says what it is.
        num_points: how many points to draw from a mesh.
        seed: of that draw; the same seed gives the same points.
        features: "normals" and "colors" to read as well, where the file has them (`select` says in which
            columns). A mesh has normals by its faces, and colours between those of its vertices.

    Returns:
        [N, 3 + F] float32: x y z in the file's own unit, then three columns per feature, colours from 0 to 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: naming the file, what was expected and what was found.

    Example:
        >>> points = read_points("chair.obj", num_points=1024)  # doctest: +SKIP
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, got a folder")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    feature_names(features)
    try:
        mesh = read_mesh_or_cloud(path.read_bytes(), path.suffix)
        if mesh.faces is None:
            rows = np.concatenate([mesh.vertices, _features(mesh, features)], axis=1)
        else:
            rows = _sample_mesh(mesh, num_points, features, np.random.default_rng(seed))
        if np.abs(rows).max() > np.finfo(np.float32).max:
            raise ValueError("expected coordinates within the range of float32, got larger ones")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return rows.astype(np.float32)


def _features(mesh: Mesh, kinds: Sequence[str]) -> np.ndarray:
    columns = np.empty((len(mesh.vertices), 0)) if mesh.columns is None else mesh.columns
    return select(columns, mesh.names, kinds)


def _sample_mesh(
    mesh: Mesh, num_points: int, kinds: Sequence[str], generator: np.random.Generator
) -> np.ndarray:
    assert mesh.faces is not None
    face, u, v = _draw(mesh.vertices, mesh.faces, num_points, generator)
    corners = mesh.faces[face]
    parts = [_between(mesh.vertices[corners], u, v)]
    for kind in kinds:
        if kind == "normals":
            corner = mesh.vertices[corners]
            normal = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
            parts.append(normal / np.linalg.norm(normal, axis=1, keepdims=True))
        else:
            parts.append(_between(_features(mesh, [kind])[corners], u, v))
    return np.concatenate(parts, axis=1)


def write_ply(path: str | Path, points: np.ndarray) -> None:
    """Write points [N, 3] as a binary PLY file."""
    header = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    Path(path).write_bytes(header.encode() + np.asarray(points, "<f4").tobytes())


def sample_surface(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, generator: np.random.Generator
) -> np.ndarray:
    """Draw points evenly over the surface of a triangle mesh.

    A triangle is chosen with a probability in proportion to its area, then a point in it, uniformly.

    Args:
        vertices: [V, 3] float64.
        faces: [F, 3] int64.
        num_points: how many, at least 1.
        generator: the only source of randomness. Three draws per point, by inversion of the cumulative area,
            so that the points stay the same with every NumPy version.

    Returns:
        [num_points, 3] float64.

    Raises:
        ValueError: `num_points` below 1, or a mesh whose area is zero.
    """
    vertices = np.asarray(vertices, np.float64)
    face, u, v = _draw(vertices, faces, num_points, generator)
    return _between(vertices[faces[face]], u, v)


def _draw(
    vertices: np.ndarray, faces: np.ndarray, num_points: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The face [num_points] of every point and its place there, u and v [num_points, 1]."""
    if num_points < 1:
        raise ValueError(f"`num_points`: expected at least 1, got {num_points}")
    corner = vertices[faces]
    edge_u, edge_v = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    total = np.cumsum(np.linalg.norm(np.cross(edge_u, edge_v), axis=1))
    if not np.isfinite(total[-1]) or total[-1] <= 0:
        raise ValueError(f"expected a mesh with a surface, got {len(faces)} faces of zero area")
    chance = generator.random((num_points, 3))
    chosen = np.searchsorted(total, chance[:, 0] * total[-1], side="right")
    chosen = np.minimum(chosen, len(faces) - 1)
    u, v = chance[:, 1:2], chance[:, 2:3]
    over = u + v > 1  # the far half of the parallelogram folds back into the triangle
    return chosen, np.where(over, 1 - u, u), np.where(over, 1 - v, v)


def _between(corner: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """What lies at u, v of triangles with these values [M, 3, C] at their corners."""
    return corner[:, 0] + u * (corner[:, 1] - corner[:, 0]) + v * (corner[:, 2] - corner[:, 0])
