"""One training step of local_aggregate, for the tests of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Step(NamedTuple):
    """What a step computes, in float64."""

    out: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


def train(
    function: Callable[..., Tensor],
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    features: torch.dtype | None = None,
    scale: float = 1.0,
) -> Step:
    """Forward and backward in `dtype`, the features perhaps in a lower one, of a loss times `scale`.

    The loss is a weighted sum of squares: no gradient where a ReLU has its kink.
    """

    def own(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return x.detach().to(dtype, copy=True)

    given = tree_map(own, kwargs)
    if features is not None:
        given["features"] = given["features"].to(features)
    leaves = {"features": given["features"]}
    statistics = {}
    for i, unit in enumerate(given["units"]):
        for name, norm in (("in_norm", unit.in_norm), ("out_norm", unit.out_norm)):
            leaves |= {f"{i}.{name}.weight": norm.weight, f"{i}.{name}.bias": norm.bias}
            statistics |= {f"{i}.{name}.mean": norm.running_mean, f"{i}.{name}.var": norm.running_var}
        leaves |= {f"{i}.in_weight": unit.in_weight, f"{i}.out_weight": unit.out_weight}
    for leaf in leaves.values():
        leaf.requires_grad_()
    device = given["features"].device.type
    with torch.autocast(device, dtype=features, enabled=features is not None):
        out = function(**given, training=True)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grad = grad.to(out.device) * out.detach() * scale
    found = torch.autograd.grad(out, list(leaves.values()), grad.to(out))
    gradients = {name: value.double() / scale for name, value in zip(leaves, found)}
    return Step(out.detach().double(), gradients, {k: v.double() for k, v in statistics.items()})
