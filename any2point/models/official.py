"""Checkpoints of the official code: reading them into an `Any2Point`, and writing them again."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from any2point.models.config import Any2PointConfig
from any2point.models.official_names import official_names
from any2point.models.official_variants import SETTINGS, VARIANTS, check_variant, recognise, variant_options
from any2point.sources import Source
from any2point.sources._layouts import split_table
from any2point.sources.checkpoint import count_blocks
from any2point.sources.source import get_family

if TYPE_CHECKING:
    from any2point.models.any2point import Any2Point

__all__ = ["SETTINGS", "VARIANTS", "load_official", "recognise", "save_official", "start_official"]

_HEADS = 12
# What starts from a normal distribution on ModelNet40, in our names.
_NORMAL = r"head\.|tokenizer\.embed\.|encoder\.(adapters\.\d+\.adapter\.|attention\.(qkv|proj)_)"
# What may differ on the way back: sizes that the official code takes from its configuration and that the
# tensors tell, and what matters in training alone.
_FREE = (
    *("num_classes", "adapter_dim", "cls_decay", "checkpointing"),
    *("adapter_dropout", "dropout", "drop_path", "attention_dropout"),
)


def unwrap(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's tensors in a checkpoint of the official code, in float32, without "module."."""
    if not isinstance(state, Mapping):
        raise TypeError(f"`state_dict`: expected a dictionary of tensors, got {type(state).__name__}")
    for name in ("model", "base_model"):
        if isinstance(state.get(name), Mapping):
            state = state[name]
    tensors = {}
    for key, value in state.items():
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            got = type(value).__name__
            raise ValueError(f"`state_dict`: expected tensors, got {got} for {key}") from None
        tensors[key.removeprefix("module.")] = tensor.float() if tensor.is_floating_point() else tensor
    return tensors


def load_official(
    cls: type[Any2Point],
    state_dict: Mapping[str, Any],
    variant: str | None,
    position_table: Any,
    options: Mapping[str, Any],
) -> Any2Point:
    """See `Any2Point.from_official`."""
    state = unwrap(state_dict)
    family, dataset = recognise(state, variant).split("/")
    prefix = "encoder." if dataset == "scanobjectnn" else ""
    blocks = "resblocks" if family == "clip-text" else "blocks"
    depth = count_blocks(state, f"{prefix}{blocks}.{{}}.adapter.ln1.weight")
    values = variant_options(f"{family}/{dataset}", "official") | dict(options)
    units = Any2PointConfig(**values).tokenizer_units
    places = official_names(family, dataset, depth=depth, units=units)
    needed = {key for key, place in places.items() if not place.counter}
    missing, foreign = sorted(needed - set(state)), sorted(set(state) - set(places))
    if missing:
        raise ValueError(f"`state_dict`: nothing in it for {', '.join(missing[:4])} ({len(missing)} in all)")
    if foreign:
        where = f"{family}/{dataset} with {depth} blocks"
        raise ValueError(f"`state_dict`: {foreign[0]} has no place in {where} ({len(foreign)} in all)")
    frozen = {place.name: state[key] for key, place in places.items() if place.name.startswith("blocks.")}
    model = cls(Any2PointConfig(**values), _source(frozen, family, depth, position_table))

    target = model.state_dict()
    for key, place in places.items():
        if place.counter or place.name in frozen:
            continue
        slot = target[place.name] if place.row is None else target[place.name][place.row]
        value = state[key]
        if value.shape != slot.shape + (1,) * place.ones:
            want = list(slot.shape) + [1] * place.ones
            raise ValueError(f"`state_dict`: expected shape {want} for {key}, got {list(value.shape)}")
        slot.copy_(value.reshape(slot.shape))
    return model.eval()


def _source(tensors: Mapping[str, Tensor], family: str, depth: int, position_table: Any) -> Source:
    """The frozen transformer of an official model."""
    table = torch.as_tensor(position_table).float()
    entry = get_family(family)
    if len(entry.positions) == 2:
        height, across = entry.positions
        if table.dim() < 3 or table.shape[0] == 1:  # not yet a grid
            table = split_table(table, grid=(height, across))[0]
        if table.shape[:-1] != (height, across):
            want, got = 1 + height * across, list(torch.as_tensor(position_table).shape)
            raise ValueError(f"`position_table`: expected {want} rows ({height} x {across}), got {got}")
    # The official code drops the keys and values that ImageBind's attention adds.
    layout = dataclasses.replace(entry.layout, bias_kv=False)
    width = tensors["blocks.0.attn.qkv.weight"].shape[1]
    return Source(
        name=family,
        modality=entry.modality,
        width=width,
        depth=depth,
        heads=_HEADS,
        layout=layout,
        tensors=tensors,
        position_table=table,
    )


def save_official(model: Any2Point, variant: str | None) -> dict[str, Any]:
    """See `Any2Point.to_official`."""
    if variant is None:
        names = [name for name in VARIANTS if name.startswith(f"{model.source_info.name}/")]
        if not names:
            got = f"a model of the source {model.source_info.name}"
            raise ValueError(f"`variant`: expected one of {', '.join(VARIANTS)}, got {got}")
        variant = min(names, key=lambda name: len(differences(model, name)))
    found = differences(model, variant)
    source = model.source_info
    for name, want in (("width", 768), ("depth", 12), ("heads", _HEADS)):
        if getattr(source, name) != want:
            found.append(f"the source's {name} {getattr(source, name)} (official: {want})")
    if found:
        raise ValueError(f"`variant`: this model is not {variant} of the official code: {'; '.join(found)}")
    state = official_state(model, variant)
    if variant.endswith("scanobjectnn"):
        return {"model": state, "optimizer": {}, "scheduler": {}, "epoch": 0}
    state = {f"module.{name}": value for name, value in state.items()}
    return {"base_model": state, "optimizer": {}, "epoch": 0, "metrics": {}, "best_metrics": {}}


def differences(model: Any2Point, variant: str) -> list[str]:
    """Options of a model that the official code has otherwise, each as `name value (official: value)`."""
    family = check_variant(variant).split("/")[0]
    if model.source_info.name != family:
        return [f"source {model.source_info.name} (official: {family})"]
    ours = model.config.to_dict()
    free = {name: ours[name] for name in _FREE}
    try:
        official = Any2PointConfig(**(variant_options(variant, "official") | free)).resolve(model.source_info)
    except ValueError as error:  # a source that the official options do not fit, such as its width
        return [str(error)]
    theirs = dataclasses.asdict(official)
    return [
        f"{name} {value!r} (official: {theirs[name]!r})"
        for name, value in ours.items()
        if value != theirs[name]
    ]


def official_state(model: Any2Point, variant: str) -> dict[str, Tensor]:
    """The model's parameters and buffers under their official names and in their official shapes."""
    family, dataset = variant.split("/")
    depth, units = model.source_info.depth, model.config.tokenizer_units
    trained, frozen = model.state_dict(), model.source_info.tensors
    state = {}
    for name, place in official_names(family, dataset, depth=depth, units=units).items():
        tensor = frozen[place.name] if place.name.startswith("blocks.") else trained[place.name]
        value = (tensor if place.row is None else tensor[place.row]).detach().cpu()
        state[name] = value.reshape(value.shape + (1,) * place.ones).clone()
    return state


def start_official(model: Any2Point, variant: str) -> None:
    """Give an untrained model the random start of the official code, from the source on.

    ScanObjectNN: Xavier weights and zero biases in adapters and attention, PyTorch's own start in tokenizer
    and head. ModelNet40: normal weights (0.02) and zero biases in all of these but the tokenizer's stages.
    Both: a random position of the class token, although two of the sources have one.
    """
    nn.init.normal_(model.cls_position, std=0.02)
    if variant.endswith("scanobjectnn"):
        for layer in model.head.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        return
    for name, parameter in model.named_parameters():
        if not re.match(_NORMAL, name):
            continue
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
