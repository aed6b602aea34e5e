"""The examples of docstrings do what they say, as far as they can be run by themselves."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import any2point
from any2point import nn, ops, sources

MODULES = [
    f"any2point.{folder}.{module.name}"
    for folder, package in (("ops", ops), ("nn", nn), ("sources", sources))
    for module in pkgutil.iter_modules(package.__path__)
] + ["any2point.models.any2point"]
# Names that readers know from the text around an example.
NAMES = {name: getattr(ops, name) for name in ops.__all__} | {"torch": torch, "any2point": any2point}


def examples(name: str) -> list[doctest.DocTest]:
    """Those of a module that are whole: without an ellipsis in place of arguments, and without files."""
    found = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), extraglobs=NAMES)
    text = {test.name: "".join(example.source for example in test.examples) for test in found}
    return [
        t for t in found if text[t.name] and "..." not in text[t.name] and "checkpoint" not in text[t.name]
    ]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    """Those that go on from tensors of the reader's own are left out."""
    for example in examples(name):
        torch.manual_seed(0)
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
        failed = runner.run(example, out=report.append).failed
        text = "".join(report)
        assert not failed or "NameError" in text, text


def test_there_are_examples() -> None:
    assert sum(len(examples(name)) for name in MODULES) > 8
