"""The Any2Point classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from any2point.models.base import PointModel
from any2point.models.config import Any2PointConfig
from any2point.nn import (
    AdaptedEncoder,
    CellAttention,
    ClassificationHead,
    GuidedAdapter,
    Tokenizer,
    VirtualProjection,
    spread_lines,
    spread_rotations,
)
from any2point.nn.projection import official_rotations
from any2point.ops import group, voxel_cluster
from any2point.sources import Source


class Encoding(NamedTuple):
    """Features of a cloud.

    `tokens [B, T, C]` and their `centers [B, T, 3]` (points of the input), the class token `cls [B, C]`, and
    the pooled `feature [B, 2C]` that the head sees.
    """

    tokens: Tensor
    centers: Tensor
    cls: Tensor
    feature: Tensor


class Any2Point(PointModel):
    """A frozen transformer of any modality as a point cloud classifier.

    Args:
        config: the configuration; None fields are resolved for the source.
        source: the frozen transformer. Its final LayerNorm and class token start the model's trained ones.
        class_names: names of the logits.

    Example:
        >>> model = Any2Point(Any2PointConfig(num_classes=15), Source.random("clip-text"))
        >>> model(torch.rand(2, 1024, 3)).shape
        torch.Size([2, 15])
    """

    def __init__(
        self, config: Any2PointConfig, source: Source, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        if class_names is not None and len(class_names) != config.num_classes:
            raise ValueError(f"`class_names`: expected {config.num_classes} names, got {len(class_names)}")
        self.config = config = config.resolve(source)
        self.source_info = source
        self.class_names = None if class_names is None else list(class_names)
        width = source.width
        self.tokenizer = build_tokenizer(config, width)
        self.projection = _build_projection(config, source)
        self.cls_token = _start(source.cls_token, width)
        self.cls_position = _start(source.cls_position, width)
        self.encoder = _build_encoder(config, source, self.projection.num_cells)
        self.norm = nn.LayerNorm(width, config.final_norm_eps)  # type: ignore[arg-type]
        if "norm.weight" in source.tensors:
            with torch.no_grad():
                self.norm.weight.copy_(source.tensors["norm.weight"])
                self.norm.bias.copy_(source.tensors["norm.bias"])
        self.head = ClassificationHead(
            2 * width,
            config.num_classes,
            hidden=config.head_width,
            dropout=config.dropout,
            bias=config.head_bias,
        )
        for module in (self.encoder.adapters, self.head):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def embed(self, points: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Everything before the first block.

        Returns:
            Sequence `[B, 1 + T, C]` and its position encodings, cells `[B, V, T]`, voxels `[B, T]`, and the
            points `[B, T]` that the tokens are centred on.
        """
        coordinates = self.prepare(points)
        tokens = self.tokenizer(coordinates)
        projected = self.projection(tokens.centers)
        cluster = voxel_cluster(tokens.centers, self.config.voxel_size).cluster
        batch, dtype = len(points), self.cls_token.dtype
        x = torch.cat([self.cls_token.expand(batch, -1, -1), tokens.features.to(dtype)], dim=1)
        encoding = projected.encoding.to(dtype)
        position = torch.cat([self.cls_position.expand(batch, -1, -1), encoding], dim=1)
        return x, position, projected.cell, cluster, tokens.index

    def encode(self, points: Tensor) -> Encoding:
        """`points [B, N, 3]` -> features of every token and of the cloud."""
        x, position, cell, cluster, index = self.embed(points)
        x = self.norm(self.encoder(x, position, cell, cluster))
        cls, tokens = x[:, 0], x[:, 1:]
        largest = tokens.amax(1)
        pair = [largest, cls] if self.config.feature_order == "max_cls" else [cls, largest]
        return Encoding(tokens, group(points, index), cls, torch.cat(pair, dim=-1))

    def forward(self, points: Tensor) -> Tensor:
        """`points [B, N, 3]` -> logits `[B, num_classes]`."""
        return self.head(self.encode(points).feature)

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, as the paper counts them."""
        if name.startswith("encoder.source."):
            return "source"
        if name.startswith("encoder.attention."):
            return "attention in cells"
        if name.startswith("encoder.adapters."):
            kind = name.split(".")[3]
            return {"adapter": "adapters", "view_norm": "view norms", "space_norm": "voxel norms"}[kind]
        return {"cls_token": "class token", "cls_position": "class token", "norm": "final norm"}.get(
            name.split(".")[0], name.split(".")[0]
        )

    def save_pretrained(self, directory: str | Path, *, include_source: bool = False) -> None:
        """Write `config.json` and `model.safetensors` (trained tensors and statistics), each atomically.

        Args:
            directory: made if missing.
            include_source: also write the frozen transformer, as `source.safetensors`; otherwise the
                configuration records where it came from, and its fingerprint.
        """
        from any2point.models.hub import save

        save(self, Path(directory), include_source=include_source)

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, source: Source | str | Path | None = None, *, revision: str | None = None
    ) -> Any2Point:
        """Read what `save_pretrained` wrote, from a folder or (with huggingface_hub) from a hub repository.

        Args:
            directory: folder or repository id.
            source: the frozen transformer or its path, where it was neither saved nor can be had again from
                its seed or recorded path.
            revision: of the hub repository.

        Raises:
            ValueError: a file is missing, truncated or foreign, or the source is not the one trained with.
        """
        from any2point.models.hub import load

        return load(cls, directory, source, revision=revision)

    def push_to_hub(self, repo_id: str, *, include_source: bool = False, private: bool | None = None) -> str:
        """Upload what `save_pretrained` writes to a hub repository; returns its address."""
        from any2point.models.hub import push

        return push(self, repo_id, include_source=include_source, private=private)

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Any],
        variant: str = "clip-text/scanobjectnn",
        *,
        position_table: Any,
        **options: Any,
    ) -> Any2Point:
        """A model with `parity="official"` from the weights of the official code.

        Args:
            state_dict: parameters and buffers under their official names, or a checkpoint that holds them.
            variant: one of `any2point.models.official.VARIANTS`.
            position_table: the position table, which the official code reads from the pretraining checkpoint:
                `positional_embedding [77, C]`, `pos_embed [1, 1370, C]` or ImageBind's `[1, 229, C]`.
            options: configuration fields that differ from the variant's.
        """
        from any2point.models.official import load_official

        return load_official(cls, state_dict, variant, position_table, options)

    @property
    def frozen_names(self) -> set[str]:
        """Names in `state_dict()` of what belongs to the source: its blocks and its position table."""
        names = {f"encoder.source.{name}" for name in self.encoder.source.state_dict()}
        return names | {"projection.table", "projection.views"}


def build_tokenizer(config: Any2PointConfig, width: int) -> Tokenizer:
    """The tokenizer whose tokens have `width` channels."""
    return Tokenizer(
        width // 2 ** len(config.tokenizer_units),
        config.sizes,
        config.counts,
        units=config.tokenizer_units,
        last_hidden=config.tokenizer_hidden,
        normalize=config.normalize,
        guard=bool(config.guard),
        start=str(config.fps_start),
        tie=config.fps_tie,  # type: ignore[arg-type]
    )


def _start(value: Tensor | None, width: int) -> nn.Parameter:
    start = 0.02 * torch.randn(width) if value is None else value.clone()
    return nn.Parameter(start.view(1, 1, width))


def _build_projection(config: Any2PointConfig, source: Source) -> VirtualProjection:
    table = source.position_table
    if table.dim() == 3:
        if config.table_grid is not None:
            table = table.flatten(0, 1).unflatten(0, config.table_grid)
        views = spread_rotations(config.views)
    elif config.lines is not None:
        views = torch.tensor(config.lines)
    elif config.permuted_lines:
        views = official_rotations() @ torch.tensor(config.line_direction)
    else:
        views = spread_lines(config.views)
    return VirtualProjection(
        table.clone(),
        views,
        cell=config.cell,  # type: ignore[arg-type]
        size=config.position_size,
        camera=config.camera,
        wrap=bool(config.wrap),
        scramble=bool(config.scramble),
    )


def _build_encoder(config: Any2PointConfig, source: Source, num_cells: int) -> AdaptedEncoder:
    layout = dataclasses.replace(source.layout, eps=config.norm_eps)  # type: ignore[arg-type]
    frozen = dataclasses.replace(source, layout=layout).encoder()
    rates = torch.linspace(0, config.drop_path, source.depth).tolist()
    adapters = [
        GuidedAdapter(
            source.width,
            config.adapter_dim,
            config.views,
            scale=config.scale_factor,
            dropout=config.adapter_dropout,
            coefficient=config.coef_pro,
            pooling=config.pooling,
            num_cells=num_cells,
            count_empty=bool(config.count_empty),
            norm_eps=config.norm_eps,  # type: ignore[arg-type]
            path_rate=rate,
            path_rows=bool(config.drop_path_rows),
        )
        for rate in rates
    ]
    attention = CellAttention(source.width, config.attention_dim, config.attention_heads, config.views)
    return AdaptedEncoder(
        frozen,
        adapters,
        attention,
        position_adds=str(config.position_adds),
        axis=str(config.attention_axis),
        causal=config.causal,
        dropout=config.attention_dropout,
        path_rates=rates,
    )
