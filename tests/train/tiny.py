"""A model and a data set so small that training takes a second."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from any2point import Any2Point, Any2PointConfig, Source
from any2point.data import PointDataset
from any2point.train import TrainConfig

CLASSES = ("ball", "box", "stick")


def dataset(count: int = 24, seed: int = 0) -> PointDataset:
    """Balls, boxes and sticks of 96 points."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 96, 3, generator=generator)
    labels = torch.arange(count) % 3
    ball = points / points.norm(dim=-1, keepdim=True)
    box = points / points.abs().amax(dim=-1, keepdim=True)
    stick = points * torch.tensor([0.05, 1.0, 0.05])
    shapes = torch.stack([ball, box, stick])
    return PointDataset(shapes[labels, torch.arange(count)], labels, CLASSES)


def model(seed: int = 0, **options: Any) -> Any2Point:
    """A few thousand parameters."""
    torch.manual_seed(seed)
    source = Source.random("bert", width=48, depth=2, heads=4, positions=(16,))
    defaults: dict[str, Any] = {"num_classes": 3, "num_points": 64, "num_tokens": 8, "neighbors": 4}
    defaults |= {"views": 2, "adapter_dim": 4, "head_width": 16}
    return Any2Point(Any2PointConfig(**{**defaults, **options}), source)


class Moments(nn.Module):
    """A linear layer on deviation and extent: neither dropout nor batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        """`points [B, N, 3]` -> logits `[B, 3]`."""
        return self.layer(torch.cat([points.std(dim=1), points.abs().amax(dim=1)], dim=1))


def config(**options: Any) -> TrainConfig:
    """Six epochs of three steps, in fp32."""
    defaults: dict[str, Any] = {"epochs": 6, "batch_size": 8, "warmup_epochs": 1, "pool": 80, "lr": 5e-3}
    defaults |= {"precision": "fp32", "device": "cpu", "yaw": 20.0, "jitter": 0.01, "tensorboard": False}
    return TrainConfig(**{**defaults, **options})
