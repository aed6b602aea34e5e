"""A trained model for other runtimes: `torch.export` and ONNX, with any number of clouds per batch."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from any2point.models.decompositions import decompositions

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from any2point.models.base import PointModel

DOMAIN = "any2point"


def export_program(model: PointModel, num_points: int | None = None) -> ExportedProgram:
    """The evaluation graph as an `ExportedProgram`, of which the ops of this library are nodes.

    Whoever loads it has to import `any2point.ops` first. The size of the batch is left open.

    Args:
        model: the model; exported as in evaluation mode.
        num_points: N, `config.num_points` by default.

    Returns:
        A program that takes `points [B, N, 3]` and, for a model with `input_features`, `features [B, N, F]`,
        and gives logits. `torch.export.save` writes it to a file. There are no lengths: a cloud of fewer
        points is filled up with NaN, which says the same.

    Example:
        >>> program = export_program(model)
        >>> torch.export.save(program, "model.pt2")
        >>> torch.export.load("model.pt2").module()(points)
    """
    config, parameter = model.config, next(model.parameters())
    count = config.num_points if num_points is None else num_points
    # Two clouds, since a size of one in an example is taken for a constant.
    points = torch.rand(2, count, 3, dtype=parameter.dtype, device=parameter.device)
    batch = torch.export.Dim("batch")
    arguments: tuple[Tensor, ...] = (points,)
    dynamic: dict[str, dict[int, Any]] = {"points": {0: batch}}
    if config.input_features:
        features = torch.rand(*points.shape[:2], config.input_features).to(points)
        arguments, dynamic = (points, features), {**dynamic, "features": {0: batch}}
    training = model.training
    try:
        with torch.no_grad():
            return torch.export.export(model.eval(), arguments, dynamic_shapes=dynamic)
    finally:
        model.train(training)


def export_onnx(
    model: PointModel,
    path: str | Path,
    *,
    decompose: bool = True,
    num_points: int | None = None,
    optimize: bool = True,
) -> Path:
    """Write the evaluation graph to an ONNX file, with inputs and output named as in `export_program`.

    Args:
        model: the model; exported as in evaluation mode.
        path: file to write; weights that do not fit into it go to a file beside it.
        decompose: write the ops of this library as standard ONNX operators, which any runtime has
            (farthest point sampling as a `Scan`, neighbours by `TopK`, pooling by `Scatter*`). False leaves
            them as operators of the domain "any2point", for a runtime that brings kernels of its own:
            `FarthestPointSample`, `Knn`, `Group`, `Interpolate`, `VoxelCluster`, `SegmentPool`, with the
            inputs, attributes and outputs of `torch.ops.any2point`; of `SegmentPool`, `num_segments` is the
            third input.
        num_points: N, `config.num_points` by default.
        optimize: fold constants and remove what is not needed.

    Returns:
        The path.

    Raises:
        ImportError: onnx or onnxscript is missing.

    Example:
        >>> export_onnx(model, "model.onnx")
        >>> session = onnxruntime.InferenceSession("model.onnx")
        >>> session.run(["logits"], {"points": points.numpy()})
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"exporting to ONNX needs {error.name}: pip install 'any2point[onnx]'") from None
    path = Path(path)
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()
    table.update(decompositions() if decompose else _symbols())
    with _quiet():
        program = export_program(model, num_points).run_decompositions(table)
        names = ["points", "features"] if model.config.input_features else ["points"]
        exported = torch.onnx.export(
            program,
            dynamo=True,
            input_names=names,
            output_names=["logits"],
            optimize=optimize,
            verbose=False,
        )
    assert exported is not None
    exported.save(str(path))
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages and attributes that play no part."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _symbols() -> dict[Any, Callable[..., Any]]:
    """Operator -> function that stands for an ONNX operator of this library's domain."""
    library = torch.ops.any2point
    int64 = torch.int64

    def symbol(name: str, inputs: Any, attributes: Any, dtypes: Any, shapes: Any) -> tuple[Tensor, ...]:
        return tuple(
            torch.onnx.ops.symbolic_multi_out(
                f"{DOMAIN}::{name}", inputs, attributes, dtypes=dtypes, shapes=shapes, version=1
            )
        )

    def farthest_point_sample(
        points: Tensor,
        num_samples: int,
        lengths: Tensor | None,
        offsets: Tensor | None,
        start: Tensor | None,
        pointnet2: bool,
    ) -> tuple[Tensor, ...]:
        shape, attributes = [points.shape[0], num_samples], {"num_samples": num_samples}
        return symbol(
            "FarthestPointSample",
            (points, lengths, offsets, start),
            attributes | {"pointnet2": pointnet2},
            (int64, points.dtype),
            (shape, shape),
        )

    def knn(
        query: Tensor,
        points: Tensor,
        k: int,
        query_lengths: Tensor | None,
        lengths: Tensor | None,
        query_offsets: Tensor | None,
        offsets: Tensor | None,
        sorted: bool,
    ) -> tuple[Tensor, ...]:
        shape = [*query.shape[:-1], k]
        inputs = query, points, query_lengths, lengths, query_offsets, offsets
        return symbol("Knn", inputs, {"k": k, "sorted": sorted}, (query.dtype, int64), (shape, shape))

    def group(features: Tensor, index: Tensor) -> Tensor:
        shape = [features.shape[0], index.shape[1], features.shape[2]]
        return symbol("Group", (features, index), {}, (features.dtype,), (shape,))[0]

    def interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        shape = [features.shape[0], index.shape[1], features.shape[2]]
        return symbol("Interpolate", (features, index, weight), {}, (features.dtype,), (shape,))[0]

    def voxel_cluster(
        points: Tensor,
        size: list[float],
        lengths: Tensor | None,
        offsets: Tensor | None,
        origin: Tensor | None,
    ) -> tuple[Tensor, ...]:
        rows = points.shape[0] * points.shape[1]
        shapes: tuple[list[int], ...] = [*points.shape[:-1]], [rows + 1], [rows], []
        inputs = points, lengths, offsets, origin
        return symbol("VoxelCluster", inputs, {"size": size}, (int64,) * 4, shapes)

    def segment_pool(
        features: Tensor,
        segment: Tensor,
        num_segments: int,
        reduce: str,
        order: Tensor | None,
        start: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # How many there are depends on the batch, so it cannot be an attribute.
        number = torch.full((), num_segments, dtype=int64, device=features.device)
        inputs = features, segment, number, order, start
        shape = [num_segments, features.shape[1]]
        saved = {"sum": [0], "mean": [num_segments], "max": shape}[reduce]
        return symbol("SegmentPool", inputs, {"reduce": reduce}, (features.dtype, int64), (shape, saved))

    return {
        library.farthest_point_sample.default: farthest_point_sample,
        library.knn.default: knn,
        library.group.default: group,
        library.interpolate.default: interpolate,
        library.voxel_cluster.default: voxel_cluster,
        library.segment_pool.default: segment_pool,
    }
