"""Run with TRITON_INTERPRET=1: the training passes of local_aggregate in Triton on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import triton.runtime.interpreter
from local_aggregate_training import train
from op_contract import Recorder
from test_local_aggregate import make, make_unit

from any2point import ops, reference
from any2point.ops import _local_aggregate_train as passes

_patch = triton.runtime.interpreter._patch_lang_tensor


def _patch_index(tensor: Any, scope: Any) -> None:
    """Bounds of loops that are tensors of one element, which NumPy 2.4 does not turn into an int."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def main() -> None:
    from any2point.triton.local_aggregate_train import Forward
    from any2point.triton.local_aggregate_train_backward import Backward

    torch.set_num_threads(1)
    triton.runtime.interpreter._patch_lang_tensor = _patch_index
    passes._forward_passes, passes._backward_passes = Forward, Backward
    # Groups that fill no tile, channels in two chunks of which one is not full, hidden ones in two pieces.
    for k, width, hidden, units in ((3, 5, 4, 2), (5, 17, 33, 1)):
        kwargs = make(2, 21, 5, k, width, 0)
        generator = torch.Generator().manual_seed(k)
        kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i == 0) for i in range(units)]
        kwargs["neighbor"][0, 1, 1:3] = -1
        kwargs["neighbor"][1, 2] = kwargs["center"][1, 2] = -1
        kwargs |= {"normalize": "mn40" if k == 3 else "scan"}
        with Recorder() as recorder:
            got = train(ops.local_aggregate, kwargs, torch.float32)
        assert passes.forward._opoverload in [call[0] for call in recorder.calls]
        want = train(reference.local_aggregate, kwargs, torch.float64)
        results = {"out": (got.out, want.out)}
        results |= {name: (x, want.gradients[name]) for name, x in got.gradients.items()}
        results |= {name: (x, want.statistics[name]) for name, x in got.statistics.items()}
        for name, (a, b) in results.items():
            error = float((a - b).norm() / b.norm().clamp(min=1e-3))
            assert error < 2e-5, f"{name}: relative error {error:.1e}"


if __name__ == "__main__":
    main()
