"""The next batch while the GPU works on this one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], device: torch.device | str) -> Iterator[Item]:
    """Make each item on a stream of its own, while the work queued for the item before still runs.

    What the making launches on the device (copies, augmentation, `model.neighborhoods`) overlaps with the
    training step. It must not depend on that step's results. On a CPU the items pass through.

    Args:
        items: tensors, or tuples and lists of them; made when asked for, as a generator makes them.
        device: the device that they are on, or go to.

    Yields:
        The items, ready for use in the stream that is current where they are asked for.

    Example:
        >>> def batches():
        ...     for points, labels in loader:
        ...         points = points.cuda(non_blocking=True)
        ...         yield points, labels.cuda(), model.neighborhoods(points)
        >>> for points, labels, neighborhoods in prefetch(batches(), "cuda"):
        ...     logits = model(points, neighborhoods=neighborhoods)
    """
    device = torch.device(device)
    if device.type != "cuda":
        yield from items
        return
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))  # which may still write what the items are made from
    iterator = iter(items)
    while True:
        with torch.cuda.stream(side):
            try:
                item = next(iterator)
            except StopIteration:
                return
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)
        for tensor in _tensors(item):
            if tensor.is_cuda:
                tensor.record_stream(main)
        yield item


def _tensors(item: object) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from _tensors(part)
