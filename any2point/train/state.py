"""The state of a run between two steps, as it is kept in state.pt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from any2point.data.dataset import PointDataset

# What may differ when a run is continued: the result does not depend on it.
_FREE = {"device", "devices", "save_every", "save_every_steps", "tensorboard"}


def origin_of(model: nn.Module, train: PointDataset) -> dict[str, str]:
    """What tells a run's training set and frozen transformer from others."""
    digest = hashlib.sha256("/".join(train.class_names).encode())
    digest.update(train.labels.cpu().numpy().tobytes())
    digest.update(train.points[:, 0].cpu().numpy().tobytes())
    source = getattr(model, "source_info", None)
    return {
        "training set": digest.hexdigest(),
        "frozen transformer": "" if source is None else str(source.describe()["fingerprint"]),
    }


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changes: trained parameters and buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def read_state(
    path: Path,
    options: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    origin: Mapping[str, str],
    device: torch.device,
    world: int,
) -> dict[str, Any]:
    """Read state.pt.

    Args:
        path: the file.
        options: of the run that continues: its `TrainConfig`, with the precision that "auto" came to.
        weights: `trained_state` of its model.
        origin: `origin_of` its model and training set.
        device: where the tensors go.
        world: processes of the run that continues.

    Raises:
        ValueError: a file of another kind, or the state of a run that was started otherwise.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        saved, started, begun = state["config"], state["world"], state["origin"]
    except Exception as error:  # torch.load fails in many ways on a file that is not its own
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"{path}: expected the state of a run, got {reason}") from None
    other = [name for name in options if name not in _FREE and options[name] != saved.get(name)]
    if other:
        was = ", ".join(f"{name} {saved.get(name)!r}" for name in other)
        now = ", ".join(f"{name} {options[name]!r}" for name in other)
        raise ValueError(f"{path}: expected the options that the run was started with ({was}), got {now}")
    if started != world:
        raise ValueError(
            f"`devices`: expected the {started} process(es) that the run was started with, got {world}"
        )
    for what, value in origin.items():
        if begun[what] != value:
            raise ValueError(f"{path}: expected the {what} that the run was started with, got another")
    shapes, there = (
        {name: t.shape for name, t in tensors.items()} for tensors in (weights, state["weights"])
    )
    if shapes != there:
        name = sorted(name for name in shapes.keys() | there.keys() if shapes.get(name) != there.get(name))[0]
        raise ValueError(f"{path}: expected the state of this model, got another's ({name})")
    return state
