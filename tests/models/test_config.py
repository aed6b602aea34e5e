"""Configuration: what is refused, what is filled in, what every quirk of the official code is called."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from any2point import Any2PointConfig, Source
from any2point.models.official import VARIANTS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_classes": 0}, "`num_classes`: expected a positive integer, got 0"),
        ({"num_tokens": 12.5}, "`num_tokens`: expected a positive integer, got 12.5"),
        ({"num_points": 100}, "`num_tokens`: expected points >= centres of each stage >= tokens"),
        ({"neighbors": 0}, "`neighbors`: expected a positive integer or positive integers, got 0"),
        ({"neighbors": 257}, r"`neighbors`: expected 1 to \(1024, 512, 256\) by stage"),
        ({"neighbors": (4, 4)}, "`neighbors`: expected one number or 3"),
        ({"stage_sizes": (512, 128)}, "`stage_sizes`: expected 3, the last of 128"),
        ({"normalize": "unit"}, "`normalize`: expected one of"),
        ({"pooling": "max"}, "`pooling`: expected one of"),
        ({"parity": "paper"}, "`parity`: expected one of"),
        ({"attention_axis": "heads"}, "`attention_axis`: expected one of"),
        ({"dropout": 1.0}, "`dropout`: expected a probability below 1"),
        ({"voxel_size": 0.0}, "`voxel_size`: expected a positive number"),
        ({"attention_heads": 5}, "`attention_heads`: expected a divisor"),
        ({"lines": [[1, 0, 0]]}, r"`lines`: expected 6 directions \(`views`\), got 1"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Any2PointConfig(**values)


@pytest.mark.parametrize("field", dataclasses.fields(Any2PointConfig), ids=lambda field: field.name)
def test_values_of_other_types_are_refused_by_name(field: dataclasses.Field[Any]) -> None:
    """Also those that Python takes for numbers, or that stand for something in a condition."""
    flags = isinstance(field.default, bool) or "bool" in str(field.type)
    for value in ({}, "3x", (("a",),), object(), float("nan"), 1 if flags else True):
        with pytest.raises(ValueError, match=rf"^`{field.name}`: expected .*, got "):
            Any2PointConfig(**{field.name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale_factor": "1"}, "`scale_factor`: expected a number, got '1'"),
        ({"norm_eps": "1e-6"}, "`norm_eps`: expected a positive number or None, got '1e-6'"),
        ({"cell": float("inf")}, "`cell`: expected a positive number or None, got inf"),
        ({"neighbors": 8.0}, "`neighbors`: expected a positive integer or positive integers, got 8.0"),
        ({"tokenizer_units": ()}, r"`tokenizer_units`: expected positive integers, got \(\)"),
        ({"tokenizer_units": (2, 0, 1)}, "`tokenizer_units`: expected positive integers"),
        ({"attention_heads": 0}, "`attention_heads`: expected a positive integer, got 0"),
        ({"attention_dim": -12}, "`attention_dim`: expected a positive integer, got -12"),
        ({"tokenizer_hidden": 0}, "`tokenizer_hidden`: expected a positive integer, got 0"),
        ({"position_size": (0,)}, "`position_size`: expected positive integers or None"),
        ({"table_grid": (3,)}, "`table_grid`: expected 2 positive integers or None"),
        ({"line_direction": (1, 2)}, "`line_direction`: expected 3 numbers"),
        ({"line_direction": (0, 0, 0)}, "`line_direction`: expected not all zero"),
        ({"camera": 0}, "`camera`: expected a positive number or None, got 0"),
        ({"adapter_blocks": ("a",)}, "`adapter_blocks`: expected integers or None"),
        ({"lines": 3}, "`lines`: expected directions of three numbers"),
        ({"rotations": [["a"]]}, "`rotations`: expected three angles in degrees"),
        ({"head_bias": "no"}, "`head_bias`: expected a truth value, got 'no'"),
    ],
)
def test_message_of_a_type(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Any2PointConfig(**values)


def test_numbers_of_arrays_and_lists() -> None:
    config = Any2PointConfig(views=3, lines=torch.eye(3), tokenizer_units=[1, 1, 1], voxel_size=1)
    assert config.lines == ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    assert config.tokenizer_units == (1, 1, 1)


def test_options_of_the_other_kind_of_positions_are_refused() -> None:
    line, image = Source.random("bert", width=16, depth=1), Source.random("dinov2", width=16, depth=1)
    for name, value in {"camera": 2.0, "scramble": True, "table_grid": (8, 64)}.items():
        with pytest.raises(ValueError, match=f"`{name}`: expected None for bert, whose positions are a seq"):
            Any2PointConfig(**{name: value}).resolve(line)
    with pytest.raises(ValueError, match=r"`permuted_lines`: expected None for dinov2, .* got True"):
        Any2PointConfig(permuted_lines=True).resolve(image)
    with pytest.raises(ValueError, match="`table_grid`: expected two factors of the 1369 positions"):
        Any2PointConfig(table_grid=(3, 4)).resolve(image)


def test_refused_for_a_source() -> None:
    line, image = Source.random("bert", width=16, depth=1), Source.random("dinov2", width=16, depth=1)
    with pytest.raises(ValueError, match="`tokenizer_width`: expected the source's width / 8, got 96"):
        Any2PointConfig(tokenizer_width=96).resolve(line)
    with pytest.raises(ValueError, match="`tokenizer_width`: expected the source's width / 8"):
        Any2PointConfig().resolve(Source.random("bert", width=20, depth=1))
    with pytest.raises(
        ValueError, match="`cell`: expected at most 1,048,576 cells per view, got 1,369,000,000"
    ):
        Any2PointConfig(cell=0.001).resolve(image)
    with pytest.raises(ValueError, match="`position_size`: expected 2"):
        Any2PointConfig(position_size=(3,)).resolve(image)
    with pytest.raises(ValueError, match="`views`: expected 6 with the official views"):
        Any2PointConfig(parity="official", views=5).resolve(line)


def test_defaults_are_the_corrected_semantics() -> None:
    for family in ("clip-text", "bert", "dinov2"):
        config = Any2PointConfig().resolve(Source.random(family, width=16, depth=1))
        assert config.attention_axis == "tokens"
        assert config.position_adds == "once"
        assert config.fps_tie == "lowest"
        assert config.guard
        assert config.center
        assert config.camera is None
        assert not any((config.wrap, config.scramble, config.permuted_lines, config.count_empty))
        assert config.norm_eps == Source.random(family, width=16, depth=1).layout.eps
    assert config.cell == pytest.approx(37 * 26 / 518)


def test_parity_turns_every_quirk_on() -> None:
    clip = Any2PointConfig(parity="official").resolve(Source.random("clip-text", width=16, depth=1))
    assert (clip.attention_axis, clip.position_adds, clip.fps_tie) == ("batch", "both", "pointnet2")
    assert all((clip.wrap, clip.permuted_lines, clip.count_empty, clip.drop_path_rows))
    assert not clip.guard
    assert not clip.center
    image = Any2PointConfig(parity="official").resolve(Source.random("dinov2", width=16, depth=1))
    assert (image.attention_axis, image.position_adds, image.scramble) == ("tokens", "every", True)
    assert image.camera is not None
    one = Any2PointConfig(parity="official", attention_axis="tokens", count_empty=False)
    one = one.resolve(Source.random("clip-text", width=16, depth=1))
    assert (one.attention_axis, one.count_empty, one.wrap) == ("tokens", False, True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str) -> None:
    config = Any2PointConfig(parity="official", **VARIANTS[variant])
    values = json.loads(json.dumps(config.to_dict()))
    assert Any2PointConfig.from_dict(values) == config
    with pytest.raises(ValueError, match=r"expected fields of Any2PointConfig, got \['width'\]"):
        Any2PointConfig.from_dict(values | {"width": 3})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.views = 3  # type: ignore[misc]
