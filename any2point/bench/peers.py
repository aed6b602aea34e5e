"""What the ops are measured against: other libraries, each guarded, and what people write in torch.

GPU peers come from a folder outside the repository (`--peers DIR`) that holds a module `peers` with
`load() -> {name: Peer}`; a `Peer` has `fps`, `knn` and `group`, each None or an op with
`prepare(*inputs) -> args` (untimed), `run(*args)` (timed), `finish(result, *inputs)` (untimed, to our
conventions) and `graph` (what a CUDA graph can capture in place of `run`, or None).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from any2point import reference

Sampler = Callable[[np.ndarray, int], np.ndarray]
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, ...]]
GPU_PEERS = [
    "pointnet2_ops",
    "pytorch3d",
    "pointops",
    "torch_fps",
    "torch_quickfps",
    "torch_cluster",
    "pyg-lib",
]


@cache
def missing(module: str) -> str:
    """Why a module cannot be used here; empty if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module}: {error}"
    return ""


@cache
def samplers() -> dict[str, Sampler]:
    """Exact farthest point samplers for NumPy, start 0: fpsample's variants and torch_cluster's."""
    found: dict[str, Sampler] = {}
    if not missing("fpsample"):
        import fpsample

        def line(height: int) -> Sampler:
            return lambda points, samples: fpsample.bucket_fps_kdline_sampling(points, samples, height, 0)

        found |= {f"fpsample kdline h={h}": line(h) for h in (3, 5, 7, 9)}
        found["fpsample kdtree"] = lambda points, samples: fpsample.bucket_fps_kdtree_sampling(
            points, samples, 0
        )
        found["fpsample vanilla"] = lambda points, samples: fpsample.fps_sampling(points, samples, 0)
    if not missing("torch_cluster"):
        import torch_cluster

        def cluster(points: np.ndarray, samples: int) -> np.ndarray:
            ratio = (samples - 0.5) / len(points)  # of which it takes the ceiling
            return torch_cluster.fps(torch.from_numpy(points), ratio=ratio, random_start=False).numpy()

        found["torch_cluster"] = cluster
    return found


def skipped() -> list[str]:
    """Why each library that is not here is not measured."""
    modules = (
        "fpsample", "scipy.spatial", "pykdtree.kdtree", "sklearn.neighbors", "open3d.core", "torch_cluster",
    )  # fmt: skip
    return [missing(module) for module in modules if missing(module)]


@cache
def searches() -> dict[str, Search]:
    """Exact neighbour searches for NumPy, one thread, build and query: the index, then what else there is."""
    found: dict[str, Search] = {}
    if not missing("scipy.spatial"):
        from scipy.spatial import cKDTree

        def scipy(
            query: np.ndarray, points: np.ndarray, k: int, **options: Any
        ) -> tuple[np.ndarray, np.ndarray]:
            distance, index = cKDTree(points, **options).query(query, k, workers=1)
            return index, distance

        found["scipy cKDTree"] = scipy
        found["scipy cKDTree sliding"] = lambda query, points, k: scipy(
            query, points, k, balanced_tree=False, compact_nodes=False
        )
    if not missing("pykdtree.kdtree"):
        from pykdtree.kdtree import KDTree

        def pykdtree(
            query: np.ndarray, points: np.ndarray, k: int, leaf: int
        ) -> tuple[np.ndarray, np.ndarray]:
            distance, index = KDTree(points, leafsize=leaf).query(query, k)
            return index, distance

        found["pykdtree"] = lambda query, points, k: pykdtree(query, points, k, 16)
        found["pykdtree leaf=32"] = lambda query, points, k: pykdtree(query, points, k, 32)
    if not missing("sklearn.neighbors"):
        from sklearn.neighbors import KDTree as SklearnTree

        def sklearn(query: np.ndarray, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            distance, index = SklearnTree(points).query(query, k)
            return index, distance

        found["scikit-learn KDTree"] = sklearn
    if not missing("open3d.core"):
        import open3d.core as o3c

        def open3d(query: np.ndarray, points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            search = o3c.nns.NearestNeighborSearch(o3c.Tensor.from_numpy(points))
            search.knn_index()
            index, squared = search.knn_search(o3c.Tensor.from_numpy(query), k)
            return index.numpy(), squared.numpy()

        found["Open3D"] = open3d
    if not missing("torch_cluster"):
        import torch_cluster

        def cluster(query: np.ndarray, points: np.ndarray, k: int) -> tuple[np.ndarray]:
            edges = torch_cluster.knn(torch.from_numpy(points), torch.from_numpy(query), k)
            return (edges[1].view(len(query), k).numpy(),)

        found["torch_cluster"] = cluster
    return found


@cache
def gpu_peers(folder: str | None) -> dict[str, Any]:
    """The GPU peers of `folder` (see above), or {}."""
    if not folder or not torch.cuda.is_available():
        return {}
    # Under its own name: `peers` of that folder must not be confused with this module.
    path = Path(folder).resolve()
    sys.path.insert(0, str(path))
    spec = importlib.util.spec_from_file_location("any2point_gpu_peers", path / "peers.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"`--peers`: expected a folder with peers.py, got {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.load(verbose=True)


def torch_farthest_points(points: Tensor, samples: int, start: int | Tensor = 0) -> Tensor:
    """The loop over picks that most PyTorch code has, all clouds at once."""
    batch = points.shape[0]
    nearest = points.new_full(points.shape[:2], torch.inf)
    index = torch.zeros(batch, samples, dtype=torch.int64, device=points.device)
    index[:, 0] = start
    which = torch.arange(batch, device=points.device)
    for pick in range(1, samples):
        last = points[which, index[:, pick - 1]]
        nearest = torch.minimum(nearest, (points - last[:, None]).square().sum(-1))
        index[:, pick] = nearest.argmax(-1)
    return index


def torch_farthest_hierarchy(points: Tensor, sizes: list[int]) -> list[Tensor]:
    """One loop per level, each on the points of the level before."""
    levels: list[Tensor] = []
    for size in sizes:
        index = torch_farthest_points(points, size)
        points = points.gather(1, index[..., None].expand(-1, -1, points.shape[-1]))
        levels.append(levels[-1].gather(1, index) if levels else index)
    return levels


def torch_knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`cdist` + `topk` (not squared: the order is the same)."""
    distance, index = torch.cdist(query, points).topk(k, dim=-1, largest=False)
    return index, distance


def torch_group(features: Tensor, index: Tensor) -> Tensor:
    """Advanced indexing."""
    batch = torch.arange(features.shape[0], device=features.device).view(-1, *[1] * (index.dim() - 1))
    return features[batch, index]


def torch_group_gather(features: Tensor, index: Tensor) -> Tensor:
    """`gather` over flat rows."""
    flat = index.flatten(1)
    rows = features.gather(1, flat[..., None].expand(-1, -1, features.shape[-1]))
    return rows.view(*index.shape, features.shape[-1])


def expanded_knn(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """|a|^2 + |b|^2 - 2ab and an unsorted topk, as the published code computes it."""
    distance = -2 * query @ points.transpose(1, 2) + query.square().sum(-1)[..., None]
    distance = distance + points.square().sum(-1)[:, None]
    values, index = distance.topk(k, dim=-1, largest=False, sorted=False)
    return index, values


def torch_interpolate(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Advanced indexing and a weighted sum."""
    return (torch_group(features, index) * weight[..., None]).sum(2)


def torch_voxels(points: Tensor, size: float) -> Tensor:
    """Cluster of each point by floor and unique, numbered by (cloud, z, y, x)."""
    voxel = ((points - points.amin(1, keepdim=True)) / size).long()
    extent = voxel.amax((0, 1)) + 1
    cloud = torch.arange(len(points), device=points.device)[:, None]
    key = ((cloud * extent[2] + voxel[..., 2]) * extent[1] + voxel[..., 1]) * extent[0] + voxel[..., 0]
    return torch.unique(key, return_inverse=True)[1]


def torch_segment_pool(features: Tensor, segment: Tensor, count: int, reduce: str) -> Tensor:
    """`scatter_reduce`, or `index_add` over counts; of segments without rows a maximum is 0."""
    out = features.new_zeros(count, features.shape[1])
    if reduce == "max":
        rows = segment[:, None].expand_as(features)
        return out.scatter_reduce(0, rows, features, "amax", include_self=False)
    # Not `bincount`, which waits for the device.
    rows = features.new_zeros(count).index_add(0, segment, features.new_ones(len(segment)))
    return out.index_add(0, segment, features) / rows.clamp(min=1)[:, None]


# The specifications of the fused ops with what people write for their primitives: these check no index, so
# that they neither wait for the device nor break a graph.


def torch_virtual_project(*args: Any, **options: Any) -> Any:
    """The specification, with indexing."""

    def interpolate(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return (table[index] * weight[..., None]).sum(-2)

    return reference.virtual_project(*args, **options, interpolate=interpolate)


def torch_local_aggregate(
    points: Tensor,
    features: Tensor,
    *args: Any,
    operand_dtype: torch.dtype | None = None,
    recompute: bool = False,
    **options: Any,
) -> Tensor:
    """The specification, with indexing; of 16-bit features under autocast.

    `operand_dtype` and `recompute` are for kernels.
    """
    if features.dtype == torch.float32:
        return reference.local_aggregate(points, features, *args, **options, group=torch_group)
    with torch.autocast(features.device.type, features.dtype):
        out = reference.local_aggregate(points, features.float(), *args, **options, group=torch_group)
    return out.to(features.dtype)


def torch_guided_aggregate(*args: Any, **options: Any) -> Tensor:
    """The specification, with indexing and scatters."""
    options |= {"scale": args[3].proj_weight.shape[-1] ** -0.5, "segment_pool": torch_segment_pool}
    return reference.guided_aggregate(*args, **options, group=lambda features, index: features[index])
