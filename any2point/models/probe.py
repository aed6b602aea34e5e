"""Control: the tokenizer alone with a linear head, that is, the model without its transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from any2point.models.base import PointModel
from any2point.models.build import build_tokenizer
from any2point.models.checks import check_names
from any2point.models.config import Any2PointConfig
from any2point.nn import Neighborhoods


class TokenizerProbe(PointModel):
    """Tokenizer, maximum and mean over tokens, one linear layer: what a model gets without any transformer.

    Args:
        config: configuration; only the fields of the tokenizer and `num_classes` play a part.
        width: channels of the tokens.
        class_names: names of the logits.
    """

    def __init__(self, config: Any2PointConfig, width: int, class_names: Sequence[str] | None = None) -> None:
        super().__init__()
        self.config = config = config.resolve_common()
        self.class_names = check_names(class_names, config.num_classes)
        self.tokenizer = build_tokenizer(config, width)
        if self.tokenizer.width != width:
            parts = 2 ** len(config.tokenizer_units)
            raise ValueError(f"`width`: expected a multiple of {parts}, got {width}")
        self.head = nn.Linear(2 * width, config.num_classes)

    def forward(
        self,
        points: Tensor,
        features: Tensor | None = None,
        lengths: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
    ) -> Tensor:
        """`points [B, N, 3]` (and as `prepare` says) -> logits `[B, num_classes]`."""
        tokens = self.tokenizer(*self.prepare(points, features, lengths), neighborhoods).features
        return self.head(torch.cat([tokens.amax(1), tokens.mean(1)], dim=-1))
