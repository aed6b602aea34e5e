"""torch.export and ONNX: the same logits from a graph in a file, for batches of any size."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import close, clouds, tiny
from torch import Tensor

from any2point import Any2Point, ops
from any2point.models.decompositions import decompositions
from any2point.models.export import export_onnx, export_program

pytestmark = pytest.mark.usefixtures("one_thread")


def samples(model: Any2Point, *sizes: int) -> Iterator[tuple[Tensor, ...]]:
    for batch in sizes:
        points = clouds(batch)[:, : model.config.num_points].contiguous()
        points[0, 3] = torch.nan
        extra = model.config.input_features
        yield (points, torch.rand(batch, points.shape[1], extra)) if extra else (points,)


@pytest.mark.parametrize("family", ["clip-text", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_export(family: str, tmp_path: Path) -> None:
    model = tiny(family, input_features=1).train()
    program = export_program(model)
    assert model.training
    model.eval()
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    for op in ("farthest_point_sample", "knn", "group", "interpolate", "voxel_cluster", "segment_pool"):
        assert f"any2point.{op}.default" in names
    for arguments in samples(model, 1, 2, 5):
        close(loaded(*arguments), model(*arguments), 1e-6)


def test_decompositions() -> None:
    """They are the ops, ties of neighbours apart."""
    table = {str(op).split(".")[1]: function for op, function in decompositions().items()}
    assert set(table) == {name for name in table if hasattr(ops, name)}

    def check(name: str, *arguments: Any) -> None:
        want = getattr(torch.ops.any2point, name).default(*arguments)
        got = table[name](*arguments)
        for a, b in zip(*((x,) if isinstance(x, Tensor) else x for x in (got, want))):
            if a.is_floating_point():
                torch.testing.assert_close(a, b, equal_nan=True)
            elif name != "segment_pool":  # which saves for its gradient
                assert torch.equal(a, b), name

    points = torch.randn(3, 60, 3)
    points[0, 3], points[1], points[2, 5, 0] = torch.nan, torch.nan, torch.inf
    lattice = (points * 2).round() / 2
    for start in (None, torch.tensor([5, 3, 70])):
        for pointnet2 in (False, True):
            for cloud in (points, lattice, points / 50):
                check("farthest_point_sample", cloud, 20, None, None, start, pointnet2)
        check("farthest_point_sample", points[..., :2], 80, None, None, start, False)
    for k in (5, 70):
        for in_order in (False, True):
            check("knn", points[:, :13], points, k, None, None, None, None, in_order)
    for cloud in (points, lattice):
        check("voxel_cluster", cloud, [0.4, 0.5, 0.6], None, None, None)
        check("voxel_cluster", cloud, [0.4, 0.5, 0.6], None, None, torch.full((3, 3), -9.0))
    index = torch.randint(-1, 60, (3, 7))
    check("group", points, index)
    check("interpolate", points[2:].nan_to_num(0, 0), index[:1, :6].view(1, 2, 3), torch.rand(1, 2, 3))
    for reduce in ("mean", "max", "sum"):
        check("segment_pool", torch.randn(40, 5), torch.randint(-1, 9, (40,)), 12, reduce, None, None)
    with pytest.raises(ValueError, match="`lengths`, `offsets`: expected None in an exported model"):
        table["farthest_point_sample"](points, 4, torch.tensor([4, 4, 4]), None, None, False)


def run_onnx(model: Any2Point, path: Path) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    assert export_onnx(model, path) == path
    onnx.checker.check_model(str(path))
    session = runtime.InferenceSession(str(path))
    names = ["points", "features"] if model.config.input_features else ["points"]
    assert [i.name for i in session.get_inputs()] == names
    domains = {node.domain for node in onnx.load(str(path)).graph.node}
    assert "any2point" not in domains
    for arguments in samples(model, 1, 3):
        got = session.run(["logits"], dict(zip(names, (x.numpy() for x in arguments))))[0]
        close(torch.from_numpy(got), model(*arguments), 1e-5)


def test_onnx(tmp_path: Path) -> None:
    """Every op of the library in standard operators, run by onnxruntime."""
    run_onnx(tiny(input_features=2), tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("dinov2", {"pooling": "max+mean", "views": 2, "tokenizer_units": (1, 1)}),
        ("dinov2", {"parity": "official", "views": 6, "fps_tie": "pointnet2"}),
        ("clip-text", {"tokenizer": "pointnet", "ensemble": "max", "neighbors": 24}),
        ("clip-text", {"parity": "official", "views": 6}),
    ],
)
def test_onnx_variants(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    run_onnx(tiny(family, **options), tmp_path / "model.onnx")


@pytest.mark.slow
def test_onnx_with_custom_operators(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path = export_onnx(tiny(), tmp_path / "model.onnx", decompose=False, optimize=False)
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    nodes = {node.op_type: node for node in model.graph.node if node.domain == "any2point"}
    wanted = {"FarthestPointSample", "Knn", "Group", "Interpolate", "VoxelCluster", "SegmentPool"}
    assert set(nodes) == wanted
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes["Knn"].attribute}
    assert attributes == {"k": 4, "sorted": 0}
    assert {opset.domain for opset in model.opset_import} >= {"", "any2point"}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "onnxscript":
            raise ImportError("No module named 'onnxscript'", name="onnxscript")
        return found(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"needs onnxscript: pip install 'any2point\[onnx\]"):
        export_onnx(tiny(), tmp_path / "model.onnx")


def test_padding_of_an_exported_model() -> None:
    """Points that are NaN say what lengths would."""
    model = tiny()
    points, lengths = clouds(2)[:, :24].contiguous(), torch.tensor([24, 9])
    want = model(points, lengths=lengths)
    points[1, 9:] = torch.nan
    close(export_program(model).module()(points), want, 1e-5)
