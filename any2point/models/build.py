"""The parts of a model from its configuration and its source."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from any2point.models.config import Any2PointConfig
from any2point.nn import (
    AdaptedEncoder,
    CellAttention,
    ClassificationHead,
    GuidedAdapter,
    PointNetTokenizer,
    Tokenizer,
    VirtualProjection,
    euler_rotations,
    given_lines,
    spread_lines,
    spread_rotations,
)
from any2point.nn.views import official_rotations
from any2point.sources import Source


def build_tokenizer(config: Any2PointConfig, width: int) -> Tokenizer | PointNetTokenizer:
    """The tokenizer whose tokens have `width` channels."""
    common: dict[str, Any] = {
        "start": config.fps_start,
        "tie": config.fps_tie,
        "features": config.input_features,
        "checkpointing": config.checkpointing,
    }
    if config.tokenizer == "pointnet":
        hidden = 128 if config.tokenizer_width is None else config.tokenizer_width
        return PointNetTokenizer(width, config.num_tokens, config.counts[0], hidden=hidden, **common)
    return Tokenizer(
        width // 2 ** len(config.tokenizer_units),
        config.sizes,
        config.counts,
        units=config.tokenizer_units,
        last_hidden=config.tokenizer_hidden,
        normalize=config.normalize,
        guard=bool(config.guard),
        **common,
    )


def start_token(value: Tensor | None, width: int) -> nn.Parameter:
    """A trained token `[1, 1, C]` that starts from the source's, or at random."""
    start = 0.02 * torch.randn(width) if value is None else value.clone()
    return nn.Parameter(start.view(1, 1, width))


def build_projection(config: Any2PointConfig, source: Source) -> VirtualProjection:
    """The virtual projection onto the source's position table."""
    table = source.position_table
    if table.dim() == 3:
        if config.table_grid is not None:
            table = table.flatten(0, 1).unflatten(0, config.table_grid)
        given = config.rotations is not None
        views = euler_rotations(config.rotations) if given else spread_rotations(config.views)  # type: ignore[arg-type]
    elif config.lines is not None:
        views = given_lines(config.lines)
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
        trained=config.tuning == "full" and config.positions == "virtual",
    )


def build_encoder(config: Any2PointConfig, source: Source, num_cells: int) -> AdaptedEncoder:
    """The source's blocks with what is trained inside them."""
    bias_kv = source.layout.bias_kv and bool(config.bias_kv)
    layout = dataclasses.replace(source.layout, eps=config.norm_eps, bias_kv=bias_kv)  # type: ignore[arg-type]
    source = dataclasses.replace(source, layout=layout)
    frozen = source.encoder(torch.bfloat16 if config.source_dtype == "bfloat16" else None)
    if config.tuning == "full":
        frozen.unfreeze()
    blocks = range(source.depth) if config.adapter_blocks is None else config.adapter_blocks
    rates = torch.linspace(0, config.drop_path, source.depth).tolist()
    adapters = [
        GuidedAdapter(
            source.width,
            config.adapter_dim,
            config.views,
            kind=str(config.adapter) if index in blocks else "none",
            scale=config.scale_factor,
            dropout=config.adapter_dropout,
            coefficient=config.coef_pro,
            pooling=config.pooling,
            ensemble=config.ensemble,
            num_cells=num_cells,
            count_empty=bool(config.count_empty),
            norm_eps=config.norm_eps,  # type: ignore[arg-type]
            path_rate=rate,
            path_rows=bool(config.drop_path_rows),
        )
        for index, rate in enumerate(rates)
    ]
    attention = None
    if config.adapter in ("both", "aggregate"):
        attention = CellAttention(source.width, config.attention_dim, config.attention_heads, config.views)
    return AdaptedEncoder(
        frozen,
        adapters,
        attention,
        position_adds=str(config.position_adds),
        insertion=config.insertion,
        prefix=1 if source.registers is None else 1 + len(source.registers),
        axis=str(config.attention_axis),
        causal=config.causal,
        dropout=config.attention_dropout,
        path_rates=rates,
        checkpointing=config.checkpointing,
    )


def build_head(config: Any2PointConfig, width: int) -> nn.Module:
    """The classifier of features `[B, width]`: one linear layer for a probe."""
    if config.tuning == "probe":
        return nn.Linear(width, config.num_classes)
    return ClassificationHead(
        width,
        config.num_classes,
        hidden=config.head_width,
        dropout=config.dropout,
        bias=config.head_bias,
    )
