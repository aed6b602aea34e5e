"""Gradient checkpointing of modules whose batch normalisations keep running statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from any2point.nn.batch_norm import BatchNorm

Result = TypeVar("Result")


def recompute(
    module: nn.Module, function: Callable[..., Result], *args: object, random: bool = False
) -> Result:
    """`function(*args)`, whose intermediate results are computed again for the gradient instead of kept.

    Values and gradients are those of the plain call: the second pass repeats autocast and random numbers, and
    leaves running statistics alone. In a graph of `torch.compile` the call is plain, since there the compiler
    decides what to keep.

    Args:
        module: the module whose `BatchNorm`s the function uses.
        function: what to call.
        args: tensors and whatever else it takes.
        random: whether it draws random numbers. Their state cannot be kept while a CUDA graph is captured.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return function(*args)
    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=random,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_kept(module)),
    )


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """While inside, the module's batch normalisations leave their running statistics as they are."""
    norms = [part for part in module.modules() if isinstance(part, BatchNorm)]
    for norm in norms:
        norm.keep_statistics = True
    try:
        yield
    finally:
        for norm in norms:
            norm.keep_statistics = False
