"""Suites of pytest-benchmark from the cases of `any2point bench`: a group per op, size, mode and device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from any2point.bench import peers, run
from any2point.bench.cases import Case, Provider
from any2point.bench.timing import flatten

# Points of a cloud: more take some peers seconds a call on a CPU, where `any2point bench` has time for them.
_LARGEST = 10_000


def test_op(measure: Callable[..., None], op: str, device: str, shape: str, provider: str, mode: str) -> None:
    """What the modules `bench_<op>` collect; conftest.py makes the parameters."""
    measure(op, device, shape, provider, mode)


@functools.cache
def cases_of(op: str, device: str, folder: str | None) -> dict[str, Case]:
    """The cases of an op by shape, with a baseline by torch.compile where there is one."""
    if device == "cuda":
        made = list(run.op_cases([op], "cuda", folder=folder))
    else:
        made = [case for case in run.OPS[op](device) if _longest(case) <= _LARGEST]
    return {case.shape: case for case in made}


def _longest(case: Case) -> int:
    return max(part.shape[1] for part in flatten(case.inputs[0]) if part.dim() > 1)


def parameters(op: str, device: str, folder: str | None, compile_: bool) -> list[Any]:
    """(op, device, shape, provider, mode): what can run here, and what cannot with the reason to skip it."""

    def skip(provider: str, reason: str) -> Any:
        return pytest.param(op, device, "all", provider, "all", marks=pytest.mark.skip(reason=reason))

    if device == "cuda" and not torch.cuda.is_available():
        return [skip("all", "needs a CUDA device")]
    found: list[Any] = []
    for shape, case in cases_of(op, device, folder).items():
        names = [provider.name for provider in case.providers]
        names += ["torch.compile"] if case.compilable is not None and compile_ else []
        modes = ("forward", "backward", "both") if case.backward else ("forward",)
        found += [(op, device, shape, name, mode) for mode in modes for name in names]
    if device == "cuda":
        absent = [name for name in peers.GPU_PEERS if name not in peers.gpu_peers(folder)]
        return found + [skip(name, f"{name}: not given by --peers") for name in absent]
    reasons = peers.skipped() if op in ("farthest_point_sample", "knn") else []
    return found + [skip(reason.split(":")[0], reason) for reason in reasons]


@functools.cache
def checked(
    op: str, device: str, folder: str | None, shape: str, name: str
) -> tuple[Case, Provider, float, str]:
    """A provider with the part of its results that equals ours, and what is wrong with them if anything."""
    case = cases_of(op, device, folder)[shape]
    named = {provider.name: provider for provider in case.providers}
    provider = named[name] if name in named else run.compiled(case)
    try:
        return case, provider, run.check(case, provider), ""
    except Exception as error:  # whatever goes wrong in other libraries is a reason not to time them
        return case, provider, 0.0, run.first_line(error)
