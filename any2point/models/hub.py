"""Saving and loading in the hub layout: `config.json` beside `model.safetensors`."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from any2point._version import __version__
from any2point.models.config import Any2PointConfig
from any2point.sources import Layout, Source
from any2point.sources.checkpoint import read_safetensors
from any2point.sources.configuration import read_json

if TYPE_CHECKING:
    from any2point.models.any2point import Any2Point

CONFIG, WEIGHTS, SOURCE = "config.json", "model.safetensors", "source.safetensors"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete or as it was before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        # A full disk does not say of which file.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def serializer() -> Any:
    """The function of safetensors that models are saved with; ImportError says how to get it."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ImportError("saving a model needs safetensors: pip install 'any2point[sources]'") from None
    return save


def _serialize(tensors: dict[str, Tensor]) -> bytes:
    return serializer()({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, {"format": "pt"})


def save(model: Any2Point, directory: Path, *, include_source: bool) -> None:
    """See `Any2Point.save_pretrained`."""
    frozen = model.frozen_names
    trained = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    description: dict[str, Any] = {
        "model_type": "any2point",
        "any2point_version": __version__,
        "config": model.config.to_dict(),
        "class_names": model.class_names,
        "source": model.source_info.describe(),
        "source_included": include_source,
    }
    directory.mkdir(parents=True, exist_ok=True)
    if include_source:
        write_atomic(directory / SOURCE, _serialize(model.source_info.state_dict()))
    write_atomic(directory / WEIGHTS, _serialize(trained))
    write_atomic(directory / CONFIG, (json.dumps(description, indent=2) + "\n").encode())


def load(
    cls: type[Any2Point], location: str | Path, source: Source | str | Path | None, *, revision: str | None
) -> Any2Point:
    """See `Any2Point.from_pretrained`."""
    directory = _folder(location, revision)
    description = _read_description(directory / CONFIG)
    config = Any2PointConfig.from_dict(description["config"])
    expected = description["source"]["fingerprint"]
    state = read_safetensors(directory / WEIGHTS)
    if config.tuning == "full":
        source = _tuned_source(description["source"], state, directory / WEIGHTS)
    else:
        if not isinstance(source, Source):
            source = _find_source(description, directory, source)
        _check_source(source, description["source"], expected)
    model = cls(config, source, description.get("class_names"))
    frozen = model.frozen_names
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}
    _compare(wanted, state, directory / WEIGHTS)
    model.load_state_dict(state, strict=False)
    return model.eval()


# What loading reads of a `config.json`, and of the source that it describes.
_FIELDS = {"config": dict, "source": dict}
_SOURCE_FIELDS = {
    **{"family": str, "modality": str, "width": int, "depth": int, "heads": int, "positions": list},
    **{"layout": dict, "origin": dict, "fingerprint": str},
}


def _read_description(file: Path) -> dict[str, Any]:
    description = read_json(file)
    if description.get("model_type") != "any2point":
        got = description.get("model_type")
        raise ValueError(f"`directory`: expected model_type 'any2point' in {file}, got {got!r}")
    _check_fields(description, _FIELDS, file)
    _check_fields(description["source"], _SOURCE_FIELDS, file)
    try:
        Layout(**description["source"]["layout"])
    except TypeError as error:
        raise ValueError(f"`directory`: unknown layout of a source in {file} ({error})") from None
    return description


def _check_fields(values: Mapping[str, Any], fields: Mapping[str, type], file: Path) -> None:
    for name, kind in fields.items():
        if name not in values:
            raise ValueError(f"`directory`: {file} is incomplete ({name!r} is missing)")
        if not isinstance(values[name], kind):
            got = f"{values[name]!r} as {name!r} in {file}"
            raise ValueError(f"`directory`: expected {kind.__name__}, got {got}")


def _check_source(source: Source, recorded: dict[str, Any], expected: str) -> None:
    if source.fingerprint != expected:
        raise ValueError(
            f"`source`: these {source.name} weights are not those that the model was trained with "
            f"(fingerprint {source.fingerprint[:12]}, expected {expected[:12]})"
        )
    # The same tensors can be put together in another way, as the configuration beside them tells.
    layout = Layout(**recorded["layout"])
    layout = dataclasses.replace(layout, eps=source.layout.eps)  # the model has an epsilon of its own
    if (source.layout, source.heads) != (layout, recorded["heads"]):
        raise ValueError(
            f"`source`: expected {recorded['heads']} heads and {layout}, as the model was trained with, got "
            f"{source.heads} heads and {source.layout}"
        )


def _compare(wanted: dict[str, Tensor], state: dict[str, Tensor], file: Path) -> None:
    missing, foreign = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or foreign:
        text = f"missing {missing[:3]}" if missing else f"foreign {foreign[:3]}"
        raise ValueError(f"`directory`: {file} does not hold this model's tensors: {text}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            got = f"{list(state[name].shape)} for {name!r}"
            raise ValueError(f"`directory`: expected shape {list(tensor.shape)} in {file}, got {got}")
        if state[name].is_floating_point() != tensor.is_floating_point():
            got = f"{state[name].dtype} for {name!r}"
            raise ValueError(f"`directory`: expected {tensor.dtype} in {file}, got {got}")


def _tuned_source(recorded: dict[str, Any], state: dict[str, Tensor], file: Path) -> Source:
    """The source of a fully tuned model, from the model's own weights."""
    prefix = "encoder.source."
    tensors = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    if "projection.table" not in state:
        raise ValueError(f"`directory`: {file} does not hold this model's tensors: missing projection.table")
    width = recorded["width"]
    tensors["position_table"] = state["projection.table"].reshape(*recorded["positions"], width)
    tensors |= {name: state[name].flatten() for name in ("cls_token", "cls_position") if name in state}
    if "registers" in state:
        tensors["registers"] = state["registers"]
    layout = recorded["layout"] | {"bias_kv": "blocks.0.attn.bias_k" in tensors}  # the model may drop them
    return Source.from_state_dict({**recorded, "layout": layout}, tensors)


def _find_source(description: dict[str, Any], directory: Path, path: str | Path | None) -> Source:
    recorded = description["source"]
    if path is None and description.get("source_included"):
        return Source.from_state_dict(recorded, read_safetensors(directory / SOURCE))
    if path is not None:
        options = {k: v for k, v in recorded["origin"].items() if k in ("depth", "heads")}
        return Source.from_checkpoint(path, recorded["family"], **options)
    try:
        return Source.from_origin(recorded)
    except ValueError as error:
        raise ValueError(
            f"`source`: cannot find the {recorded['family']} source of {directory}; give source=. {error}"
        ) from None


def _folder(location: str | Path, revision: str | None) -> Path:
    if not isinstance(location, (str, os.PathLike)):
        raise TypeError(f"`directory`: expected a folder or a repository, got {type(location).__name__}")
    directory = Path(location).expanduser()
    if directory.is_dir():
        return directory
    text = str(location)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ValueError(f"`directory`: no folder {directory}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"`directory`: no folder {directory}, and no huggingface_hub to ask") from None
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=[CONFIG, WEIGHTS, SOURCE]))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"`directory`: neither a folder nor a repository {text} ({reason})") from None


def push(model: Any2Point, repo_id: str, *, include_source: bool, private: bool | None) -> str:
    """See `Any2Point.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo_id, exist_ok=True, private=private)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder), include_source=include_source)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
    return str(url)
