"""What every trainable model of the package offers: its parameters sorted, its input checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from any2point.models.config import Any2PointConfig
from any2point.models.summary import Summary, count_parameters
from any2point.nn.tokenizer import Neighborhoods, PointNetTokenizer, Tokenizer
from any2point.ops._checks import check_clouds
from any2point.sources.glue import in_kernels

# Coordinates are clamped to this, and to as many voxels, after centring: squared distances stay finite and
# voxels can be numbered in 32 bits.
_LIMIT = 1e9


class PointModel(nn.Module):
    """Base of `Any2Point` and its controls; `class_names` names the logits, if known."""

    config: Any2PointConfig
    class_names: list[str] | None
    tokenizer: Tokenizer | PointNetTokenizer

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained."""
        return [p for p in self.parameters() if p.requires_grad]

    def parameter_groups(self, weight_decay: float = 0.05) -> list[dict[str, Any]]:
        """Trained parameters for an optimiser: weights decayed; biases and normalisations not.

        As officially, the class token and its position are decayed too (the token unless `config.cls_decay`
        is off). Of a source that is tuned in full, its position table and registers are not.
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            leaf = name.rsplit(".", 1)[-1]
            undecayed = parameter.dim() < 2 or leaf.endswith("bias") or "norm" in name
            undecayed = undecayed or (name == "cls_token" and not self.config.cls_decay)
            undecayed = undecayed or name in ("projection.table", "registers")  # in full fine-tuning
            (plain if undecayed else decayed).append(parameter)
        return [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the part of the model they belong to."""
        parts: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            parts.setdefault(self.part_of(name), []).append(parameter)
        return parts

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to."""
        return name.split(".", 1)[0]

    def summary(self) -> Summary:
        """Counts of trained and frozen parameters by part."""
        return count_parameters(self.parts())

    def neighborhoods(
        self, points: Tensor, features: Tensor | None = None, lengths: Tensor | None = None
    ) -> Neighborhoods:
        """Samples and neighbours of a batch, which follow from its coordinates; arguments as in `prepare`.

        `forward` takes them, so that they can be had while the step before runs: `any2point.data.prefetch`.
        """
        return self.tokenizer.neighborhoods(self.prepare(points, features, lengths)[0])

    def prepare(
        self, points: Tensor, features: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Check a batch of clouds and bring it to the coordinates that the network works in.

        Args:
            points: `[B, N, 3]` floating point; float16 and bfloat16 are widened. Points with a NaN or
                infinite coordinate or feature are left out, as if they were not there.
            features: `[B, N, F]` floating point with F = `config.input_features`; None for F = 0.
            lengths: `[B]` int64, how many points each cloud has; rows beyond are left out, whatever they
                hold. By default N. A cloud with fewer points than the first stage of the tokenizer picks
                has some of its tokens several times. One without any has tokens of zeros.

        Returns:
            `[B, N, 3]` float32 or float64, centred if `config.center`, NaN for points that are left out;
            and the features.
        """
        if not isinstance(points, Tensor) or not points.is_floating_point():
            got = points.dtype if isinstance(points, Tensor) else type(points).__name__
            raise TypeError(f"`points`: expected a floating point tensor [B, N, 3], got {got}")
        if points.layout != torch.strided:
            raise TypeError(f"`points`: expected a dense tensor [B, N, 3], got {points.layout}")
        if points.dim() != 3 or points.shape[-1] != 3 or points.shape[0] == 0:
            raise ValueError(f"`points`: expected shape [B, N, 3] with B > 0, got {list(points.shape)}")
        device = next(self.parameters()).device
        if points.device != device:
            raise ValueError(f"`points`: expected a tensor on {device}, as the model is, got {points.device}")
        needed = max(self.config.sizes[0], self.config.counts[0])
        if points.shape[1] < needed:
            raise ValueError(
                f"`points`: expected at least {needed} points per cloud (the first stage's centres and "
                f"neighbours), got {points.shape[1]}"
            )
        self._check_features(features, points)
        dtype = torch.float64 if points.dtype == torch.float64 else torch.float32
        limit = _LIMIT * min(1.0, self.config.voxel_size)
        constant = lengths is None and not (torch.is_grad_enabled() and points.requires_grad)
        if constant and dtype == torch.float32 and in_kernels(points):
            from any2point.triton.clouds import prepare

            return prepare(points, features, limit, center=bool(self.config.center)), features
        valid = points.isfinite().all(-1, keepdim=True)
        if features is not None:
            valid = valid & features.isfinite().all(-1, keepdim=True)
        if lengths is not None:
            counts = check_clouds(points, lengths).lengths
            assert counts is not None
            valid = valid & (torch.arange(points.shape[1], device=device) < counts[:, None])[..., None]
        if self.config.center:
            # In float64 the mean does not depend on the order of the points, to float32 rounding.
            wide = points.to(torch.float64)
            total = torch.where(valid, wide, 0.0).sum(1, keepdim=True)
            points = (wide - total / valid.sum(1, keepdim=True).clamp(min=1)).clamp(-limit, limit)
        return torch.where(valid, points, torch.nan).to(dtype), features

    def _check_features(self, features: Tensor | None, points: Tensor) -> None:
        expected = [points.shape[0], points.shape[1], self.config.input_features]
        if features is None:
            if expected[2]:
                raise ValueError(f"`features`: expected a tensor {expected} (`input_features`), got None")
            return
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = features.dtype if isinstance(features, Tensor) else type(features).__name__
            raise TypeError(f"`features`: expected a floating point tensor {expected}, got {got}")
        if list(features.shape) != expected or not expected[2]:
            text = expected if expected[2] else "None (`input_features` is 0)"
            raise ValueError(f"`features`: expected {text}, got shape {list(features.shape)}")
        if features.device != points.device:
            raise ValueError(f"`features`: expected a tensor on {points.device}, got {features.device}")
