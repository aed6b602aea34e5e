"""The state of a run between two steps, as it is kept in state.pt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from any2point.train.config import TrainConfig

# What may differ when a run is continued: the result does not depend on it.
_FREE = {"device", "devices", "save_every", "save_every_steps", "tensorboard"}


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that training changes: trained parameters and buffers."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def read_state(
    path: Path, config: TrainConfig, names: Mapping[str, Any], device: torch.device, world: int
) -> dict[str, Any]:
    """Read state.pt.

    Args:
        path: the file.
        config: of the run that continues.
        names: `trained_state` of its model.
        device: where the tensors go.
        world: processes of the run that continues.

    Raises:
        ValueError: a file of another kind, or the state of a run that was started otherwise.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        saved, started = state["config"], state["world"]
    except Exception as error:  # torch.load fails in many ways on a file that is not its own
        reason = str(error).splitlines()[0][:80]
        raise ValueError(f"{path}: expected the state of a run, got {reason}") from None
    given = config.to_dict()
    other = [name for name in given if name not in _FREE and given[name] != saved.get(name)]
    if other:
        was = ", ".join(f"{name} {saved.get(name)!r}" for name in other)
        now = ", ".join(f"{name} {given[name]!r}" for name in other)
        raise ValueError(f"{path}: expected the options that the run was started with ({was}), got {now}")
    if started != world:
        raise ValueError(
            f"`devices`: expected the {started} process(es) that the run was started with, got {world}"
        )
    missing = set(names) ^ set(state["weights"])
    if missing:
        raise ValueError(f"{path}: expected the state of this model, got another's ({sorted(missing)[0]})")
    return state
