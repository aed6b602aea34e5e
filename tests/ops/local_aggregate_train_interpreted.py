"""Run with TRITON_INTERPRET=1: the training passes of local_aggregate in Triton on the CPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton.runtime.interpreter
from local_aggregate_training import train
from op_contract import Recorder
from test_local_aggregate import make, make_unit

from any2point import ops, reference
from any2point.ops import _local_aggregate_recompute
from any2point.ops import _local_aggregate_train as passes
from any2point.triton.local_aggregate_train import TritonPasses

_patch = triton.runtime.interpreter._patch_lang_tensor


def _patch_index(tensor: Any, scope: Any) -> None:
    """Bounds of loops that are tensors of one element, which NumPy 2.4 does not turn into an int."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def check(kwargs: dict[str, Any], limit: float, scale: float = 1.0, **options: Any) -> None:
    want = train(reference.local_aggregate, kwargs, torch.float64)
    with Recorder() as recorder:
        got = train(ops.local_aggregate, kwargs | options, torch.float32, None, scale)
    assert passes.forward._opoverload in [call[0] for call in recorder.calls]
    results = {"out": (got.out, want.out)}
    results |= {name: (x, want.gradients[name]) for name, x in got.gradients.items()}
    results |= {name: (x, want.statistics[name]) for name, x in got.statistics.items()}
    for name, (a, b) in results.items():
        error = float((a - b).norm() / b.norm().clamp(min=1e-3))
        assert error < limit, f"{name}: relative error {error:.1e}"


def main() -> None:
    torch.set_num_threads(1)
    triton.runtime.interpreter._patch_lang_tensor = _patch_index
    passes._kind = lambda *_: TritonPasses
    _local_aggregate_recompute.ROOM = 1  # chunks of one cloud
    # Groups that fill no tile, channels in two chunks of which one is not full, hidden ones in two pieces.
    for k, width, hidden, units in ((3, 5, 4, 3), (5, 17, 33, 1), (1, 6, 3, 2)):
        kwargs = make(2, 21, 5, k, width, 0)
        generator = torch.Generator().manual_seed(k)
        kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i == 0) for i in range(units)]
        if k > 1:
            kwargs["neighbor"][0, 1, 1:3] = -1
        kwargs["neighbor"][1, 2] = kwargs["center"][1, 2] = -1
        kwargs |= {"normalize": "mn40" if k == 3 else "scan"}
        if k == 5:  # without strides of their own
            kwargs["center"] = kwargs["center"][1:].expand(2, -1)
            kwargs["neighbor"] = kwargs["neighbor"].mT.contiguous().mT
        check(kwargs, 2e-5)
        check(kwargs, 2e-5, recompute=True)

    # Operands in float16, and a gradient that is not.
    module: Any = sys.modules["any2point.ops.local_aggregate"]
    forward = module.train_forward
    module.train_forward = lambda *args: forward(*args[:9], True, *args[10:])
    check(kwargs, 1e-2, 2.0**-30)


if __name__ == "__main__":
    main()
