"""The Any2Point classifier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from any2point.models.base import PointModel
from any2point.models.build import (
    build_encoder,
    build_head,
    build_projection,
    build_tokenizer,
    start_token,
)
from any2point.models.checks import check_names
from any2point.models.config import Any2PointConfig
from any2point.nn import Neighborhoods
from any2point.nn.beside import Beside
from any2point.nn.positions import build_positions
from any2point.nn.stacked import is_stacked, run_stacked
from any2point.ops import GuidedPlan, group, voxel_cluster
from any2point.sources import Source
from any2point.sources.glue import is_hooked


class Encoding(NamedTuple):
    """Features of a cloud.

    `tokens [B, T, C]` and their `centers [B, T, 3]` (points of the input), the class token `cls [B, C]`, and
    the pooled `feature [B, 2C]` that the head sees. If asked for, `attention [B, L, H, T]`: the weights that
    the class token gives to the tokens in each of the L frozen blocks, by head. What a row lacks to 1 went to
    the class token itself, to registers, and to keys that the source's blocks have of their own.
    """

    tokens: Tensor
    centers: Tensor
    cls: Tensor
    feature: Tensor
    attention: Tensor | None = None


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
        for name, value, kind in (("config", config, Any2PointConfig), ("source", source, Source)):
            if not isinstance(value, kind):
                raise TypeError(f"`{name}`: expected {kind.__name__}, got {type(value).__name__}")
        self.config = config = config.resolve(source)
        self.source_info = source
        self.class_names = check_names(class_names, config.num_classes)
        width = source.width
        self.tokenizer = build_tokenizer(config, width)
        self.projection = build_projection(config, source)
        self.positions = build_positions(config.positions, source.position_table)
        self.cls_token = start_token(source.cls_token, width)
        self.cls_position = start_token(source.cls_position, width)
        self.registers = self._registers(source.registers)
        self.encoder = build_encoder(config, source, self.projection.num_cells)
        self.norm = nn.LayerNorm(width, config.final_norm_eps)  # type: ignore[arg-type]
        if "norm.weight" in source.tensors:
            with torch.no_grad():
                self.norm.weight.copy_(source.tensors["norm.weight"])
                self.norm.bias.copy_(source.tensors["norm.bias"])
        self.head = build_head(config, 2 * width)
        for module in (self.encoder.adapters, self.head):
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    nn.init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)
        if config.tuning == "probe":
            for parameter in (self.cls_token, self.cls_position, *self.norm.parameters()):
                parameter.requires_grad_(False)

    def _registers(self, value: Tensor | None) -> Tensor | None:
        if value is not None and self.config.tuning == "full":
            return nn.Parameter(value.clone())
        # A buffer only where there are some, so that saved models of other sources keep their names.
        if value is not None:
            self.register_buffer("registers", value.clone())
            return self.registers
        return None

    def embed(
        self,
        points: Tensor,
        features: Tensor | None = None,
        lengths: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Everything before the first block; arguments as in `encode`.

        Returns:
            Sequence `[B, 1 + R + T, C]` (class token, registers, tokens) and its position encodings, cells
            `[B, V, T]`, voxels `[B, T]`, and the points `[B, T]` that the tokens are centred on.
        """
        parts, cell, cluster, _, index = self._start(points, features, lengths, neighborhoods)
        return torch.cat(parts[:2], dim=1), torch.cat(parts[2:], dim=1), cell, cluster, index

    def _start(
        self,
        points: Tensor,
        features: Tensor | None,
        lengths: Tensor | None,
        neighborhoods: Neighborhoods | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor, Tensor, GuidedPlan | None, Tensor]:
        """As `embed`; the first is class token with registers, tokens, and the positions of both.

        Before the points comes what the guided aggregations share, if it needs no gradient.
        """
        cloud, features = self.prepare(points, features, lengths)
        with Beside(cloud, self.projection.table) as beside:
            near = neighborhoods or self.tokenizer.neighborhoods(cloud, beside)
            centers = group(cloud, near.index)
            projected = self.projection(centers)
            cluster = voxel_cluster(centers, self.config.voxel_size).cluster
            plan = None
            if not torch.is_grad_enabled():
                plan = self.encoder.plan(self.cls_token, projected.cell, cluster)
        tokens = self.tokenizer(cloud, features, near, None if neighborhoods else beside)
        beside.wait()
        encoding = projected.encoding if self.positions is None else self.positions(tokens.centers)
        dtype = self.cls_token.dtype
        first: list[Tensor] = [self.cls_token, self.cls_position]
        if self.registers is not None:  # with their positions in them
            registers = self.registers.to(dtype)[None]
            both = registers, torch.zeros_like(registers)
            first = [torch.cat(pair, dim=1) for pair in zip(first, both)]
        prefix, position = (each.expand(points.shape[0], -1, -1) for each in first)
        parts = prefix, tokens.features.to(dtype), position, encoding.to(dtype)
        return parts, projected.cell, cluster, plan, tokens.index

    def encode(
        self,
        points: Tensor,
        features: Tensor | None = None,
        lengths: Tensor | None = None,
        attention: bool = False,
        neighborhoods: Neighborhoods | None = None,
    ) -> Encoding:
        """Features of every token and of the cloud, for use as a 3D tower in other models.

        Args:
            points: `[B, N, 3]`, see `prepare`, also for the two that follow.
            features: `[B, N, F]` with F = `config.input_features`.
            lengths: `[B]` points of each cloud.
            attention: also return the attention of the class token, which is computed beside the blocks.
            neighborhoods: what `neighborhoods` gives for the same batch, if it is there already.

        Raises:
            ValueError: attention of a model whose class token does not attend to the tokens of its cloud
                (`attention_axis` "batch", or `causal`).
        """
        config = self.config
        if attention and (config.attention_axis == "batch" or config.causal):
            got = f"attention_axis={config.attention_axis!r} and causal={config.causal}"
            raise ValueError(f"`attention`: expected a class token that attends to its tokens, got {got}")
        start = self._start(points, features, lengths, neighborhoods)
        return self._finish(points, *start, [] if attention else None)

    def _finish(
        self,
        points: Tensor,
        parts: tuple[Tensor, ...],
        cell: Tensor,
        cluster: Tensor,
        plan: GuidedPlan | None,
        index: Tensor,
        maps: list[Tensor] | None = None,
    ) -> Encoding:
        """`encode` of what `_start` gave; `maps` as for the encoder."""
        x, position = torch.cat(parts[:2], dim=1), torch.cat(parts[2:], dim=1)
        x = self.norm(self.encoder(x, position, cell, cluster, maps, plan))
        cls, tokens = x[:, 0], x[:, self.encoder.prefix :]
        largest = tokens.amax(1)
        pair = [largest, cls] if self.config.feature_order == "max_cls" else [cls, largest]
        weights = None if maps is None else torch.stack(maps, dim=1)
        return Encoding(tokens, group(points, index), cls, torch.cat(pair, dim=-1), weights)

    def forward(
        self,
        points: Tensor,
        features: Tensor | None = None,
        lengths: Tensor | None = None,
        neighborhoods: Neighborhoods | None = None,
    ) -> Tensor:
        """`points [B, N, 3]` (and features `[B, N, F]`, lengths `[B]`) -> logits `[B, num_classes]`."""
        start = self._start(points, features, lengths, neighborhoods)
        if not is_stacked(self.encoder, start[0][1]) or is_hooked(self.norm):
            return self.head(self._finish(points, *start).feature)
        from any2point.triton.pool import Pool

        prefix, tokens = run_stacked(self.encoder, *start[0], *start[1:4])
        cls_first = self.config.feature_order == "cls_max"
        norm = self.norm
        return self.head(Pool.apply(prefix, tokens, norm.weight, norm.bias, norm.eps, cls_first))

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, as the paper counts them."""
        if name.startswith("encoder.source.") or name == "registers":
            return "source"
        if name.startswith("encoder.attention."):
            return "attention in cells"
        if name.startswith("encoder.adapters."):
            kind = name.split(".")[3]
            return {"adapter": "adapters", "view_norm": "view norms", "space_norm": "voxel norms"}[kind]
        names = {"cls_token": "class token", "cls_position": "class token", "norm": "final norm"}
        names["projection"] = "position table"
        return names.get(name.split(".")[0], name.split(".")[0])

    def save_pretrained(self, directory: str | Path, *, include_source: bool = False) -> None:
        """Write `config.json` and `model.safetensors` (trained tensors and statistics), each atomically.

        Args:
            directory: made if missing.
            include_source: also write the frozen transformer, as `source.safetensors`; otherwise the
                configuration records where it came from, and its fingerprint. Of a source that was tuned in
                full (`tuning`), the tuned weights are always written, to `model.safetensors`.
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
                its seed or recorded path. Not used for a model with `tuning` "full", whose folder holds all.
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
        variant: str | None = None,
        *,
        position_table: Any,
        **options: Any,
    ) -> Any2Point:
        """A model with `parity="official"` from the weights of the official code.

        Args:
            state_dict: parameters and buffers under their official names, or a checkpoint that holds them.
            variant: one of `any2point.models.official.VARIANTS`; by default what the names say.
            position_table: the position table, which the official code reads from the pretraining checkpoint:
                `positional_embedding [77, C]`, `pos_embed [1, 1370, C]` or ImageBind's `[1, 229, C]`, or the
                table of a `Source`.
            options: configuration fields that differ from the variant's.

        Raises:
            ValueError: the names are not those of one variant, or a tensor is missing or of another shape.
        """
        from any2point.models.official import load_official

        return load_official(cls, state_dict, variant, position_table, options)

    def to_official(self, variant: str | None = None) -> dict[str, Any]:
        """A checkpoint of the official code, for `torch.save`; the inverse of `from_official`.

        Args:
            variant: one of `any2point.models.official.VARIANTS`; by default the one whose options these are.

        Returns:
            What the official loaders take: a dictionary with `model` (ScanObjectNN) or, with "module." before
            every name, `base_model` (ModelNet40). The optimiser's state is empty. The counters of batches,
            which play no part, are all that of the head.

        Raises:
            ValueError: naming the options in which the model differs from every variant.
        """
        from any2point.models.official import save_official

        return save_official(self, variant)

    @property
    def frozen_names(self) -> set[str]:
        """Names in `state_dict()` of what is not saved: what belongs to the source, unless tuned in full."""
        if self.config.tuning == "full":
            return {"projection.views"}
        names = {f"encoder.source.{name}" for name in self.encoder.source.state_dict()}
        names |= {"projection.table", "projection.views"}
        return names if self.registers is None else names | {"registers"}
