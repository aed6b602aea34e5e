"""Argument checks shared by the public ops; each error names the argument, what was expected, what came."""

from __future__ import annotations

from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

_LOW = (torch.float16, torch.bfloat16)
_COORDINATES = (torch.float32, torch.float64, *_LOW)


def shape_text(tensor: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in tensor.shape) + "]"


def check_tensor(name: str, value: object, *, dims: int | tuple[int, ...], layout: str) -> Tensor:
    """A tensor with one of the numbers of dimensions `dims`, drawn as `layout` in the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor {layout}, got {type(value).__name__}")
    allowed = (dims,) if isinstance(dims, int) else dims
    if value.dim() not in allowed:
        raise ValueError(f"{name}: expected shape {layout}, got {shape_text(value)}")
    return value


def check_int(name: str, value: object, *, at_least: int) -> int:
    """An int, NumPy's too (bool and float are refused: they are mistakes, not counts)."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        value = int(value)
    if value < at_least:
        raise ValueError(f"{name}: expected at least {at_least}, got {value}")
    return value  # type: ignore[return-value]


def check_float(name: str, value: object) -> float:
    """A finite or infinite number more than 0, NumPy's too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        value = float(value)
    if not value > 0:
        raise ValueError(f"{name}: expected more than 0, got {value}")
    return float(value)


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in _COORDINATES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")


def check_like(name: str, value: Tensor, like_name: str, like: Tensor, *, dtype: bool = True) -> None:
    """Same device, and same dtype unless told otherwise."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like `{like_name}`, got {value.device}")
    if dtype and value.dtype != like.dtype:
        raise TypeError(f"{name}: expected {like.dtype} like `{like_name}`, got {value.dtype}")


def check_index(name: str, value: object, *, like: Tensor, like_name: str) -> Tensor:
    """An int64 or int32 tensor on the device of `like`; returned as int64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 (or int32), got {value.dtype}")
    check_like(name, value, like_name, like, dtype=False)
    return value.long()


class Clouds(NamedTuple):
    """Coordinates ready for a kernel: float32 or float64, with int64 lengths or offsets."""

    points: Tensor  # [B, N, D] or [P, D]
    lengths: Tensor | None  # [B]
    offsets: Tensor | None  # [B + 1]

    @property
    def batch(self) -> int:
        return self.points.shape[0] if self.offsets is None else self.offsets.shape[0] - 1


def check_clouds(
    points: object,
    lengths: object = None,
    offsets: object = None,
    *,
    name: str = "points",
    prefix: str = "",
) -> Clouds:
    """Padded ``[B, N, D]`` with optional lengths, or packed ``[P, D]`` with offsets.

    float16 and bfloat16 are raised to float32, which is exact. On the CPU the values of lengths and offsets
    are checked too; on CUDA that would be a synchronisation, so kernels clamp them instead.
    """
    if lengths is not None and offsets is not None:
        raise ValueError(f"{prefix}lengths: expected lengths (padded) or offsets (packed), got both")
    if offsets is None:
        tensor = check_tensor(name, points, dims=3, layout="[B, N, D] (or [P, D] with offsets)")
    else:
        tensor = check_tensor(name, points, dims=2, layout="[P, D], as offsets are given")
    check_floating(name, tensor)
    if tensor.dtype in _LOW:
        tensor = tensor.float()
    if lengths is not None:
        lengths = check_index(f"{prefix}lengths", lengths, like=tensor, like_name=name)
        if lengths.dim() != 1 or lengths.shape[0] != tensor.shape[0]:
            raise ValueError(
                f"{prefix}lengths: expected shape [B] = [{tensor.shape[0]}], got {shape_text(lengths)}"
            )
        if (
            readable(lengths)
            and len(lengths)
            and not 0 <= int(lengths.min()) <= int(lengths.max()) <= tensor.shape[1]
        ):
            raise ValueError(
                f"{prefix}lengths: expected values in 0..N = {tensor.shape[1]}, got {lengths.tolist()[:8]}"
            )
    if offsets is not None:
        offsets = check_index(f"{prefix}offsets", offsets, like=tensor, like_name=name)
        if offsets.dim() != 1 or offsets.shape[0] < 1:
            raise ValueError(f"{prefix}offsets: expected shape [B + 1], got {shape_text(offsets)}")
        if readable(offsets):
            ends = int(offsets[0]), int(offsets[-1])
            if ends != (0, tensor.shape[0]) or bool((offsets.diff() < 0).any()):
                raise ValueError(
                    f"{prefix}offsets: expected 0, ..., P = {tensor.shape[0]}, never falling, "
                    f"got {offsets.tolist()[:8]}"
                )
    return Clouds(tensor, lengths, offsets)


def readable(tensor: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, outside of tracing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def exporting() -> bool:
    """Whether `torch.export` runs the code; its graphs are for any device and hold the composition.

    Not `torch.compiler.is_exporting()`, which up to torch 2.12 is true under `torch.compile`, too.
    """
    return torch.compiler._is_exporting_flag
