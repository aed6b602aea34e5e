"""Results of the official code, and the weights that it was run with, made again from their names.

`tests/golden` holds a part of the complete dumps, which take 37 MB; `scripts/make_golden.py` cuts it out and
`scripts/check_golden.py` compares with the complete ones. Both name what they hold alike: `tokens_c8` is
every 8th channel of `tokens`, `_s0` the first cloud, `_full01` the first two with all channels.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "golden"
LABELS = torch.tensor([3, 7, 11, 14])
# The official code's folders.
FOLDERS = {
    "clip-text/scanobjectnn": "Any2Point_CLIP_Lang",
    "dinov2/scanobjectnn": "Any2Point_DINOV2_Vision",
    "imagebind/scanobjectnn": "Any2Point_ImageBind_audio",
    "clip-text/modelnet40": "Any2Point_clip_lang_modelnet",
    "dinov2/modelnet40": "Any2Point_DINOV2_modelnet",
    "imagebind/modelnet40": "Any2Point_ImageBind_Modelnet",
}
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


@dataclass(frozen=True)
class Dump:
    """What the official code gave.

    `values` by key; of `gradients` the norm, and every `step`-th and of these every `substep`-th value.
    """

    values: dict[str, np.ndarray]
    gradient_norms: dict[str, float]
    gradients: dict[str, tuple[np.ndarray, int, int]]
    buffer_norms: dict[str, float]


def load(variant: str, *, hot: bool = False) -> Dump:
    """A shipped dump, whose gradients are packed into four arrays."""
    name = variant.replace("/", "_") + ("_hot" if hot else "")
    with np.load(FOLDER / f"{name}.npz") as file:
        values = dict(file)
    values.pop("parameters", None)
    # The names are those of the plain dump, also for the hot one.
    with np.load(FOLDER / f"{variant.replace('/', '_')}.npz") as file:
        names, buffers = _lines(file["grad_names"]), _lines(file["buf_names_after"])
    values.pop("grad_names", None)
    values.pop("buf_names_after", None)
    norms = dict(zip(names, values.pop("grad_norms").tolist()))
    buffer_norms = dict(zip(buffers, values.pop("buf_norms_after").tolist()))
    gradients, offset = {}, 0
    packed = values.pop("gradient_values", np.zeros(0))
    for name, (step, substep, size) in zip(names, values.pop("gradient_steps", np.zeros((0, 3))).tolist()):
        gradients[name] = (packed[offset : offset + size], step, substep)
        offset += size
    return Dump(values, norms, gradients, buffer_norms)


def load_complete(folder: Path, variant: str, *, hot: bool = False) -> Dump:
    """A complete dump of the official code."""
    with np.load(folder / f"{FOLDERS[variant]}{'_hot' if hot else ''}.npz") as file:
        values = dict(file)
    norms = dict(zip(values.pop("grad_names").tolist(), values.pop("grad_norms").tolist()))
    buffers = dict(zip(values.pop("buf_names_after").tolist(), values.pop("buf_norms_after").tolist()))
    sizes = {p.name: int(np.prod(p.shape, dtype=np.int64)) for p in parameters(variant)}
    gradients = {}
    for key in [key for key in values if key.startswith(("grad/", "gradsub/"))]:
        kind, name = key.split("/", 1)
        step = 1 if kind == "grad" else max(1, sizes[name] // 256)
        gradients[name] = (values.pop(key).reshape(-1), step, 1)
    return Dump(values, norms, gradients, buffers)


def _lines(data: np.ndarray) -> list[str]:
    return data.tobytes().decode().split("\n")


def points(variant: str) -> Tensor:
    """Four clouds of 1024 points on a grid of 1/2048, so that distances are exact."""
    with np.load(FOLDER / "points.npz") as file:
        return torch.from_numpy(file[variant.split("/")[1]].astype(np.float32) / 2048)


@functools.cache
def parameters(variant: str) -> tuple[Parameter, ...]:
    with np.load(FOLDER / f"{variant.replace('/', '_')}.npz") as file:
        rows = [line.split("|") for line in _lines(file["parameters"])]
    return tuple(
        Parameter(name, tuple(int(n) for n in shape.split(",") if n), rule, trained == "1")
        for name, shape, rule, trained in rows
    )


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


# 768 channels become 48, with everything that depends on them; two blocks are left.
SHRINK = {3072: 192, 2304: 144, 1536: 96, 768: 48, 384: 24, 192: 12, 96: 6}


def small_state(variant: str) -> dict[str, Tensor]:
    """A whole model of the official code with its names, but of two narrow blocks."""
    state = {}
    for parameter in parameters(variant):
        parts = parameter.name.split(".")
        block = next((int(b) for a, b in pairwise(parts) if a in ("blocks", "resblocks")), 0)
        if block < 2:
            shape = tuple(SHRINK.get(n, n) for n in parameter.shape)
            state[parameter.name] = fill(parameter.name, shape, parameter.rule, hot=True)
    return state


def small_table(variant: str) -> Tensor:
    """Its position table, as the pretraining checkpoint has it."""
    name, shape = TABLES[variant.split("/")[0]]
    return fill(name, (*shape[:-1], SHRINK[shape[-1]]), "pos", hot=True)


def relative_error(got: Tensor, want: Any) -> float:
    """Largest difference, relative to the largest value; infinite for other shapes."""
    expected = torch.as_tensor(want).double()
    if got.shape != expected.shape:
        return float("inf")
    return float((got.detach().double() - expected).abs().max() / expected.abs().max())
