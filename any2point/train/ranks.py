"""The processes ("ranks") of a run: what they exchange, and how they end together.

Every rank works on its part of each batch with the same weights; after the backward pass the gradients are
averaged, so that all apply the same update, bit for bit, and the weights never have to be sent.

Gradients are averaged by all-reduces of one flat tensor per 64 MiB, outside of `DistributedDataParallel`.
About 1.5 M parameters are trained, 6 MB: there is next to nothing to overlap with the backward pass, which
is what DDP's buckets and hooks are for. And forward and backward are one CUDA graph, in which hooks would be
recorded once and for all, with the collectives inside; so the graph stays the one of a single GPU and the
exchange is a separate, visible step.
Fabric's own `all_reduce` waits for all ranks on the host before every call, hence torch.distributed's here.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from any2point.reference.batch_norm import shared_statistics

_BUCKET = 2**24  # elements
_POLL, _LINGER = 0.2, 2.0  # seconds
_KEY = "any2point/failed"
_together = False  # whether this process is inside `Ranks.together`


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; a single one by default.

    Attributes:
        device: where what is exchanged has to be.
        rank: number of this process.
        world: how many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def part(self, batch: int) -> slice:
        """This rank's rows of a batch, whose size is a multiple of `world`."""
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def average_gradients(self, params: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over the ranks, in place."""
        if self.world == 1:
            return
        for bucket in _buckets(params):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            torch.distributed.all_reduce(flat)
            flat.div_(self.world)
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket)])

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place; `tensor` is on `device`."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def statistics(self, shared: bool) -> contextlib.AbstractContextManager:
        """For forward and backward: whether batch normalisation is by the rows of all ranks."""
        if self.world == 1 or not shared:
            return contextlib.nullcontext()
        return shared_statistics(_Sum.apply)

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of every rank, exactly."""
        table = torch.zeros(self.world, len(values), dtype=torch.float64, device=self.device)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        return self.sum(table).tolist()

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        if self.world == 1:
            return
        for tensor in tensors:
            value = tensor.detach().contiguous()
            torch.distributed.broadcast(value, 0)
            tensor.detach().copy_(value)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather([0.0])

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """No rank leaves this block alone.

        Ranks wait for each other at its end. An exception in one of them ends the others, wherever they wait,
        within seconds: the first to fail raises it, with its rank in the attribute `rank`; the others exit
        without a word. If one is killed, the first to notice raises ConnectionError. May be nested.
        """
        global _together
        if self.world == 1 or _together:
            yield
            return
        world: Any = torch.distributed.group.WORLD
        store = world.get_group_store()
        done = threading.Event()
        watch = threading.Thread(target=_watch, args=(store, done), daemon=True)
        watch.start()
        _together = True
        try:
            yield
            self.barrier()
        except BaseException as error:
            atexit.unregister(leave)  # others may not answer any more
            if not self._fails_first(store):
                time.sleep(_LINGER)  # a launcher would end the one that reports when it sees another end
                os._exit(1)
            if self.device.type == "cuda":  # destroying a communicator would wait for the others
                torch.distributed.distributed_c10d._abort_process_group()
            error.rank = self.rank  # type: ignore[attr-defined]
            if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
                gone: Any = ConnectionError("another process of this run was killed")
                gone.rank = self.rank
                raise gone from error
            raise
        finally:
            _together = False
            done.set()
            watch.join(_LINGER)  # inside the store when Python ends, it would abort the process

    def _fails_first(self, store: torch.distributed.Store) -> bool:
        mine = str(self.rank)
        try:
            return store.compare_set(_KEY, "", mine).decode() == mine
        except RuntimeError:  # rank 0, which keeps the store, has gone
            return False


def leave() -> None:
    """End what joins the processes: where this is left to the end of Python, that aborts now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad.contiguous())


def _watch(store: Any, done: threading.Event) -> None:
    """End this process soon after another has failed, unless `done`."""
    own = None  # a connection made here: it waits for rank 0, which may have gone, for half an hour
    while not done.wait(_POLL):
        try:
            own = own or store.clone()
            failed = own.check([_KEY])
        except RuntimeError:
            failed = True
        if failed and not done.wait(_LINGER):
            os._exit(1)


def _buckets(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients in groups of one type and of at most `_BUCKET` elements, or of one tensor."""
    bucket: list[Tensor] = []
    size = 0
    for grad in (param.grad for param in params):
        if grad is None:
            continue
        if bucket and (size + grad.numel() > _BUCKET or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    if bucket:
        yield bucket
