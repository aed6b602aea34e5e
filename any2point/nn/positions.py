"""Position encodings that know nothing of the source modality: controls for the virtual projection."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from any2point.reference.local_aggregate import encode_offsets


class LearnedPositions(nn.Sequential):
    """A trained function of the centre, as in Point-BERT: two linear layers with a GELU between them.

    It depends on where a token is, not on its number, so the order of the tokens does not matter.

    Args:
        width: channels C of the tokens.
        hidden: width between the layers.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__(nn.Linear(3, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, centers: Tensor) -> Tensor:
        """`centers [B, T, 3]` -> `[B, T, C]`."""
        return super().forward(centers.to(self[2].bias.dtype))  # type: ignore[arg-type]


class SinusoidalPositions(nn.Module):
    """Sines and cosines of the centre's coordinates, as the tokenizer encodes offsets; nothing is trained.

    Args:
        width: channels C of the tokens; those beyond the last multiple of 6 are zero.
        amplitude: root mean square of the encodings. That of the source's position table adds them at the
            strength that the frozen blocks are used to.
    """

    def __init__(self, width: int, amplitude: float) -> None:
        super().__init__()
        self.width, self.amplitude = width, amplitude

    def forward(self, centers: Tensor) -> Tensor:
        """`centers [B, T, 3]` -> `[B, T, C]`."""
        return math.sqrt(2) * self.amplitude * encode_offsets(centers, self.width)


class NoPositions(nn.Module):
    """Zeros in place of position encodings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, centers: Tensor) -> Tensor:
        """`centers [B, T, 3]` -> zeros `[B, T, C]`."""
        return torch.zeros(*centers.shape[:2], self.width, dtype=centers.dtype, device=centers.device)


def build_positions(kind: str, table: Tensor) -> nn.Module | None:
    """The module for a kind of encodings: "none", "learned" or "sinusoidal"; None for "virtual".

    Args:
        kind: as above.
        table: the source's position table `[..., C]`.
    """
    width = table.shape[-1]
    if kind == "learned":
        return LearnedPositions(width)
    if kind == "sinusoidal":
        return SinusoidalPositions(width, float(table.float().square().mean().sqrt()))
    return NoPositions(width) if kind == "none" else None
