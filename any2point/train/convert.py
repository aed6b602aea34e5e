"""Checkpoints of the official code as model folders, and back: `any2point convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from any2point.models import Any2Point
from any2point.models.official import recognise, unwrap
from any2point.sources import Source
from any2point.sources.checkpoint import read_checkpoint
from any2point.train import files
from any2point.train.recipe import load_recipe
from any2point.train.run import load_run

# Official checkpoints may hold an accuracy as a NumPy number beside the tensors: data, under either name that
# NumPy has had for it.
_scalar = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
]


def from_official(checkpoint: Path, output: Path, variant: str | None, pretrained: Path | None) -> None:
    """Turn a checkpoint of the official code into a model folder, with the recipe that it was trained by.

    Args:
        checkpoint: the fine-tuned file.
        output: folder to make.
        variant: one of `any2point.models.official.VARIANTS`, or None for what the names of the tensors say.
        pretrained: the checkpoint of the transformer that it was trained from, which has the position table.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a file that cannot be read without running code, tensors that are not those of a variant,
            or a `pretrained` of other weights.
    """
    for path in (checkpoint, *([] if pretrained is None else [pretrained])):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
    if (output / "config.json").exists():
        raise ValueError(f"{output}: expected a new folder, got one with a model")
    with torch.serialization.safe_globals(_NUMPY):
        state = unwrap(read_checkpoint(checkpoint)[0])
    variant = recognise(state, variant)
    family, dataset = variant.split("/")
    if pretrained is None:
        raise ValueError(
            f"--pretrained: expected the {family} checkpoint that {checkpoint.name} ({variant}) was trained "
            "from, which has the position table, got none"
        )
    source = Source.from_checkpoint(pretrained, family)
    model = Any2Point.from_official(state, variant, position_table=source.position_table)
    _check_same(model.source_info, source, pretrained)
    model.class_names = _class_names(dataset, model.config.num_classes)
    model.save_pretrained(output, include_source=True)
    changes = {"parity": "official", "source": str(pretrained.absolute())}
    files.write_yaml(output / files.RECIPE, load_recipe(variant).override(changes).to_dict())
    print(f"{variant}\n{model.summary()}\n\nmodel folder: {output}")


def to_official(run: Path, output: Path, variant: str | None, source: str | None) -> None:
    """Write a run, or any saved model, as a checkpoint that the official code loads.

    Args:
        run: folder of the run or model.
        output: file to write.
        variant: what the model has to be, or None for what its options say.
        source: checkpoint of its transformer, where that is no longer where it was.

    Raises:
        ValueError: the model is not one of the official code; the options that differ are named.
    """
    if output.exists():
        raise ValueError(f"{output}: expected a new file, got one that is there")
    model, _ = load_run(run, source)
    checkpoint = model.to_official(variant)
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_state(output, checkpoint)
    print(f"official checkpoint: {output}")


def _check_same(tuned: Source, pretrained: Source, path: Path) -> None:
    """The frozen blocks tell whether a checkpoint was trained from another."""
    for name, value in tuned.tensors.items():
        other = pretrained.tensors.get(name)
        if other is None or not torch.equal(value, other):
            raise ValueError(
                f"--pretrained: expected the checkpoint that the model was trained from, got {path}, "
                f"whose {name} is another"
            )


def _class_names(dataset: str, count: int) -> list[str] | None:
    """Names of the classes, if the head has as many as the data set."""
    from any2point.data import modelnet40, scanobjectnn

    names = (scanobjectnn if dataset == "scanobjectnn" else modelnet40).CLASSES
    return list(names) if len(names) == count else None
