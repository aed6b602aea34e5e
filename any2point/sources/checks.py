"""What makes a `Source` complete and consistent, and what its builders take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from any2point.sources.source import Family, Source

POSITION_KINDS = ("learned", "sinusoidal", "stand-in")


def check_count(name: str, value: object) -> None:
    """ValueError unless the value is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}`: expected a positive integer, got {value!r}")


def check_sizes(width: object, depth: object, heads: object) -> None:
    """ValueError unless these are the sizes of a transformer."""
    for name, value in (("width", width), ("depth", depth), ("heads", heads)):
        check_count(name, value)
    if width % heads:  # type: ignore[operator]
        raise ValueError(f"`heads`: expected a divisor of the width {width}, got {heads}")


def check_positions(positions: object, base: Sequence[int]) -> None:
    """ValueError unless `positions` is a shape with as many sizes as `base`."""
    sizes = list(positions) if isinstance(positions, (tuple, list)) else []
    if len(sizes) != len(base) or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in sizes):
        what = f"{len(base)} positive integer{'s' * (len(base) > 1)}"
        raise ValueError(f"`positions`: expected {what}, got {positions}")


def check_source(source: Source, shapes: Mapping[str, torch.Size]) -> None:
    """ValueError if something of a source is missing or has another shape than it needs.

    Args:
        source: its sizes have been checked.
        shapes: of the tensors of its blocks.
    """
    width, table = source.width, source.position_table
    if table.dim() not in (2, 3) or table.shape[-1] != width or not table.numel():
        got = list(table.shape)
        raise ValueError(f"`position_table`: expected [L, {width}] or [H, W, {width}], got {got}")
    for name in ("cls_token", "cls_position"):
        token = getattr(source, name)
        if token is not None and token.shape != (width,):
            raise ValueError(f"`{name}`: expected [{width}], got {list(token.shape)}")
    registers = source.registers
    if registers is not None and (registers.dim() != 2 or registers.shape[1] != width):
        raise ValueError(f"`registers`: expected [R, {width}], got {list(registers.shape)}")
    if source.position_kind not in POSITION_KINDS:
        known = ", ".join(POSITION_KINDS)
        raise ValueError(f"`position_kind`: expected one of {known}, got {source.position_kind!r}")
    wanted = dict(shapes)
    if "norm.weight" in source.tensors or "norm.bias" in source.tensors:
        wanted |= {"norm.weight": torch.Size([width]), "norm.bias": torch.Size([width])}
    for name, shape in wanted.items():
        if name not in source.tensors:
            raise ValueError(f"`tensors`: expected a tensor {name!r}, got none")
        if source.tensors[name].shape != shape:
            got = list(source.tensors[name].shape)
            raise ValueError(f"`tensors`: expected shape {list(shape)} for {name!r}, got {got}")


def convert(entry: Family, state: Mapping[str, Tensor], config: Mapping[str, Any], **options: Any) -> Source:
    """What a family makes of a checkpoint, or a ValueError.

    Args:
        entry: the family.
        state: tensors of the checkpoint.
        config: the configuration beside them.
        options: as for `Family.convert`; `origin` names the file.
    """
    for name in ("depth", "heads"):
        if options.get(name) is not None:
            check_count(name, options[name])
    try:
        return entry.convert(state, config, **options)
    except (RuntimeError, IndexError, TypeError) as error:
        # Tensors of the right names and of shapes that cannot be put together.
        reason = str(error).splitlines()[0]
        file = options["origin"]["path"]
        raise ValueError(f"`path`: the tensors of {file} do not fit a {entry.name} ({reason})") from error
