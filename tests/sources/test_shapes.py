"""Tensors of the right names and wrong shapes, and arguments that are none: one clear error each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sources import bert_state, clip_state, dino_state
from torch import Tensor

from any2point.sources import Source
from any2point.sources.checks import convert
from any2point.sources.source import get_family, matching_families

STATES = {"bert": bert_state, "clip": clip_state, "dino": dino_state}
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda x: torch.tensor(1.0),
    "short": lambda x: torch.ones(3),
    "empty": lambda x: torch.empty(0),
    "longer": lambda x: torch.cat([x, x], dim=-1),
    "sparse": lambda x: x.to_sparse(),
    "without values": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
}


def read(state: dict[str, Tensor], **options: Any) -> Source:
    family = matching_families(state, {}, Path("file.pt"))[0]
    return convert(get_family(family), state, {}, **({"heads": 4, "origin": {"path": "file.pt"}} | options))


@pytest.mark.parametrize("kind", STATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_wrong_shapes(kind: str, shape: str) -> None:
    state = STATES[kind]()
    used = set(state) - set(read(state).unused)
    assert len(used) > 25
    for name in used:
        with pytest.raises(ValueError, match=r"^`") as error:
            read(state | {name: SHAPES[shape](state[name])})
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize("kind", STATES)
def test_wrong_counts(kind: str) -> None:
    for name in ("depth", "heads"):
        for value in (0, -1, "1", 1.5, True):
            with pytest.raises(ValueError, match=f"`{name}`: expected a positive integer, got {value!r}"):
                read(STATES[kind](), **{name: value})


@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match="`path`: expected a file or folder, got "):
        Source.from_checkpoint(path)


def test_a_name_that_no_file_can_have() -> None:
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError, match="`path`: no file or folder"):
            Source.from_checkpoint(name)


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("bert", {"width": 0}, "`width`: expected a positive integer, got 0"),
        ("bert", {"width": 2.5}, "`width`: expected a positive integer, got 2.5"),
        ("bert", {"depth": 0}, "`depth`: expected a positive integer, got 0"),
        ("bert", {"heads": -2}, "`heads`: expected a positive integer, got -2"),
        ("bert", {"heads": 3}, "`heads`: expected a divisor of the width 16, got 3"),
        ("bert", {"positions": 5}, "`positions`: expected 1 positive integer, got 5"),
        ("bert", {"positions": (0,)}, r"`positions`: expected 1 positive integer, got \(0,\)"),
        ("dinov2", {"positions": (2,)}, r"`positions`: expected 2 positive integers, got \(2,\)"),
        ("bert", {"seed": None}, "`seed`: expected an integer of 64 bits, got None"),
        ("bert", {"seed": 1 << 64}, "`seed`: expected an integer of 64 bits, got 18446744073709551616"),
        (
            "whisper",
            {"width": 15, "heads": 3},
            "`width`: expected .* sines and cosines .* such as 14, got 15",
        ),
        ("mae", {"width": 6, "heads": 3}, "`width`: expected .* sines and cosines .* such as 4, got 6"),
        (["bert"], {}, "`family`: expected one of clip-text"),
    ],
)
def test_random_sources_that_cannot_be(family: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source.random(family, **({"width": 16, "depth": 1, "heads": 2} | values))


def test_tokens_of_another_width() -> None:
    source = Source.random("dinov2", width=16, depth=1, heads=2, positions=(1, 1))
    for name in ("cls_token", "cls_position"):
        with pytest.raises(ValueError, match=rf"`{name}`: expected \[16\], got \[3\]"):
            dataclasses.replace(source, **{name: torch.ones(3)})
    with pytest.raises(ValueError, match=r"`position_table`: expected .*, got \[0, 16\]"):
        dataclasses.replace(source, position_table=torch.ones(0, 16))
    with pytest.raises(ValueError, match=r"`tensors`: expected shape \[16\] for 'norm.weight', got \[3\]"):
        dataclasses.replace(source, tensors={**source.tensors, "norm.weight": torch.ones(3)})
