"""Every pair of options in at least one model, which works in every way that a model has to."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SMALL, close, clouds, make

from any2point import Any2Point, Any2PointConfig

# Values beside the defaults; fields whose only other values are refused together are left to other tests.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "positions": ("none", "learned", "sinusoidal"),
    "adapter": ("bottleneck", "aggregate", "none"),
    "adapter_blocks": ((1,),),
    "insertion": ("mlp_parallel", "attention_output"),
    "ensemble": ("mean", "max"),
    "pooling": ("max+mean",),
    "views": (1, 17),
    "cell": (0.5, 100.0),
    "voxel_size": (0.01, 50.0),
    "tokenizer": ("pointnet",),
    "tokenizer_units": ((1,),),
    "num_tokens": (1, 9),
    "normalize": ("mn40",),
    "input_features": (3,),
    "tuning": ("full", "probe"),
    "checkpointing": (True,),
    "source_dtype": ("bfloat16",),
    "position_adds": ("every", "both"),
    "feature_order": ("cls_max",),
    "count_empty": (True,),
    "drop_path": (0.5,),
    "attention_dropout": (0.3,),
    "causal": (True,),
    "center": (False,),
}
BASE = SMALL | {"neighbors": 3}
DEFAULT = object()


def options_of(chosen: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if value is not DEFAULT}


def fits(chosen: dict[str, Any]) -> bool:
    try:
        Any2PointConfig(**(BASE | options_of(chosen)))
    except ValueError:
        return False
    return True


def covering() -> list[dict[str, Any]]:
    """Few sets of options that hold every pair of values that may go together, defaults included."""
    values = {name: (DEFAULT, *others) for name, others in OPTIONS.items()}
    choices = [(name, value) for name in values for value in values[name]]
    pairs = [pair for pair in itertools.combinations(choices, 2) if pair[0][0] != pair[1][0]]
    allowed = {frozenset(pair) for pair in pairs if fits(dict(pair))}
    wanted = [frozenset(pair) for pair in pairs if frozenset(pair) in allowed]
    shuffle, found = random.Random(0).shuffle, []
    while wanted:
        chosen = dict(wanted[0])
        names = [name for name in OPTIONS if name not in chosen]
        shuffle(names)
        for name in names:
            gains = []
            for number, value in enumerate(values[name]):
                together = {frozenset(((name, value), other)) for other in chosen.items()}
                if together <= allowed and fits(chosen | {name: value}):
                    gains.append((len(together.intersection(wanted)), -number))
            chosen[name] = values[name][-max(gains)[1]] if gains else DEFAULT
        held = {frozenset(pair) for pair in itertools.combinations(chosen.items(), 2)}
        wanted = [pair for pair in wanted if pair not in held]
        found.append(options_of(chosen))
    return found


COMBINATIONS = covering()
FAMILIES = ("clip-text", "dinov2", "bert")


pytestmark = pytest.mark.usefixtures("one_thread")


def test_all_pairs_are_there() -> None:
    assert len(COMBINATIONS) < 40
    for name, values in OPTIONS.items():
        for value in values:
            assert any(chosen.get(name) == value for chosen in COMBINATIONS)
            assert any(name not in chosen for chosen in COMBINATIONS)


@pytest.mark.parametrize("number", range(len(COMBINATIONS)))
def test_combination(number: int, tmp_path: Path) -> None:
    """It gives finite logits, for every cloud by itself; trains all it says; is saved, loaded, summed up."""
    pytest.importorskip("safetensors")
    options = BASE | COMBINATIONS[number]
    model, points = make(FAMILIES[number % 3], **options), clouds()
    config, count = model.config, model.config.num_tokens
    features = torch.rand(3, 96, config.input_features) if config.input_features else None

    model.train()
    torch.nn.functional.cross_entropy(model(points, features), torch.arange(3)).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name

    model.eval()
    with torch.no_grad():
        logits = model(points, features)
        assert logits.isfinite().all()
        close(model(points[1:2], None if features is None else features[1:2]), logits[1:2], 1e-4)
        padded = torch.cat([points, torch.full((3, 5, 3), torch.inf)], dim=1)
        more = None if features is None else torch.cat([features, torch.rand(3, 5, 3)], dim=1)
        close(model(padded, more, torch.tensor([96, 96, 96])), logits, 1e-4)
        assert model(padded, more, torch.tensor([0, 1, 96])).isfinite().all()
        if not config.causal:
            order = torch.randperm(96)
            close(model(points[:, order], None if features is None else features[:, order]), logits, 1e-3)
        if config.center:
            close(model(points + 2, features), logits, 1e-3)
        encoding = model.encode(points, features, attention=not config.causal)
    assert encoding.tokens.shape == (3, count, 48)
    assert encoding.centers.shape == (3, count, 3)
    assert config.causal or encoding.attention.shape == (3, 2, 4, count)

    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(Any2Point.from_pretrained(tmp_path)(points, features), logits)
    assert model.summary().trained == sum(p.numel() for p in model.trainable_parameters())
