"""The training configuration: every number that the result of a run depends on, apart from model and data."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from any2point.data import transforms


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are those of the paper's code, apart from `select`.

    Attributes:
        epochs: passes over the training set.
        batch_size: clouds per step, over all processes together, of which it is a multiple; the random rest
            of an epoch that does not fill a batch is left out.
        lr: highest learning rate (AdamW).
        min_lr: where the cosine ends, and where the warm-up starts.
        warmup_epochs: epochs of linear warm-up.
        hold_epochs: epochs at the rate of the first one before all that begins; they count in `epochs`.
        schedule: change the rate once per "epoch" or at every "step".
        weight_decay: as the model's parameter groups apply it.
        clip_norm: largest norm of the gradient; 0 for no limit.
        label_smoothing: share of the target spread over all classes.
        select: which weights are the result: of the "last" epoch, of the best epoch on a "validation" set
            that is held out of the training set, or of the best epoch on the "test" set, as the paper's code
            does and as no honest estimate can.
        validation_fraction: share of every class held out when `select` is "validation".
        eval_every: epochs between evaluations; the last epoch is always followed by one.
        eval_batch_size: clouds per batch there.
        save_every: epochs between saved states to resume from.
        save_every_steps: steps between such states within an epoch; 0 for none, so that a run that is broken
            off repeats its last epoch.
        seed: of everything random.
        deterministic: refuse operations whose result depends on timing, where PyTorch knows of them.
        precision: "fp32", "bf16", "fp16", "tf32" (fp32 whose products on a GPU round their operands to 10
            bits; in local aggregation on sm_90 by way of float16, within 65504), or "auto": bf16 where the
            hardware multiplies it, fp32 elsewhere.
        device: "cpu", "cuda", "cuda:1", ..., or "auto": the first GPU if there is one.
        devices: GPUs (on a CPU: processes) of this machine that share every batch; 0 for all GPUs. Under
            torchrun its number of processes counts.
        sync_batch_norm: several processes normalise by the statistics of the whole batch, as one process
            would, at the price of many small exchanges (for the package's own models); otherwise each by its
            own clouds', of which the first's running ones are kept.
        cuda_graph: on CUDA, record the step once and replay it: the launches of its many small kernels cost
            several times what the kernels do. Takes a model that never waits for the device.
        prefetch: on CUDA, prepare the next batch, its samples and neighbours too, while a step runs.
        tensorboard: write the curves as TensorBoard events too, into the run folder.
        normalize: "sphere" (centre and scale to radius 1), "center" or "none"; for training and evaluation.
        pool: farthest points to draw a training cloud's random points from (all of a smaller cloud's); 0
            draws from all of them.
        pool_start: the pool begins with the "first" point of a cloud, or with a "random" one in every epoch.
        subset: the random points are drawn "per_cloud", or are the same rows of every pool of a batch,
            "shared".
        fps: "lowest" (every point counts, ties go to the lowest index) or "pointnet2" (points near the
            origin are left out, ties as its kernel has them), for the farthest points of training and
            evaluation.
        augment: change the "drawn" points, after normalising and drawing, or the "whole" cloud before
            drawing: it is then scaled and mirrored, normalised, turned, shifted and jittered.
        eval_points: choose the farthest points of evaluation from the "normalized" cloud, or from the "raw"
            one, and then normalise by the chosen ones alone.
        scale: per-axis factors are drawn from between these two.
        mirror: chance of mirroring a cloud along each horizontal axis.
        shift: clouds are moved along each axis by up to this.
        yaw: clouds are turned about `up` by up to this many degrees either way.
        up: 0, 1 or 2, the upright axis.
        jitter: standard deviation of the noise on every point.
    """

    epochs: int = 300
    batch_size: int = 32
    lr: float = 5e-4
    min_lr: float = 1e-6
    warmup_epochs: float = 10
    hold_epochs: int = 0
    schedule: str = "epoch"
    weight_decay: float = 0.05
    clip_norm: float = 10.0
    label_smoothing: float = 0.0
    select: str = "last"
    validation_fraction: float = 0.2
    eval_every: int = 1
    eval_batch_size: int = 64
    save_every: int = 1
    save_every_steps: int = 0
    seed: int = 0
    deterministic: bool = True
    precision: str = "auto"
    device: str = "auto"
    devices: int = 1
    sync_batch_norm: bool = False
    cuda_graph: bool = True
    prefetch: bool = True
    tensorboard: bool = True
    normalize: str = "sphere"
    pool: int = 1200
    pool_start: str = "first"
    subset: str = "per_cloud"
    fps: Literal["lowest", "pointnet2"] = "lowest"
    augment: str = "drawn"
    eval_points: str = "normalized"
    scale: tuple[float, float] = (2 / 3, 3 / 2)
    mirror: float = 0.0
    shift: float = 0.2
    yaw: float = 0.0
    up: int = 1
    jitter: float = 0.0

    def __post_init__(self) -> None:
        self._expect("scale", _is_range, "two numbers above 0, the smaller first")
        object.__setattr__(self, "scale", tuple(self.scale))
        for name in ("epochs", "batch_size", "eval_every", "eval_batch_size", "save_every"):
            self._expect(name, lambda v: is_whole(v) and v >= 1, "a whole number of 1 or more")
        for name in ("devices", "save_every_steps", "pool"):
            self._expect(name, lambda v: is_whole(v) and v >= 0, "a whole number of 0 or more")
        for name in ("deterministic", "sync_batch_norm", "cuda_graph", "prefetch", "tensorboard"):
            self._expect(name, lambda v: isinstance(v, bool), "true or false")
        for name in (
            "min_lr",
            "warmup_epochs",
            "weight_decay",
            "clip_norm",
            "shift",
            "yaw",
            "jitter",
        ):
            self._expect(name, lambda v: is_number(v) and v >= 0, "a number of 0 or more")
        self._expect(
            "hold_epochs",
            lambda v: isinstance(v, int) and 0 <= v < self.epochs,
            "less than `epochs`, 0 or more",
        )
        self._expect("seed", lambda v: is_whole(v) and v >= 0, "a whole number of 0 or more")
        self._expect("lr", lambda v: is_number(v) and v > 0, "a number above 0")
        self._expect("label_smoothing", lambda v: is_number(v) and 0 <= v < 1, "a number from 0 to below 1")
        self._expect("validation_fraction", lambda v: is_number(v) and 0 < v < 1, "a number between 0 and 1")
        self._expect("mirror", lambda v: is_number(v) and 0 <= v <= 1, "a number from 0 to 1")
        for name, choices in {
            "schedule": ("epoch", "step"),
            "select": ("last", "validation", "test"),
            "precision": ("auto", "fp32", "tf32", "bf16", "fp16"),
            "normalize": ("sphere", "center", "none"),
            "pool_start": ("first", "random"),
            "subset": ("per_cloud", "shared"),
            "fps": ("lowest", "pointnet2"),
            "augment": ("drawn", "whole"),
            "eval_points": ("normalized", "raw"),
            "up": (0, 1, 2),
        }.items():
            self._expect(name, lambda v, choices=choices: v in choices, f"one of {choices}")

    def _expect(self, name: str, holds: Any, what: str) -> None:
        value = getattr(self, name)
        if not holds(value):
            raise ValueError(f"`{name}`: expected {what}, got {value!r}")

    def seed_of(self, *purpose: object) -> int:
        """A seed for one purpose alone, which follows from `seed`."""
        digest = hashlib.sha256(" ".join(map(str, (self.seed, *purpose))).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def learning_rate(self, progress: float) -> float:
        """The rate after `progress` epochs (a fraction within an epoch counts if `schedule` is "step").

        Linear from `min_lr` to `lr` over the warm-up, then half a cosine over all epochs down to `min_lr`;
        all of that after `hold_epochs`.
        """
        at = progress if self.schedule == "step" else math.floor(progress)
        at, epochs = max(0, at - self.hold_epochs), self.epochs - self.hold_epochs
        if at < self.warmup_epochs:
            return self.min_lr + (self.lr - self.min_lr) * at / self.warmup_epochs
        return self.min_lr + (self.lr - self.min_lr) * (1 + math.cos(math.pi * at / epochs)) / 2

    def eval_transform(self, num_points: int) -> transforms.Compose:
        """Normalise, then the farthest `num_points` points, or the other way round: nothing random."""
        farthest = transforms.FarthestPointSubset(num_points, tie=self.fps)
        if self.eval_points == "raw":
            return transforms.Compose((farthest, *self._normalize()))
        return transforms.Compose((*self._normalize(), farthest))

    def train_transform(self, num_points: int, feature_names: Sequence[str] = ()) -> transforms.Compose:
        """Normalise, draw `num_points` points, scale, mirror, turn, shift and jitter, as configured.

        Args:
            num_points: per cloud, of the result.
            feature_names: those of the data set, so that normals turn with their cloud.

        Returns:
            The transform; its `split()` parts what is the same in every epoch from what is random.
        """
        normals = 3 + list(feature_names).index("nx") if "nx" in feature_names else None
        drawn: list[transforms.Transform] = [transforms.RandomSubset(num_points, self.subset == "shared")]
        if self.pool > num_points:
            pool = transforms.FarthestPointSubset(self.pool, self.pool_start, self.fps, at_most=True)
            drawn.insert(0, pool)
        stretch: list[transforms.Transform] = []
        if self.scale != (1, 1):
            stretch.append(transforms.RandomScale(*self.scale, normals=normals))
        if self.mirror:
            horizontal = tuple(axis for axis in range(3) if axis != self.up)
            stretch.append(transforms.RandomMirror(self.mirror, horizontal, normals))
        move: list[transforms.Transform] = []
        if self.yaw:
            move.append(transforms.RandomYaw(math.radians(self.yaw), self.up, normals))
        if self.shift:
            move.append(transforms.RandomShift(self.shift))
        if self.jitter:
            move.append(transforms.Jitter(self.jitter, 5 * self.jitter))
        if self.augment == "whole":
            return transforms.Compose((*stretch, *self._normalize(), *move, *drawn))
        return transforms.Compose((*self._normalize(), *drawn, *stretch, *move))

    @classmethod
    def official(cls, dataset: str, **changes: Any) -> TrainConfig:
        """The rules of the paper's code for "scanobjectnn" or "modelnet40".

        Args:
            dataset: one of the two, which it prepares and augments differently.
            changes: options to set otherwise.
        """
        if dataset not in _OFFICIAL:
            raise ValueError(f"`dataset`: expected one of {', '.join(_OFFICIAL)}, got {dataset!r}")
        return cls(**{**_OFFICIAL[dataset], **changes})

    def vote_transform(self, num_points: int, feature_names: Sequence[str] = ()) -> transforms.Compose:
        """One pass of a vote: as for training, scaled but not mirrored, turned, shifted or jittered.

        Every cloud has its own random points, of a pool that begins anywhere.
        """
        drawn = dataclasses.replace(
            self, pool_start="random", subset="per_cloud", mirror=0.0, yaw=0.0, shift=0.0, jitter=0.0
        )
        return drawn.train_transform(num_points, feature_names)

    def _normalize(self) -> tuple[transforms.Transform, ...]:
        if self.normalize == "none":
            return ()
        return (transforms.UnitSphere() if self.normalize == "sphere" else transforms.Center(),)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML and JSON."""
        return dataclasses.asdict(self) | {"scale": list(self.scale)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`; what is not given keeps its default, unknown names are an error."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"`train`: expected options out of {', '.join(known)}; got {', '.join(unknown)}")
        return cls(**values)


# The official code chooses the best epoch on the test set, and begins ModelNet40 with two epochs at the least
# rate. Its farthest point kernels differ: the one for ScanObjectNN counts every point, the one for ModelNet40
# leaves out those near the origin.
_OFFICIAL: dict[str, dict[str, Any]] = {
    "scanobjectnn": {
        "select": "test",
        "precision": "fp32",
        "normalize": "center",
        "pool_start": "random",
        "subset": "shared",
        "augment": "whole",
        "eval_points": "raw",
        "scale": (0.9, 1.1),
        "shift": 0.0,
        "yaw": 180.0,
    },
    "modelnet40": {
        "epochs": 301,
        "hold_epochs": 1,
        "select": "test",
        "precision": "fp32",
        "normalize": "sphere",
        "pool_start": "random",
        "subset": "shared",
        "fps": "pointnet2",
        "scale": (2 / 3, 3 / 2),
        "shift": 0.2,
    },
}


def is_whole(value: object) -> bool:
    """Whether a value is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and not true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_range(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(map(is_number, value))
        and 0 < value[0] <= value[1]
    )
