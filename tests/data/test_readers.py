"""The file readers: every format right, every bad file one clear ValueError."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pytest

from any2point.data import READERS, read_points, sample_surface

POINTS = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3.5], [-1, 0.25, 1e-3]])
TRIANGLES = [[0, 1, 2], [0, 2, 3]]


def ply(order: str, *, faces: bool = False, swap: bool = False, extra: bool = True) -> bytes:
    """POINTS as a PLY file, properties in an unusual order if `swap`."""
    names = ["z", "red", "y", "x"] if swap else ["x", "y", "z", "red"]
    types = {"x": "float", "y": "double", "z": "float32", "red": "uchar"}
    names = names if extra else [name for name in names if name != "red"]
    head = ["ply", f"format {order} 1.0", "comment made by hand", "element vertex 5"]
    head += [f"property {types[name]} {name}" for name in names]
    if faces:
        head += ["element face 2", "property list uchar int vertex_indices", "property uchar flags"]
    body = io.BytesIO()
    mark = ">" if "big" in order else "<"
    code = {"float": "f", "double": "d", "float32": "f", "uchar": "B"}
    for point in POINTS:
        row = [7 if name == "red" else point["xyz".index(name)] for name in names]
        if order == "ascii":
            body.write((" ".join(str(value) for value in row) + "\n").encode())
        else:
            body.write(b"".join(struct.pack(mark + code[types[n]], v) for n, v in zip(names, row)))
    for triangle in TRIANGLES if faces else []:
        if order == "ascii":
            body.write(("3 " + " ".join(map(str, triangle)) + " 1\n").encode())
        else:
            body.write(struct.pack(mark + "B3iB", 3, *triangle, 1))
    return ("\n".join(head) + "\nend_header\n").encode() + body.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def rows(separator: str = " ", end: str = "\n") -> str:
    return end.join(separator.join(str(value) for value in point) for point in POINTS)


OFF = "OFF\n# a comment\n5 2 0\n" + rows() + "\n3 0 1 2 255 0 0\n3 0 2 3\n"
OBJ = "\n".join(
    ["v " + row for row in rows().splitlines()] + ["vn 0 0 1", "f 1/1/1 2//1 3", "f -5 -3 -2", ""]
)

CLOUDS = {
    "ascii.ply": ply("ascii"),
    "swapped.ply": ply("ascii", swap=True),
    "little.ply": ply("binary_little_endian"),
    "big.ply": ply("binary_big_endian", swap=True),
    "crlf.ply": ply("ascii").replace(b"\n", b"\r\n"),
    "blanks.xyz": rows().encode(),
    "normals.txt": rows(",").replace("\n", ",0,0,1\n").encode() + b",0,0,1",
    "heading.csv": b"# exported\nid;y;x;z\n" + b"\n".join(b"1;%g;%g;%g" % (p[1], p[0], p[2]) for p in POINTS),
    "counted.pts": b"5\n" + rows().encode(),
    "float64.npy": npy(POINTS),
    "float16.npy": npy(np.hstack([POINTS, POINTS]).astype(np.float16)),
    "fortran.npy": npy(np.asfortranarray(POINTS)),
    "vertices.obj": ("v " + rows().replace("\n", "\nv ")).encode(),
    "vertices.off": f"OFF 5 0 0\n{rows()}\n".encode(),
    "UPPER.XYZ": rows().encode(),
}
MESHES = {
    "ascii.ply": ply("ascii", faces=True),
    "little.ply": ply("binary_little_endian", faces=True, swap=True),
    "big.ply": ply("binary_big_endian", faces=True),
    "mesh.obj": OBJ.encode(),
    "mesh.off": OFF.encode(),
    "glued.off": OFF.replace("OFF\n# a comment\n", "OFF").encode(),
    "quad.obj": ("v " + rows().replace("\n", "\nv ") + "\nf 1 2 3 4\nf 1 2\n").encode(),
}


@pytest.mark.parametrize("name", CLOUDS)
def test_clouds_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CLOUDS[name])
    points = read_points(tmp_path / name)
    assert points.dtype == np.float32
    tolerance = 1e-3 if "float16" in name else 1e-6
    np.testing.assert_allclose(points, POINTS, atol=tolerance)


@pytest.mark.parametrize("name", MESHES)
def test_meshes_are_sampled(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(MESHES[name])
    points = read_points(tmp_path / name, num_points=300, seed=3)
    assert points.shape == (300, 3)
    # Both triangles and the quad's fan lie in the planes z = 0 and x = 0, or in the fan's third plane.
    assert (points >= -1e-6).all()
    np.testing.assert_array_equal(points, read_points(tmp_path / name, num_points=300, seed=3))
    assert (points != read_points(tmp_path / name, num_points=300, seed=4)).any()


def test_ragged_binary_faces(tmp_path: Path) -> None:
    head = (
        "ply\nformat binary_little_endian 1.0\nelement face 2\nproperty list uchar int vertex_index\n"
        "element vertex 4\nproperty float x\nproperty float y\nproperty float z\nend_header\n"
    )
    faces = struct.pack("<B3i", 3, 0, 1, 2) + struct.pack("<B4i", 4, 0, 1, 2, 3)
    (tmp_path / "a.ply").write_bytes(head.encode() + faces + POINTS[:4].astype("<f4").tobytes())
    assert read_points(tmp_path / "a.ply", num_points=10).shape == (10, 3)


NPY = npy(POINTS)
FACES = ply("binary_little_endian", faces=True)
BAD = {
    "empty.ply": (b"", "empty file"),
    "empty.npy": (b"", "empty file"),
    "blank.xyz": (b"\n \n", "empty file"),
    "comments.xyz": (b"# nothing here\n", "got no row"),
    "foreign.ply": (b"\x89PNG\r\n\x1a\n" + bytes(64), "expected a PLY file"),
    "foreign.xyz": (b"\x89PNG\r\n\x1a\n" + bytes(64), "got binary data"),
    "foreign.obj": (b"PK\x03\x04" + bytes(64), "got binary data"),
    "foreign.off": (b"<html><body>404</body></html>", "expected the word OFF first"),
    "foreign.npy": (b"<html><body>404</body></html>", "expected a .npy file"),
    "prose.txt": (b"It was the best of times,\nit was the worst of times\n", "expected rows of numbers"),
    "prose.obj": (b"It was the best of times\n", "expected `v x y z` lines"),
    "data.step": (b"ISO-10303-21;", "expected one of .ply"),
    "nan.xyz": (b"0 0 0\nnan 1 2\n", "NaN or infinity in 1 of 2 points"),
    "inf.npy": (npy(np.full((3, 3), np.inf)), "NaN or infinity in 3 of 3"),
    "nan.ply": (ply("ascii").replace(b"3.5", b"nan"), "NaN or infinity in 1 of 5"),
    "huge.xyz": (b"0 0 1e300\n", "range of float32"),
    "two.xyz": (b"0 1\n2 3\n", "at least 3 columns, got 2"),
    "ragged.xyz": (b"0 0 0\n1 1\n2 2 2\n", "'1 1' in line 2"),
    "word.csv": (b"0,0,0\n1,x,1\n", "'1,x,1' in line 2"),
    "counted.pts": (b"7\n0 0 0\n1 1 1\n", "expected 7 rows"),
    "flat.npy": (npy(np.zeros(12)), r"shape \[N, 3\], got \[12\]"),
    "wide.npy": (npy(np.zeros((3, 2))), r"got \[3, 2\]"),
    "text.npy": (npy(np.array([["a", "b", "c"]])), "array of numbers"),
    "objects.npy": (npy(np.array([[None, 1, 2]], dtype=object)), "expected a .npy file"),
    "none.npy": (npy(np.zeros((0, 3))), "at least 1 point, got 0"),
    "cut.npy": (NPY[: len(NPY) - 8], "expected 120 bytes of data, got 112"),
    "headless.ply": (ply("ascii")[:60], "end_header"),
    "cut.ply": (ply("ascii")[:-20], "expected 5 rows of element 'vertex', got 3"),
    "cut_binary.ply": (ply("binary_little_endian")[:-30], "got 3 .file cut short"),
    "cut_faces.ply": (ply("binary_big_endian", faces=True)[:-4], "expected 2 rows of element 'face', got 1"),
    "cut_ascii_faces.ply": (ply("ascii", faces=True)[:-6], "expected 2 rows of element 'face', got 1"),
    "giant.ply": (ply("binary_little_endian").replace(b"vertex 5", b"vertex 99999999999"), "cut short"),
    "giant_ascii.ply": (ply("ascii").replace(b"vertex 5", b"vertex 99999999999"), "cut short"),
    "giant_faces.ply": (FACES.replace(b"face 2", b"face 99999999999"), "cut short"),
    "format.ply": (ply("ascii").replace(b"ascii", b"zip"), "PLY header line"),
    "type.ply": (ply("ascii").replace(b"double", b"complex"), "PLY header line"),
    "negative.ply": (ply("ascii").replace(b"vertex 5", b"vertex -5"), "PLY header line"),
    "flat.ply": (ply("ascii").replace(b"float32 z", b"float32 w"), "x, y and z"),
    "vertexless.ply": (ply("ascii").replace(b"vertex", b"corner"), "element 'vertex'"),
    "zero.ply": (ply("ascii").replace(b"vertex 5", b"vertex 0"), "at least 1 point"),
    "word.ply": (ply("ascii").replace(b"3.5", b"zap"), "expected numbers in element 'vertex'"),
    "outside.ply": (FACES.replace(b"\2\0\0\0\1", b"\x63\0\0\0\1"), "got 99"),
    "outside.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 4\n", "face indices within the 3 vertices, got 3"),
    "short.obj": (b"v 0 0\n", "expected 3 coordinates, got 'v 0 0' in line 1"),
    "word.obj": (b"v 0 0 0\nf a b c\n", "in line 2"),
    "counts.off": (b"OFF\nfive 2 0\n", "numbers of vertices"),
    "cut.off": (OFF[:40].encode(), "expected 5 vertices, got"),
    "cut_faces.off": (OFF[:-8].encode(), "expected 2 faces, got 1"),
    "giant.off": (b"OFF 99999999999 0 0\n0 0 0\n", "expected 99999999999 vertices"),
    "zero_area.obj": (b"v 0 0 0\nv 1 1 1\nv 2 2 2\nf 1 2 3\n", "faces of zero area"),
    "zero_area.off": (b"OFF 3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n", "faces of zero area"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_points(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_points(tmp_path / "none.ply")
    with pytest.raises(ValueError, match="got a folder"):
        read_points(tmp_path)


@pytest.mark.parametrize("suffix", READERS)
def test_any_cut_and_any_byte_is_an_error_or_points(tmp_path: Path, suffix: str) -> None:
    """Whatever happens to a file, the reader gives finite points or a ValueError, never something else."""
    whole = next(c for n, c in {**CLOUDS, **MESHES, "a.txt": rows().encode()}.items() if n.endswith(suffix))
    generator = np.random.default_rng(5)
    path = tmp_path / f"file{suffix}"
    for trial in range(120):
        content = bytearray(whole[: generator.integers(len(whole))] if trial % 2 else whole)
        for _ in range(trial % 4):
            if content:
                content[generator.integers(len(content))] = generator.integers(256)
        path.write_bytes(bytes(content))
        try:
            points = read_points(path, num_points=8, features=["normals"] if trial % 3 else [])
        except ValueError:
            continue
        assert points.shape[1] == (6 if trial % 3 else 3)
        assert np.isfinite(points).all()


def test_surface_sampling_follows_area() -> None:
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [10, 0, 0], [13, 0, 0], [10, 1, 0.0]])
    faces = np.array([[0, 1, 2], [0, 0, 0], [3, 4, 5]])
    points = sample_surface(vertices, faces, 40_000, np.random.default_rng(0))
    second = points[:, 0] > 5
    assert abs(second.mean() - 0.75) < 0.01  # three times the area
    first = points[~second]
    assert (first[:, :2].sum(axis=1) <= 1 + 1e-9).all()
    np.testing.assert_allclose(first.mean(axis=0), [1 / 3, 1 / 3, 0], atol=0.01)
    with pytest.raises(ValueError, match="at least 1"):
        sample_surface(vertices, faces, 0, np.random.default_rng(0))
