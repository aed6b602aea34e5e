"""Memory of a GPU that is full of NaN: what reads numbers that nobody wrote shows."""

from __future__ import annotations

import torch


def poison() -> None:
    """Fresh memory holds NaN, in small pieces as in large ones."""
    sizes = [1 << 9] * 512 + [1 << 14] * 128 + [1 << 19] * 16 + [1 << 23] * 4 + [1 << 28]
    for piece in [torch.empty(size, dtype=torch.uint8, device="cuda") for size in sizes]:
        piece.fill_(255)
