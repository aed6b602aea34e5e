"""Normals and colours: read where files have them, refused where they do not, never guessed."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from any2point.data import folder_dataset, load_dataset, read_points

POINTS = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.5]])
NORMALS = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, -1, 0.0]])
COLORS = np.array([[255, 0, 0], [0, 51, 0], [0, 0, 102], [204, 204, 204]])


def ply(order: str = "binary_little_endian", colors: str = "uchar") -> bytes:
    """POINTS with everything, the columns in an unusual order, and a quality that nobody asked for."""
    names = ["nx", "x", "y", "z", "ny", "nz", "quality", "red", "green", "blue", "alpha"]
    color = ("u1", "uchar") if colors == "uchar" else ("<f4", "float")
    kinds = [("<f4", "float")] * 7 + [color] * 3 + [("u1", "uchar")]
    head = ["ply", f"format {order} 1.0", "element vertex 4"]
    head += [f"property {kind} {name}" for name, (_, kind) in zip(names, kinds)] + ["end_header", ""]
    table = np.empty(4, [(name, code) for name, (code, _) in zip(names, kinds)])
    share = 1 if colors == "uchar" else 255
    columns = [*POINTS.T, *NORMALS.T, *(COLORS / share).T]
    for name, column in zip(["x", "y", "z", "nx", "ny", "nz", "red", "green", "blue"], columns):
        table[name] = column
    table["quality"], table["alpha"] = 0.5, 255
    text = "".join(" ".join(f"{value:g}" for value in row) + "\n" for row in table.tolist())
    return "\n".join(head).encode() + (text.encode() if order == "ascii" else table.tobytes())


def table(*parts: np.ndarray, heading: str = "", separator: str = " ") -> bytes:
    buffer = io.StringIO()
    np.savetxt(buffer, np.hstack(parts), fmt="%g", delimiter=separator)
    return (heading + buffer.getvalue()).encode()


def npy(*parts: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.hstack(parts))
    return buffer.getvalue()


BOTH = {
    "ascii.ply": ply("ascii"),
    "binary.ply": ply(),
    "float.ply": ply(colors="float"),
    "plain.txt": table(POINTS, NORMALS, COLORS),
    "comma.csv": table(POINTS, NORMALS, COLORS, separator=","),
    "named.csv": table(COLORS, POINTS, NORMALS, heading="R G B x y z normal_x normal_y normal_z\n"),
    "half_named.xyz": table(POINTS, COLORS / 255, NORMALS, heading="x y z red green blue nx ny nz\n"),
    "array.npy": npy(POINTS, NORMALS, COLORS),
    "all.off": b"CNOFF 4 0 0\n" + table(POINTS, NORMALS, COLORS / 255, np.ones((4, 1))),
}


@pytest.mark.parametrize("name", BOTH)
def test_clouds_with_normals_and_colors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BOTH[name])
    for kinds in (["normals", "colors"], ["colors", "normals"]):
        named = not name.startswith(("plain", "comma", "array"))
        if not named and kinds[0] == "colors":
            continue  # columns without names are taken in the order asked for
        rows = read_points(tmp_path / name, features=kinds)
        values = {"normals": NORMALS, "colors": COLORS / 255}
        expected = np.hstack([POINTS, *(values[kind] for kind in kinds)])
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, expected, atol=1e-5)
    np.testing.assert_allclose(read_points(tmp_path / name), POINTS, atol=1e-6)


def test_six_columns_are_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(table(POINTS, NORMALS))
    (tmp_path / "b.txt").write_bytes(table(POINTS, COLORS))
    np.testing.assert_allclose(read_points(tmp_path / "a.txt", features=["normals"])[:, 3:], NORMALS)
    colors = read_points(tmp_path / "b.txt", features=["colors"])[:, 3:]
    np.testing.assert_allclose(colors, COLORS / 255, atol=1e-6)


def test_obj_colors(tmp_path: Path) -> None:
    lines = ["v " + " ".join(f"{v:g}" for v in row) for row in np.hstack([POINTS, COLORS / 255])]
    (tmp_path / "a.obj").write_text("\n".join(lines))
    np.testing.assert_allclose(
        read_points(tmp_path / "a.obj", features=["colors"])[:, 3:], COLORS / 255, atol=1e-5
    )
    (tmp_path / "b.obj").write_text("\n".join([*lines, "v 0 0 0 # the last one"]))  # and without a colour
    assert read_points(tmp_path / "b.obj").shape == (5, 3)
    with pytest.raises(ValueError, match=r"b.obj: expected colors \(red green blue\) .* none"):
        read_points(tmp_path / "b.obj", features=["colors"])


def test_meshes_have_normals_of_their_faces_and_colors_between_vertices(tmp_path: Path) -> None:
    """A unit square in the plane z = 0 and one in x = 0; red grows with y."""
    corners = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    lines = [f"v {x} {y} {z} {y} 0 0" for x, y, z in corners]
    (tmp_path / "a.obj").write_text("\n".join([*lines, "f 1 2 3 4", "f 1 4 6 5"]))
    rows = read_points(tmp_path / "a.obj", num_points=500, features=["normals", "colors"])
    points, normals, colors = np.split(rows, 3, axis=1)
    np.testing.assert_array_equal(points, read_points(tmp_path / "a.obj", num_points=500))
    flat = points[:, 2] == 0
    assert 200 < flat.sum() < 300
    np.testing.assert_allclose(normals[flat], np.tile([0, 0, 1], (flat.sum(), 1)), atol=1e-6)
    np.testing.assert_allclose(normals[~flat], np.tile([1, 0, 0], ((~flat).sum(), 1)), atol=1e-6)
    np.testing.assert_allclose(colors[:, 0], points[:, 1], atol=1e-6)
    assert (colors[:, 1:] == 0).all()


BAD = {
    "three.txt": (table(POINTS), "normals", r"expected normals \(nx ny nz\) beside x y z, got .* none"),
    "five.txt": (table(POINTS, NORMALS[:, :2]), "normals", r"got further columns: 2 \(\? \?\)"),
    "intensity.pts": (table(POINTS, NORMALS, COLORS[:, :1]), "normals", r"4 \(\? \? \? \?\)"),
    "nine.txt": (table(POINTS, NORMALS, COLORS), "normals", r"6 \(\? \? \? \? \? \?\)"),
    "named.csv": (table(POINTS, COLORS, heading="x y z r g b\n"), "normals", r"3 \(red green blue\)"),
    "range.txt": (table(POINTS, COLORS * 2), "colors", "expected colors from 0 to 255"),
    "negative.txt": (table(POINTS, -NORMALS), "colors", "expected colors from 0 to 255"),
    "nan.npy": (npy(POINTS, NORMALS * np.nan), "normals", "expected finite normals"),
    "huge.npy": (npy(POINTS, NORMALS * 1e300), "normals", "range of float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_features_that_are_not_there(tmp_path: Path, name: str) -> None:
    content, kind, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_points(tmp_path / name, features=[kind])
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("features", [["height"], "normals", ["normals", "normals"]])
def test_kinds(tmp_path: Path, features: list[str]) -> None:
    (tmp_path / "a.txt").write_bytes(table(POINTS, NORMALS))
    with pytest.raises(ValueError, match="`features`: expected a list of normals and colors, each once"):
        read_points(tmp_path / "a.txt", features=features)


def test_folder_with_features(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(2):  # clouds of different sizes, smaller and larger than asked for
            rows = generator.random((20 + 30 * i, 6))
            (tmp_path / name / f"{i}.txt").write_bytes(table(rows))
    data = load_dataset(tmp_path, None, num_points=32, features=["normals", "height"], up=2)
    assert data.points.shape == (4, 32, 3)
    assert data.feature_names == ("nx", "ny", "nz", "height")
    assert data.features is not None
    assert [file.name for file in data.files] == ["0.txt", "1.txt"] * 2
    plain = folder_dataset(tmp_path, num_points=32)
    assert plain.features is None
    assert (plain.points == data.points).all()  # the same draw with and without features
    whole = read_points(tmp_path / "b" / "1.txt", features=["normals"])
    drawn = np.hstack([data.points[3], data.features[3, :, :3]])
    assert {tuple(row) for row in drawn} <= {tuple(row) for row in whole}
    height = data.points[..., 2] - data.points[..., 2].min(dim=1, keepdim=True).values
    assert (data.features[..., 3] == height).all()
    (tmp_path / "b" / "2.txt").write_bytes(table(POINTS))
    with pytest.raises(ValueError, match=r"b/2.txt: expected normals"):
        folder_dataset(tmp_path, num_points=32, features=["normals"])
    with pytest.raises(ValueError, match="`features`: expected a list of normals and colors"):
        folder_dataset(tmp_path, features=["mask"])


def test_dark_colors_in_bytes_are_dark(tmp_path: Path) -> None:
    """The type says that a property counts to 255, even where no point goes beyond 1."""
    (tmp_path / "dark.ply").write_bytes(
        b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nproperty float y\nproperty float z\n"
        b"property uchar red\nproperty uchar green\nproperty uchar blue\nend_header\n"
        b"0 0 0 1 0 0\n1 1 1 0 0 1\n"
    )
    colors = read_points(tmp_path / "dark.ply", features=["colors"])[:, 3:]
    np.testing.assert_allclose(colors, np.array([[1, 0, 0], [0, 0, 1]]) / 255, atol=1e-7)
