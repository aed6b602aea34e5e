"""Whether values have the types that the annotations of a dataclass say."""

from __future__ import annotations

import math
import types
import typing
from typing import Any

_NOUNS: dict[Any, str] = {int: "integer", float: "number", bool: "truth value", str: "text"}


def kinds_of(owner: type) -> dict[str, Any]:
    """The annotations of a dataclass by field: scalars, tuples, and unions of these."""
    return typing.get_type_hints(owner)


def fits(value: object, kind: Any) -> bool:
    """Whether a value is of an annotated type; integers are numbers, truth values are neither."""
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(fits(value, part) for part in parts)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        inside = (parts[0],) * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(inside) and all(map(fits, value, inside))
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    return isinstance(value, kind)


def describe(kind: Any, adjective: str = "", many: bool = False) -> str:
    """An annotated type in words, such as "a positive integer or positive integers"."""
    parts = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return " or ".join(describe(part, adjective, many) for part in parts)
    if typing.get_origin(kind) is tuple:
        count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        return count + describe(parts[0], adjective, many=True)
    if kind is types.NoneType:
        return "None"
    words = f"{adjective} {_NOUNS[kind]}".strip()
    return words + "s" if many else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
