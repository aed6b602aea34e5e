"""Work beside other work: on a second stream while a CUDA graph is recorded, so that a replay does both.

What follows from coordinates alone (samples, neighbours, cells, voxels) is many small kernels, of which one
waits for the other and few processors have anything to do. Outside of a graph launching takes longer than
they do, and everything stays in order.
"""

from __future__ import annotations

import contextlib
import functools
from types import TracebackType

import torch
from torch import Tensor


class Beside:
    """`with Beside(x) as beside:` what is launched inside waits for nothing that is launched after it.

    Before a result is used comes `wait`. Whatever the work inside reads has to be kept until then, since
    memory that is given back belongs to the stream outside at once.

    Args:
        x: a tensor on the device of the work.
        more: what else the work reads; where one of them or x needs a gradient everything stays in order.
    """

    def __init__(self, x: Tensor, *more: Tensor) -> None:
        self._side = _stream(x.get_device()) if _is_recorded(x, *more) else None
        self._inside = contextlib.ExitStack()
        self._marks: list[torch.cuda.Event] = []

    def __enter__(self) -> Beside:
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream())
            self._inside.enter_context(torch.cuda.stream(self._side))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._side is not None:
            self.mark()
            self._inside.__exit__(kind, error, trace)

    def mark(self) -> None:
        """Inside: a place to wait for; the end is one."""
        if self._side is not None:
            self._marks.append(self._side.record_event())

    def wait(self, mark: int = -1) -> None:
        """Outside: what comes next needs what was launched before this mark, by default everything."""
        if self._side is not None:
            torch.cuda.current_stream().wait_event(self._marks[mark])


def _is_recorded(x: Tensor, *more: Tensor) -> bool:
    if not x.is_cuda or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *more)):
        return False
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Of high priority: its kernels are small, and others wait for them."""
    return torch.cuda.Stream(device, priority=-1)
