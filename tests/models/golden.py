"""Results of the official code, and the weights that it was run with, made again from their names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "golden"
LABELS = torch.tensor([3, 7, 11, 14])
TABLES = {
    "clip-text": ("positional_embedding", (77, 768)),
    "dinov2": ("pos_embed", (1, 1370, 768)),
    "imagebind": ("modality_preprocessors.audio.pos_embedding_helper.pos_embed", (1, 229, 768)),
}


@dataclass(frozen=True)
class Parameter:
    name: str
    shape: tuple[int, ...]
    rule: str
    trained: bool


def load(variant: str, *, hot: bool = False) -> dict[str, np.ndarray]:
    name = variant.replace("/", "_") + ("_hot" if hot else "")
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def text(data: np.ndarray) -> list[str]:
    return data.tobytes().decode().split("\n")


def points(variant: str) -> Tensor:
    """Four clouds of 1024 points on a grid of 1/2048, so that distances are exact."""
    with np.load(FOLDER / "points.npz") as file:
        return torch.from_numpy(file[variant.split("/")[1]].astype(np.float32) / 2048)


def parameters(variant: str) -> list[Parameter]:
    rows = [line.split("|") for line in text(load(variant)["parameters"])]
    return [
        Parameter(name, tuple(int(n) for n in shape.split(",") if n), rule, trained == "1")
        for name, shape, rule, trained in rows
    ]


def fill(name: str, shape: tuple[int, ...], rule: str, *, hot: bool) -> Tensor:
    """Weights that depend on the name alone; the hot ones give large signals and sharp attention."""
    if rule == "zero":
        return torch.zeros(shape, dtype=torch.int64)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    normal = np.random.default_rng(seed).standard_normal(shape)
    if rule in ("bn_weight", "bn_var"):
        values = 1 + 0.1 * np.abs(normal)
    elif rule in ("ln_weight", "gamma"):
        values = 1 + 0.02 * normal
    elif hot and rule == "pos":
        values = 0.5 * normal
    elif hot and len(shape) >= 2:
        values = normal / np.sqrt(np.prod(shape[1:]))
    else:
        values = 0.02 * normal
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def state_dict(variant: str, *, hot: bool = False) -> dict[str, Tensor]:
    return {p.name: fill(p.name, p.shape, p.rule, hot=hot) for p in parameters(variant)}


def position_table(variant: str, *, hot: bool = False) -> Tensor:
    name, shape = TABLES[variant.split("/")[0]]
    return fill(name, shape, "pos", hot=hot)


def assert_near(got: Tensor, want: Any, tolerance: float, what: str) -> None:
    """Largest difference, relative to the largest value."""
    expected = torch.as_tensor(want).double()
    actual = got.detach().double()
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} {tuple(expected.shape)}"
    error = float((actual - expected).abs().max() / expected.abs().max())
    assert error < tolerance, f"{what}: relative error {error:.2e}, allowed {tolerance:.0e}"
