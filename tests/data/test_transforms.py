"""Transforms: what each does, features that stay with their points, and the official rules in plain NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from any2point.data import PointDataset, transforms
from any2point.reference import farthest_point_sample
from any2point.train import TrainConfig

TRANSFORMS = [
    transforms.Center(),
    transforms.UnitSphere(),
    transforms.RandomScale(),
    transforms.RandomScale(per_axis=False),
    transforms.RandomMirror(),
    transforms.RandomShift(),
    transforms.RandomYaw(),
    transforms.Jitter(),
    transforms.RandomSubset(40),
    transforms.RandomSubset(40, shared=True),
    transforms.FarthestPointSubset(40),
    transforms.FarthestPointSubset(40, start="random"),
    transforms.Compose((transforms.RandomYaw(), transforms.RandomScale(), transforms.RandomSubset(64))),
]
FIXED = (transforms.Center(), transforms.UnitSphere(), transforms.FarthestPointSubset(40))


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_transforms_are_seeded_pure_and_the_same_everywhere(
    transform: transforms.Transform, device: str
) -> None:
    points = torch.randn(5, 64, 7, generator=seeded(0)) * 3 + 1
    here = points.to(device)
    once = transform(here, seeded(1))
    assert torch.equal(here.cpu(), points)
    assert once.device == here.device
    assert torch.equal(once.cpu(), transform(points, seeded(1)))
    if transform not in FIXED:
        assert not torch.equal(once, transform(here, seeded(2)))
    if transform not in (*FIXED, transforms.RandomSubset(40, shared=True)):
        same = transform(points[:1].expand(5, -1, -1), seeded(1))
        assert not torch.equal(same[0], same[1])  # every cloud gets its own draw
    # A part of a batch gets the numbers of its rows.
    rows = slice(2, 4)
    part = transform(here[rows], transforms.Rows(seeded(1), 5, rows))
    assert torch.equal(part, once[rows])
    # Without the features the points are the same, and each keeps its features.
    assert torch.equal(transform(here[..., :3].contiguous(), seeded(1)), once[..., :3])
    assert set(once[0, :, 3:].flatten().tolist()) <= set(points[0, :, 3:].flatten().tolist())


def test_transform_invariants(device: str) -> None:
    points = (torch.randn(5, 64, 3) + 3).to(device)
    generator = seeded(0)
    assert transforms.Center()(points).mean(dim=1).abs().max() < 1e-5
    sphere = transforms.UnitSphere()(points)
    torch.testing.assert_close(sphere.norm(dim=-1).amax(dim=1).cpu(), torch.ones(5))
    spot = torch.ones(1, 4, 3, device=device)
    assert torch.equal(transforms.UnitSphere()(spot), torch.zeros_like(spot))
    turned = transforms.RandomYaw()(points, generator)
    torch.testing.assert_close(turned[..., 1], points[..., 1])
    torch.testing.assert_close(turned.norm(dim=-1), points.norm(dim=-1))
    torch.testing.assert_close(
        (turned[:, 1:] - turned[:, :-1]).norm(dim=-1), (points[:, 1:] - points[:, :-1]).norm(dim=-1)
    )
    ratio = transforms.RandomScale(0.5, 2.0)(points, generator) / points
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert ratio.min() >= 0.5
    assert ratio.max() <= 2
    moved = transforms.RandomShift(0.2)(points, generator) - points
    assert moved.abs().max() <= 0.2 + 1e-6
    assert (transforms.Jitter(0.1, 0.05)(points, generator) - points).abs().max() <= 0.05 + 1e-6
    subset = transforms.RandomSubset(40)(points, generator)
    assert (subset[:, :, None] == points[:, None]).all(-1).any(-1).all()
    assert len(torch.unique(subset[0], dim=0)) == 40
    with pytest.raises(ValueError, match="at least 65 per cloud, got 64"):
        transforms.RandomSubset(65)(points, generator)
    with pytest.raises(ValueError, match="at least 65 per cloud, got 64"):
        transforms.FarthestPointSubset(65)(points, generator)
    assert transforms.FarthestPointSubset(65, at_most=True)(points).shape == (5, 64, 3)


def test_distributions() -> None:
    """A thousand draws fill their ranges evenly."""
    points = torch.ones(1000, 1, 3)
    scale = transforms.RandomScale(0.9, 1.1)(points, seeded(0)).flatten(1)
    shift = (transforms.RandomShift(0.2)(points, seeded(1)) - points).flatten(1)
    yaw = transforms.RandomYaw()(points, seeded(2))[:, 0]
    angle = torch.atan2(yaw[:, 0], yaw[:, 2])
    for values, low, high in ((scale, 0.9, 1.1), (shift, -0.2, 0.2), (angle[:, None], -math.pi, math.pi)):
        width = high - low
        assert values.min() >= low - 1e-6
        assert values.max() <= high + 1e-6
        assert (values.mean(dim=0) - (low + high) / 2).abs().max() < 0.04 * width
        assert (values.std(dim=0) - width / math.sqrt(12)).abs().max() < 0.03 * width
    assert torch.corrcoef(scale.T).fill_diagonal_(0).abs().max() < 0.1  # axes are drawn apart
    assert (
        transforms.RandomScale(0.9, 1.1, per_axis=False)(points, seeded(0)).flatten(1).std(dim=1).max() < 1e-6
    )
    mirror = transforms.RandomMirror(0.25)(points, seeded(3))[:, 0]
    assert (mirror[:, 1] == 1).all()
    assert (abs((mirror[:, [0, 2]] == -1).float().mean(dim=0) - 0.25) < 0.05).all()
    start = torch.arange(8.0)[None, :, None].expand(1000, -1, 3)
    first = transforms.FarthestPointSubset(1, start="random")(start, seeded(4))[:, 0, 0]
    assert (torch.bincount(first.long(), minlength=8) > 80).all()


def test_subsets() -> None:
    points = torch.arange(50.0)[None, :, None].expand(4, -1, 3)
    own = transforms.RandomSubset(20)(points, seeded(0))[..., 0]
    shared = transforms.RandomSubset(20, shared=True)(points, seeded(0))[..., 0]
    assert (own[0] != own[1]).any()
    assert (shared == shared[0]).all()
    assert len(shared[0].unique()) == 20
    assert (shared[0].diff() < 0).any()  # in random order


def test_farthest_point_subset(device: str) -> None:
    points = torch.randn(2, 64, 3)
    subset = transforms.FarthestPointSubset(8)(points.to(device)).cpu()
    index = farthest_point_sample(points, 8)
    index = index[0] if isinstance(index, tuple) else index
    assert torch.equal(subset, points.gather(1, index[..., None].expand(-1, -1, 3)))


def surface(count: int) -> Tensor:
    """An ellipsoid's points and normals, [1, count, 6]."""
    direction = torch.nn.functional.normalize(torch.randn(1, count, 3), dim=-1)
    axes = torch.tensor([1.0, 2.0, 0.5])
    normals = torch.nn.functional.normalize(direction / axes, dim=-1)
    return torch.cat([direction * axes, normals], dim=-1)


@pytest.mark.parametrize(
    "transform",
    [
        transforms.RandomScale(0.5, 2.0, normals=3),
        transforms.RandomMirror(1.0, (0,), normals=3),
        transforms.RandomYaw(normals=3),
        transforms.RandomYaw(axis=0, normals=3),
    ],
    ids=str,
)
def test_normals_stay_normal_to_the_surface(transform: transforms.Transform, device: str) -> None:
    """Two tangents at a point go through the transform as points do; the normal stays at right angles."""
    cloud = surface(50)
    first = torch.linalg.cross(cloud[..., 3:], torch.randn(1, 50, 3))
    second = torch.linalg.cross(cloud[..., 3:], first)
    whole = torch.cat([cloud[..., :3], cloud[..., :3] + first, cloud[..., :3] + second], dim=1)
    whole = torch.cat([whole, cloud[..., 3:].repeat(1, 3, 1)], dim=-1).to(device)
    moved = transform(whole, seeded(3)).cpu()
    base, one, two = moved[..., :3].split(50, dim=1)
    normal = moved[:, :50, 3:]
    torch.testing.assert_close(normal.norm(dim=-1), torch.ones(1, 50))
    assert ((one - base) * normal).sum(-1).abs().max() < 1e-5
    assert ((two - base) * normal).sum(-1).abs().max() < 1e-5
    assert ((moved[:, :50, :3] * normal).sum(-1) > 0).all()  # still outwards
    assert not torch.allclose(normal, cloud[..., 3:])


# --- The official rules ---


def numpy_fps(points: np.ndarray, count: int, skip: bool) -> np.ndarray:
    """Farthest point sampling from the first point, as the official kernels do it, apart from ties."""
    points = points.astype(np.float32)
    eligible = (points.astype(np.float64) ** 2).sum(1) > 1e-3 if skip else np.ones(len(points), bool)
    level = np.full(len(points), 1e10, np.float32)
    picks = [0]
    while len(picks) < count:
        offset = points - points[picks[-1]]
        square = offset[:, 0] * offset[:, 0] + offset[:, 1] * offset[:, 1] + offset[:, 2] * offset[:, 2]
        level = np.minimum(level, square)
        picks.append(int(np.where(eligible, level, -1).argmax()))
    return np.array(picks)


def numpy_center(points: np.ndarray) -> np.ndarray:
    return points - points.astype(np.float64).mean(0).astype(np.float32)


def numpy_sphere(points: np.ndarray) -> np.ndarray:
    points = numpy_center(points)
    return points / np.sqrt((points.astype(np.float64) ** 2).sum(1).max()).astype(np.float32)


def scan_train(
    cloud: np.ndarray, scale: np.ndarray, turn: np.ndarray, start: int, chosen: np.ndarray
) -> np.ndarray:
    """Shuffle, scale per axis, centre, turn about y, the farthest 1200, 1024 of these."""
    order = np.r_[
        start, np.delete(np.arange(len(cloud)), start)
    ]  # a shuffle, of which the first point counts
    cloud = numpy_center((cloud * scale)[order])
    cos, sin = turn
    x, y, z = cloud.T
    cloud = np.stack([sin * z + cos * x, y, cos * z - sin * x], axis=1)
    return cloud[numpy_fps(cloud, 1200, skip=False)][chosen]


def mn_train(
    cloud: np.ndarray, start: int, chosen: np.ndarray, scale: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """Unit sphere, shuffle, the farthest 1200 away from the origin, 1024 of these, scale and shift."""
    order = np.r_[start, np.delete(np.arange(len(cloud)), start)]
    cloud = numpy_sphere(cloud)[order]
    return cloud[numpy_fps(cloud, 1200, skip=True)][chosen] * scale + shift


def blobs(count: int, num_points: int) -> Tensor:
    """Clouds that are neither centred nor of unit size, some of their points near their centre."""
    points = torch.randn(count, num_points, 3, generator=seeded(7))
    points[:, :40] *= 0.01
    return points * torch.tensor([1.0, 0.7, 0.4]) + torch.tensor([0.3, -0.2, 0.1])


def test_official_training_of_scanobjectnn(device: str) -> None:
    clouds = blobs(3, 2048)
    transform = TrainConfig.official("scanobjectnn").train_transform(1024)
    result = transform(clouds.to(device), seeded(11)).cpu()
    generator = seeded(11)
    scale = (torch.rand(3, 1, 3, generator=generator) * (1.1 - 0.9) + 0.9).numpy()
    angle = torch.rand(3, generator=generator) * (2 * math.pi) - math.pi
    turn = torch.stack([angle.cos(), angle.sin()], dim=1).numpy()
    start = (torch.rand(3, generator=generator).double() * 2048).long().tolist()
    chosen = torch.randperm(1200, generator=generator)[:1024].numpy()  # one for the batch
    for row, cloud in enumerate(clouds.numpy()):
        expected = scan_train(cloud, scale[row], turn[row], start[row], chosen)
        np.testing.assert_array_equal(result[row].numpy(), expected)


def test_official_training_of_modelnet40(device: str) -> None:
    clouds = blobs(3, 3000)
    transform = TrainConfig.official("modelnet40").train_transform(1024)
    result = transform(clouds.to(device), seeded(12)).cpu()
    generator = seeded(12)
    start = (torch.rand(3, generator=generator).double() * 3000).long().tolist()
    chosen = torch.randperm(1200, generator=generator)[:1024].numpy()
    scale = (torch.rand(3, 1, 3, generator=generator) * (3 / 2 - 2 / 3) + 2 / 3).numpy()
    shift = (torch.rand(3, 1, 3, generator=generator) * 0.4 - 0.2).numpy()
    for row, cloud in enumerate(clouds.numpy()):
        expected = mn_train(cloud, start[row], chosen, scale[row], shift[row])
        np.testing.assert_array_equal(result[row].numpy(), expected)


@pytest.mark.parametrize("dataset", ["scanobjectnn", "modelnet40"])
def test_official_evaluation(dataset: str, device: str) -> None:
    clouds = blobs(3, 1100)  # so few that points near the origin would be among the 1024
    result = TrainConfig.official(dataset).eval_transform(1024)(clouds.to(device), None).cpu()
    for row, cloud in enumerate(clouds.numpy()):
        if dataset == "scanobjectnn":  # the farthest points of the file's cloud, which are then centred
            expected = numpy_center(cloud[numpy_fps(cloud, 1024, skip=False)])
        else:
            whole = numpy_sphere(cloud)
            expected = whole[numpy_fps(whole, 1024, skip=True)]
        np.testing.assert_array_equal(result[row].numpy(), expected)


# --- What the training options make of them ---


def test_options_default_to_what_was() -> None:
    expected = transforms.Compose(
        (
            transforms.UnitSphere(),
            transforms.FarthestPointSubset(1200, at_most=True),
            transforms.RandomSubset(1024),
            transforms.RandomScale(2 / 3, 3 / 2),
            transforms.RandomShift(0.2),
        )
    )
    assert TrainConfig().train_transform(1024) == expected
    fixed, each = TrainConfig().train_transform(1024).split()
    assert fixed.transforms == expected.transforms[:2]
    assert each.transforms == expected.transforms[2:]
    steps = (transforms.UnitSphere(), transforms.FarthestPointSubset(256))
    assert TrainConfig().eval_transform(256).transforms == steps


def test_split_changes_nothing() -> None:
    clouds = blobs(4, 300)
    for config in (
        TrainConfig(pool=200),
        TrainConfig.official("scanobjectnn"),
        TrainConfig(pool=0, normalize="none"),
    ):
        transform = config.train_transform(128)
        fixed, each = transform.split()
        assert torch.equal(each(fixed(clouds), seeded(0)), transform(clouds, seeded(0)))
    assert not TrainConfig.official("scanobjectnn").train_transform(128).split()[0].transforms
    assert TrainConfig().eval_transform(128).split()[1].transforms == ()


def test_small_clouds_are_their_own_pool() -> None:
    clouds = blobs(2, 1100)
    assert TrainConfig().train_transform(1024)(clouds, seeded(0)).shape == (2, 1024, 3)


def test_options_reach_the_transforms() -> None:
    config = TrainConfig(mirror=0.3, yaw=90, up=2, jitter=0.01, fps="pointnet2", pool_start="random")
    chain = config.train_transform(64, ("red", "green", "blue", "nx", "ny", "nz")).transforms
    assert transforms.RandomMirror(0.3, (0, 1), 6) in chain
    assert transforms.RandomYaw(math.pi / 2, 2, 6) in chain
    assert transforms.RandomScale(2 / 3, 3 / 2, normals=6) in chain
    assert transforms.FarthestPointSubset(1200, "random", "pointnet2", True) in chain
    again = TrainConfig.from_dict(config.to_dict())
    assert again == config
    assert TrainConfig.official("modelnet40", epochs=3).epochs == 3
    for options, name in (
        ({"mirror": 1.5}, "mirror"),
        ({"subset": "batch"}, "subset"),
        ({"augment": "all"}, "augment"),
        ({"eval_points": "first"}, "eval_points"),
        ({"fps": "exact"}, "fps"),
        ({"pool_start": "last"}, "pool_start"),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            TrainConfig(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`dataset`: expected one of scanobjectnn, modelnet40"):
        TrainConfig.official("shapenet")


@pytest.mark.parametrize(("dataset", "epochs"), [("scanobjectnn", 300), ("modelnet40", 301)])
def test_official_numbers(dataset: str, epochs: int) -> None:
    """Optimiser, batches, and the rate of every epoch; ModelNet40's first two are both at the least rate."""
    config = TrainConfig.official(dataset)
    expected = {"lr": 5e-4, "weight_decay": 0.05, "clip_norm": 10, "label_smoothing": 0, "select": "test"}
    expected |= {"batch_size": 32, "eval_batch_size": 64, "epochs": epochs, "schedule": "epoch"}
    assert {name: config.to_dict()[name] for name in expected} == expected
    for epoch in range(epochs):
        at = epoch if dataset == "scanobjectnn" else max(epoch - 1, 0)
        warm, cosine = 1e-6 + 4.99e-5 * at, 1e-6 + 0.5 * (5e-4 - 1e-6) * (1 + math.cos(math.pi * at / 300))
        assert config.learning_rate(epoch) == pytest.approx(warm if at < 10 else cosine)


# --- Features in a data set ---


def test_features_stay_with_their_clouds() -> None:
    points, features = torch.randn(6, 10, 3), torch.randn(6, 10, 2)
    labels = torch.tensor([0, 1] * 3)
    data = PointDataset(points, labels, ("a", "b"), tuple("uvwxyz"), features, ("red", "height"))
    assert torch.equal(data.inputs(), torch.cat([points, features], dim=-1))
    rows = torch.tensor([4, 1])
    assert torch.equal(data.inputs(rows), data.inputs()[rows])
    part = data.subset(rows)
    assert part.names == ("y", "v")
    assert torch.equal(part.inputs(), data.inputs(rows))
    for half in data.split(0.5):
        assert half.feature_names == ("red", "height")
        assert half.names is not None
        for name, cloud in zip(half.names, half.inputs()):
            assert torch.equal(cloud, data.inputs()["uvwxyz".index(name)])
    assert torch.equal(data.to("cpu").inputs(), data.inputs())
    cloud, label = data[-1]
    assert torch.equal(cloud, data.inputs()[5])
    assert label == 1
    fewer = data.with_inputs(transforms.FarthestPointSubset(4)(data.inputs()))
    assert fewer.points.shape == (6, 4, 3)
    assert fewer.features is not None
    assert fewer.features.shape == (6, 4, 2)
    assert fewer.names == data.names
    plain = PointDataset(points, labels, ("a", "b"))
    assert torch.equal(plain.inputs(), points)
    assert torch.equal(plain.with_inputs(points[:, :5]).points, points[:, :5])
    for options, message in (
        ({"features": features}, r"`feature_names`: expected 2, got \(\)"),
        ({"feature_names": ("red",)}, "`feature_names`: expected none"),
        ({"features": features[:, :9], "feature_names": ("a", "b")}, r"`features`: .* \[6, 10, F\]"),
        ({"features": features / 0, "feature_names": ("a", "b")}, "`features`: expected finite"),
        ({"features": features.long(), "feature_names": ("a", "b")}, "`features`: expected floats"),
        ({"names": ("a",)}, "`names`: expected 6, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PointDataset(points, labels, ("a", "b"), **options)  # type: ignore[arg-type]
