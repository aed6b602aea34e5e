"""Reading of checkpoint files and folders into plain dictionaries of tensors; nothing is ever executed."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from any2point.sources.configuration import read_config, read_json
from any2point.sources.encoder import Activation
from any2point.sources.torchscript import is_torchscript, read_torchscript

# In a folder, the first of these that is there is read; an index lists the files of a checkpoint in parts.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_WRAPPERS = ("state_dict", "model", "model_state_dict", "base_model", "module", "teacher")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or a clear ValueError."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading this file needs safetensors: pip install 'any2point[sources]'") from None
    if not path.is_file():
        raise ValueError(f"`path`: no file {path}")
    try:
        return load_file(str(path))
    except Exception as error:
        raise ValueError(f"`path`: {path} is not a complete safetensors file ({_line(error)})") from None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """The tensors of a checkpoint, the configuration beside them (or {}), and the file they came from.

    Args:
        path: a safetensors or torch file, a TorchScript archive, an index of several files, or a folder that
            holds one of these and, as the hub has it, a `config.json` or `open_clip_config.json`.

    Returns:
        `(tensors, config, file)`; prefixes of data-parallel training are removed.

    Raises:
        ValueError: there is no such file, or it is truncated, foreign or needs code to be executed.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path`: expected a file or folder, got {type(path).__name__}")
    file = _find(Path(path).expanduser())
    config = read_config(file)
    state = _read_parts(file) if file.name.endswith(".index.json") else _read_file(file)
    return _tensors(state, file), config, file


def _read_file(file: Path) -> Any:
    with file.open("rb") as stream:
        head = stream.read(9)
    if len(head) < 9:
        raise ValueError(f"`path`: {file} is empty or truncated")
    if head[8:9] == b"{":
        return read_safetensors(file)
    return read_torchscript(file) if is_torchscript(file) else _read_torch(file)


def _read_parts(index: Path) -> dict[str, Tensor]:
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()) or not parts:
        raise ValueError(f"`path`: expected a weight_map of tensors to files in {index}")
    state: dict[str, Tensor] = {}
    for part in sorted(set(parts.values())):
        file = index.parent / part
        if Path(part).name != part or not file.is_file():
            raise ValueError(f"`path`: {index} lists the file {part}, which is not beside it")
        state |= _tensors(_read_file(file), file)
    missing = sorted(set(parts) - set(state))
    if missing:
        raise ValueError(f"`path`: {index} lists {missing[0]!r}, which {parts[missing[0]]} does not hold")
    return state


def _find(path: Path) -> Path:
    try:
        if path.is_file():
            return path
        folder = path.is_dir()
    except OSError:  # such as a name that is too long
        folder = False
    if not folder:
        raise ValueError(f"`path`: no file or folder {path}")
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    files = sorted(f for f in path.iterdir() if f.suffix in _SUFFIXES and f.is_file())
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise ValueError(f"`path`: expected one checkpoint file in {path}, got {found}")
    return files[0]


def _read_torch(file: Path) -> Any:
    try:
        # Training checkpoints (DINO, MAE) hold their command line: a namespace, which is data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {code[1]}, for which code would have to run" if code else _line(error)
        if reason.startswith("Weights only load failed"):  # and then advice to load it all the same
            reason = "its pickle is damaged or no plain data"
        raise ValueError(f"`path`: cannot read {file} as a checkpoint ({reason})") from None


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    # Some messages are a bare opcode or key.
    return (text[0] if text and len(text[0]) > 9 else f"{type(error).__name__} {''.join(text[:1])}")[:160]


def _tensors(state: Any, file: Path) -> dict[str, Tensor]:
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise ValueError(f"`path`: expected a dictionary of tensors in {file}, got {type(state).__name__}")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"`path`: no tensors in {file}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def find_prefix(keys: Iterable[str], probe: str, *, exclude: str | None = None) -> str | None:
    """What stands before `probe` in the shortest key that ends with it, or None if no key does."""
    found = [key[: -len(probe)] for key in keys if key.endswith(probe)]
    found = [p for p in found if (not p or p.endswith(".")) and not (exclude and exclude in p)]
    return min(found, key=len) if found else None


def count_blocks(keys: Iterable[str], pattern: str) -> int:
    """Number of consecutive i from 0 for which `pattern.format(i)` is a key."""
    names, depth = set(keys), 0
    while pattern.format(depth) in names:
        depth += 1
    return depth


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def read_activation(config: Mapping[str, Any], default: Activation, name: str = "hidden_act") -> Activation:
    """Our name of the activation that a Hugging Face `config.json` tells under `name`."""
    if name not in config:
        return default
    if config[name] not in _ACTIVATIONS:
        known, got = ", ".join(_ACTIVATIONS), repr(config[name])
        raise ValueError(f"`path`: expected {name} in config.json to be one of {known}, got {got}")
    return _ACTIVATIONS[config[name]]


def read_heads(
    config: Mapping[str, Any], heads: int | None, default: int | None, name: str = "num_attention_heads"
) -> int:
    """The number of heads: as given, else what the configuration tells, else the family's convention."""
    heads = config.get(name, default) if heads is None else heads
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        got = "none" if heads is None else repr(heads)
        raise ValueError(f"`heads`: expected a number in heads= or as {name} in config.json, got {got}")
    return heads


class Reader:
    """Takes tensors out of a state dict by name, in float32, and keeps account of what it did not use."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self.state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.state

    def take(self, name: str) -> Tensor:
        """The tensor as float32, contiguous; ValueError if it is missing or not floating point."""
        if name not in self.state:
            raise ValueError(f"`path`: tensor {name!r} is missing: the checkpoint is incomplete or foreign")
        value = self.state[name]
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            got = "no values" if value.is_meta else f"{value.dtype}, {value.layout}"
            raise ValueError(f"`path`: expected dense floating point in tensor {name!r}, got {got}")
        self.used.add(name)
        return value.detach().to(torch.float32).contiguous()

    def rows(self, name: str, width: int) -> Tensor:
        """A table `[n, width]`, n > 0; ValueError if it has another shape."""
        table = self.take(name)
        if table.dim() != 2 or table.shape[1] != width or not len(table):
            got = list(table.shape)
            raise ValueError(f"`path`: expected shape [n, {width}] for tensor {name!r}, got {got}")
        return table

    def pair(self, source: str, target: str) -> dict[str, Tensor]:
        """Weight and bias of a layer under their new name."""
        return {f"{target}.{leaf}": self.take(f"{source}.{leaf}") for leaf in ("weight", "bias")}

    def fused(
        self, sources: Sequence[str], target: str, *, no_bias: Container[str] = ()
    ) -> dict[str, Tensor]:
        """Layers side by side, as query, key and value in one; those in `no_bias` get a bias of zeros."""
        weights = [self.take(f"{source}.weight") for source in sources]
        biases = [
            torch.zeros(len(weight)) if source in no_bias else self.take(f"{source}.bias")
            for source, weight in zip(sources, weights)
        ]
        return {f"{target}.weight": torch.cat(weights), f"{target}.bias": torch.cat(biases)}

    def check_blocks(self, pattern: str, depth: int, ignore: Container[str] = ()) -> None:
        """ValueError if the first blocks hold floating point tensors that were not taken.

        A block with a tensor that the family does not know computes something else. `pattern` is as for
        `count_blocks`, and `ignore` holds names within a block that are known to play no part.
        """
        for name in self.unused():
            for prefix in map(pattern.format, range(depth)):
                rest = name.removeprefix(prefix)
                if rest != name and rest not in ignore and self.state[name].is_floating_point():
                    raise ValueError(f"`path`: blocks of this family have no tensor such as {name!r}")

    def unused(self) -> tuple[str, ...]:
        """Names of the tensors that were not taken."""
        return tuple(sorted(set(self.state) - self.used))
