"""Classification head."""

from __future__ import annotations

from torch import Tensor, nn

from any2point.nn.batch_norm import BatchNorm1d


class ClassificationHead(nn.Sequential):
    """Two hidden layers with batch normalisation, ReLU, dropout; then logits: `[B, F]` -> `[B, classes]`."""

    def __init__(
        self, features: int, classes: int, *, hidden: int = 256, dropout: float = 0.5, bias: bool = False
    ) -> None:
        super().__init__(
            nn.Linear(features, hidden, bias=bias),
            BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden, bias=bias),
            BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
