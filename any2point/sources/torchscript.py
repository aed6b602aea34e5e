"""Weights of TorchScript archives (OpenAI publishes CLIP as such), read as data: no code of theirs is run.

An archive is a zip file: `data.pkl` is the pickled tree of modules, `data/<key>` holds one storage each, and
`code/` the programs, which are not looked at. The pickle is not given to Python's unpickler: the few opcodes
that TorchScript writes are interpreted here. Names of classes stay names, and the functions that it may call
are the ones of `_Parser._call`; everything else is refused. Sizes are checked against the file before
anything is allocated.
"""

from __future__ import annotations

import math
import pickletools
import sys
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# More attributes or longer names than these are a trap (modules that contain one another), not a model.
_MAX_ATTRIBUTES, _MAX_NAME = 100_000, 1000
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LISTS = tuple(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor"))


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names; only the name, never the object."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class _Module:
    """A module of the archive: its attributes."""

    attributes: dict[str, Any] = field(default_factory=dict)


def is_torchscript(file: Path) -> bool:
    """Whether a file is a TorchScript archive rather than what `torch.save` writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError):  # also versions of zip to come
        return False


def read_torchscript(file: Path) -> dict[str, Tensor]:
    """All tensors of a TorchScript archive by their attribute names, as `state_dict()` would name them.

    Args:
        file: written by `torch.jit.save`.

    Returns:
        Parameters, buffers and other tensor attributes, in the types they have in the file.

    Raises:
        ValueError: the archive is truncated or contradictory, or its pickle asks for more than tensors.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _flatten(_Parser(archive, file.stat().st_size).parse())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"`path`: cannot read {file} as a TorchScript archive ({reason})") from None


def _flatten(root: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    pending, visited = [("", root)], 0
    while pending:
        name, value = pending.pop()
        visited += 1
        if visited > _MAX_ATTRIBUTES or len(name) > _MAX_NAME:
            raise ValueError("its modules contain one another")
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, _Module):
            prefix = f"{name}." if name else ""
            pending += [(prefix + key, item) for key, item in reversed(value.attributes.items())]
    return tensors


class _Parser:
    """Interpreter of the pickle opcodes that TorchScript writes."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        found = [n for n in archive.namelist() if n.count("/") == 1 and n.endswith("/data.pkl")]
        if len(found) != 1:
            raise ValueError(f"expected one data.pkl, got {len(found)}")
        self.archive = archive
        self.root = found[0].removesuffix("data.pkl")
        self.left = size  # the bytes of all records together cannot be more than those of the file
        self.storages: dict[str, Tensor] = {}
        if f"{self.root}byteorder" in archive.namelist():
            order = self._record("byteorder").decode()
            if order != sys.byteorder:
                raise ValueError(f"expected the byte order {sys.byteorder}, got {order}")

    def parse(self) -> Any:
        """The object that `data.pkl` describes."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}

        def since_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(bytes(self._record("data.pkl"))):
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    marks.append(len(stack))
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                    stack.append(argument)
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    count = int(opcode.name[-1])
                    stack[-count:] = [tuple(stack[-count:])]
                case "APPEND" | "APPENDS":
                    items = since_mark() if opcode.name == "APPENDS" else [stack.pop()]
                    _expect(stack[-1], list).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_Name(*argument.split(" ", 1)))
                case "BINPERSID":
                    stack.append(self._storage(*stack.pop()))
                case "NEWOBJ":
                    arguments, name = stack.pop(), stack.pop()
                    stack.append(_new(name, arguments))
                case "REDUCE":
                    arguments, name = stack.pop(), stack.pop()
                    stack.append(self._call(name, *arguments))
                case "BUILD":
                    state, module = stack.pop(), stack[-1]
                    # A state that is no dictionary is for the module's own code to unpack: no plain tensors.
                    _expect(module, _Module).attributes = state if isinstance(state, dict) else {}
                case _:
                    raise ValueError(f"refused: its pickle uses {opcode.name}, which TorchScript never does")
        raise ValueError("its pickle does not end")

    def _call(self, name: Any, *arguments: Any) -> Any:
        """What a call of the named function would give, for the few functions that weights need."""
        match str(_expect(name, _Name)):
            case "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2":
                return _tensor(*arguments[:4])
            case "torch._utils._rebuild_parameter" | "torch.jit._pickle.restore_type_tag":
                return arguments[0]
            case "collections.OrderedDict" if not arguments:
                return {}
            case "torch.device":
                return None
            case known if known in _LISTS:
                return _expect(arguments[0], list)
            case known if name.module.split(".")[0] == "__torch__":  # an enumeration
                return known
        raise ValueError(f"refused: its pickle calls {name}, which could run code")

    def _storage(self, kind: str, storage: _Name, key: str, location: str, numel: int) -> Tensor:
        if kind != "storage" or storage.module != "torch" or storage.name not in _DTYPES:
            raise ValueError(f"refused: its pickle refers to a {kind} of {storage}")
        dtype = _DTYPES[storage.name]
        if key not in self.storages:
            data = self._record(f"data/{key}")
            if len(data) != numel * dtype.itemsize:
                raise ValueError(f"expected {numel} x {dtype} in data/{key}, got {len(data)} bytes")
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else empty
        values = self.storages[key]
        if values.dtype != dtype or values.numel() != numel:
            raise ValueError(f"data/{key} is referred to as {numel} x {dtype} and as other things")
        return values

    def _record(self, name: str) -> bytearray:
        info = self.archive.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"expected {name} to be stored as it is, got a compressed record")
        self.left -= info.file_size
        if self.left < 0:
            raise ValueError(f"{name} claims more bytes than the file has")
        with self.archive.open(info) as stream:
            data = bytearray(stream.read())
        if len(data) != info.file_size:
            raise ValueError(f"{name} is truncated")
        return data


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__.strip('_')} in its pickle, got {type(value).__name__}")
    return value


def _new(name: Any, arguments: Any) -> _Module:
    if _expect(name, _Name).module.split(".")[0] != "__torch__" or arguments != ():
        raise ValueError(f"refused: its pickle makes a {name}, which could run code")
    return _Module()


def _tensor(values: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if len(size) != len(stride) or min((offset, *size, *stride)) < 0:
        raise ValueError(f"a tensor of size {size} has the strides {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    count = math.prod(size)
    if count and (last >= values.numel() or count > values.numel()):
        raise ValueError(f"a tensor of size {size} exceeds its {values.numel()} stored values")
    return values.as_strided(size, stride, offset)
