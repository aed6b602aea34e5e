"""Pickles of NumPy arrays, read without running anything: the form of ModelNet40's widespread caches.

A pickle is a program. This reader knows the few instructions that build lists, tuples, dicts, numbers, text
and plain numeric arrays, makes the arrays itself from their bytes, and refuses every other instruction before
it runs.
"""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any

import numpy as np


class _Type:
    """A NumPy dtype: numbers only."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        self.code, self.big = str(code), False
        if not (self.code[:1] in "fiub" and self.code[1:].isdigit()):
            raise pickle.UnpicklingError(f"expected arrays of numbers, got dtype {code!r}")

    def __setstate__(self, state: tuple) -> None:
        self.big = str(state[1]) == ">"

    def dtype(self) -> np.dtype:
        return np.dtype((">" if self.big else "<") + self.code)


class _Array:
    """An array, of which only its state says what is in it."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, by_columns, data = state
        self.value = _array(data, kind, shape, bool(by_columns))


def _array(data: Any, kind: Any, shape: Any, by_columns: bool) -> np.ndarray:
    if not isinstance(kind, _Type) or not isinstance(shape, tuple) or isinstance(data, list):
        raise pickle.UnpicklingError("expected arrays of numbers, got one of objects")
    content = _bytes(data)
    size = math.prod(shape) * kind.dtype().itemsize
    if size != len(content):
        raise pickle.UnpicklingError(f"expected {size} bytes for an array {shape}, got {len(content)}")
    return np.frombuffer(content, kind.dtype()).reshape(shape, order="F" if by_columns else "C")


def _bytes(data: Any) -> bytes:
    if isinstance(data, str):  # as Python 2 wrote bytes
        return data.encode("latin1")
    if not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError(f"expected the bytes of an array, got {type(data).__name__}")
    return bytes(data)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.value = _array(data, kind, shape, order == "F")
    return array


def _scalar(kind: Any, data: Any) -> float | int:
    return _array(data, kind, (), False).item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"expected bytes written as latin1, got {encoding!r}")
    return text.encode("latin1")


class _Call:
    """A function that a pickle may call and not change: a pickle can set the attributes of what it names."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(
            "expected lists and arrays of numbers alone, got the state of a function"
        )


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _Call(_encode),
}
for _core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    _KNOWN[f"{_core}.multiarray", "_reconstruct"] = _Call(_reconstruct)
    _KNOWN[f"{_core}.multiarray", "scalar"] = _Call(_scalar)
    _KNOWN[f"{_core}.numeric", "_frombuffer"] = _Call(_from_buffer)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"expected lists and arrays of numbers alone, got {module}.{name}")
        return _KNOWN[module, name]


def _check_sizes(file: IO[bytes]) -> None:
    """Refuse sizes that are more than the file can mean: believed, they would fill the memory."""
    size = file.seek(0, 2)
    file.seek(0)
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        most = count if operation.name in _MEMO else size
        if operation.name in (*_MEMO, "FRAME") and int(argument or 0) > most:
            raise pickle.UnpicklingError(f"expected sizes that fit the file, got {argument}")
    file.seek(0)


_MEMO = ("PUT", "BINPUT", "LONG_BINPUT")


def load_arrays(file: IO[bytes]) -> Any:
    """Read one pickle.

    Args:
        file: open for reading, at its beginning.

    Returns:
        Lists, tuples, dicts, numbers, text and NumPy arrays as they were pickled; arrays may be read-only.

    Raises:
        ValueError: the pickle holds anything else (which is not run), is damaged, or is none.
    """
    try:
        _check_sizes(file)
        return _plain(_Unpickler(file, encoding="latin1").load(), {})
    except Exception as error:  # a damaged pickle fails in every way there is
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"expected a pickle of lists of arrays: {reason}") from None


def _plain(value: Any, seen: dict[int, Any]) -> Any:
    """Arrays in place of what stands for them; what a pickle names twice is one object in both places."""
    if id(value) not in seen:
        seen[id(value)] = _converted(value, seen)
    return seen[id(value)]


def _converted(value: Any, seen: dict[int, Any]) -> Any:
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, seen) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item, seen) for key, item in value.items()}
    if isinstance(value, (int, float, str, bytes, bool, type(None))):
        return value
    raise ValueError(f"expected lists and arrays of numbers, got {type(value).__name__}")
