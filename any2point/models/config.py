"""Everything that defines a model apart from its source; every quirk of the official code is an option."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from any2point.nn.tokenizer import stage_sizes
from any2point.sources import Source

# Field -> value that reproduces the official code, whatever the source. The remaining quirks depend on it.
_OFFICIAL: dict[str, Any] = {
    "center": False,
    "fps_start": "first",
    "fps_tie": "pointnet2",
    "guard": False,
    "wrap": True,
    "count_empty": True,
    "drop_path_rows": True,
}
_DEFAULT: dict[str, Any] = {
    "center": True,
    "fps_start": "farthest",
    "fps_tie": "lowest",
    "guard": True,
    "wrap": False,
    "count_empty": False,
    "drop_path_rows": False,
}


@dataclass(frozen=True)
class Any2PointConfig:
    """Configuration of an `Any2Point` model.

    Fields that are None take a value when the model is built, from `parity` and the source (`resolve`).

    Attributes:
        num_classes: logits.
        num_points: points per cloud, from which the stages of the tokenizer are derived. Clouds of another
            size are accepted as long as they have the points that the first stage picks.
        num_tokens: tokens per cloud, T.
        neighbors: K of the nearest neighbours, one for all stages or one each.
        stage_sizes: centres per stage; a geometric progression from num_points to num_tokens by default.
        tokenizer_width: channels of the first embedding; the source's width / 8, or None for that.
        tokenizer_units: residual units per stage.
        tokenizer_hidden: bottleneck of the last stage.
        normalize: how offsets of neighbours are normalised: "scan" or "mn40".
        views: number of lines or images, V.
        lines: directions of the lines, V triples, instead of evenly spread ones.
        cell: edge of a cell in positions; 2/77 of a line or 26/518 of an image's side by default.
        position_size: extent of the positions, `(length,)` or `(height, width)`; by default the table's.
        voxel_size: edge of the voxels that guide the aggregation, in units of the coordinates.
        adapter_dim: bottleneck of the adapters.
        adapter_dropout: in the adapters.
        scale_factor: factor on the adapters.
        coef_pro: factor on the guided aggregation.
        attention_dim: inner width of the attention in cells.
        attention_heads: its heads.
        pooling: of tokens in a cell: "mean" or "max+mean".
        feature_order: of the pooled feature: "max_cls" or "cls_max".
        head_width: hidden width of the classification head.
        head_bias: whether its hidden layers have biases.
        dropout: in the classification head.
        drop_path: highest rate of dropped branches; grows linearly over the blocks.
        attention_dropout: on the frozen attention's weights when training.
        causal: mask later tokens in the frozen attention.
        norm_eps: of the frozen LayerNorms; the source's own by default.
        final_norm_eps: of the final, trained LayerNorm; the source's own by default.
        cls_decay: whether the class token is decayed by the optimiser.
        parity: None, or "official" to turn on every quirk of the official code that follows.
        center: subtract each cloud's mean, so that a translation does not matter. Official: False.
        fps_start: first centre: "farthest" point from the mean, so that the order of the points does not
            matter. Official: "first" in the array.
        fps_tie: "lowest" index; official: "pointnet2" (tree order of ties, points near the origin skipped).
        guard: guard the normalisation of neighbourhoods against 0/0, and take the standard deviation per
            cloud. Official: False: NaN for flat neighbourhoods, one standard deviation for the batch.
        attention_axis: "tokens" of a cloud; official for CLIP text: the "batch".
        wrap: official: coordinates wrap around (lines: `(77 t - 1/2) mod 77`, with the table read over the
            range of the whole batch; images: modulo the image) instead of ending at the ends.
        permuted_lines: official: the direction `line_direction` under six axis permutations (of which only
            four or six are distinct lines) instead of evenly spread lines.
        line_direction: the one direction of `permuted_lines`.
        camera: distance of a fixed camera; None places it for the whole cloud to be in view. Official: fixed.
        scramble: official for images: position encodings stored channels first and read as tokens first.
        table_grid: shape that an image table is read as, where official and true layout differ (ImageBind).
        position_adds: how often position encodings are added: "once", "every" block, or "both".
        count_empty: official: empty cells enter batch normalisation as rows of zeros.
        drop_path_rows: official: paths in the guided aggregation are dropped per token instead of per cloud.
    """

    num_classes: int = 15
    num_points: int = 1024
    num_tokens: int = 128
    neighbors: int | tuple[int, ...] = 64
    stage_sizes: tuple[int, ...] | None = None
    tokenizer_width: int | None = None
    tokenizer_units: tuple[int, ...] = (2, 1, 1)
    tokenizer_hidden: int = 32
    normalize: str = "scan"
    views: int = 6
    lines: tuple[tuple[float, float, float], ...] | None = None
    cell: float | None = None
    position_size: tuple[int, ...] | None = None
    voxel_size: float = 0.16
    adapter_dim: int = 16
    adapter_dropout: float = 0.1
    scale_factor: float = 0.3
    coef_pro: float = 0.3
    attention_dim: int = 12
    attention_heads: int = 6
    pooling: str = "mean"
    feature_order: str = "max_cls"
    head_width: int = 256
    head_bias: bool = False
    dropout: float = 0.5
    drop_path: float = 0.0
    attention_dropout: float = 0.0
    causal: bool = False
    norm_eps: float | None = None
    final_norm_eps: float | None = None
    cls_decay: bool = True

    parity: str | None = None
    center: bool | None = None
    fps_start: str | None = None
    fps_tie: str | None = None
    guard: bool | None = None
    attention_axis: str | None = None
    wrap: bool | None = None
    permuted_lines: bool | None = None
    line_direction: tuple[float, float, float] = (-1.0, 0.0, 1.0)
    camera: float | None = None
    scramble: bool | None = None
    table_grid: tuple[int, int] | None = None
    position_adds: str | None = None
    count_empty: bool | None = None
    drop_path_rows: bool | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        if self.lines is not None:
            object.__setattr__(self, "lines", tuple(tuple(float(x) for x in line) for line in self.lines))
        self._check()

    def _check(self) -> None:
        for name in ("num_classes", "num_points", "num_tokens", "views", "adapter_dim", "head_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}`: expected a positive integer, got {value!r}")
        choices: dict[str, tuple[str | None, ...]] = {
            "normalize": ("scan", "mn40"),
            "pooling": ("mean", "max+mean"),
            "feature_order": ("max_cls", "cls_max"),
            "parity": (None, "official"),
            "fps_start": (None, "farthest", "first"),
            "fps_tie": (None, "lowest", "pointnet2"),
            "attention_axis": (None, "tokens", "batch"),
            "position_adds": (None, "once", "every", "both"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}`: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in ("dropout", "adapter_dropout", "drop_path", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}`: expected a probability below 1, got {getattr(self, name)!r}")
        for name in ("voxel_size", "cell"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}`: expected a positive number, got {value!r}")
        sizes, counts = self.sizes, self.counts
        if any(b > a for a, b in zip((self.num_points, *sizes), sizes)):
            chain = (self.num_points, *sizes)
            raise ValueError(f"`num_tokens`: expected points >= centres of each stage >= tokens, got {chain}")
        if any(k < 1 or k > n for k, n in zip(counts, (self.num_points, *sizes))):
            available = (self.num_points, *sizes[:-1])
            raise ValueError(f"`neighbors`: expected 1 to {available} by stage, got {counts}")
        if self.attention_dim % self.attention_heads:
            got = f"{self.attention_dim} and {self.attention_heads}"
            raise ValueError(f"`attention_heads`: expected a divisor of `attention_dim`, got {got}")
        if self.lines is not None and len(self.lines) != self.views:
            raise ValueError(f"`lines`: expected {self.views} directions (`views`), got {len(self.lines)}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Centres per stage of the tokenizer."""
        stages = len(self.tokenizer_units)
        if self.stage_sizes is None:
            return stage_sizes(self.num_points, self.num_tokens, stages)
        if len(self.stage_sizes) != stages or self.stage_sizes[-1] != self.num_tokens:
            got = self.stage_sizes
            raise ValueError(f"`stage_sizes`: expected {stages}, the last of {self.num_tokens}, got {got}")
        return self.stage_sizes

    @property
    def counts(self) -> tuple[int, ...]:
        """Neighbours per stage of the tokenizer."""
        stages = len(self.tokenizer_units)
        counts = (self.neighbors,) * stages if isinstance(self.neighbors, int) else self.neighbors
        if len(counts) != stages:
            raise ValueError(f"`neighbors`: expected one number or {stages}, got {self.neighbors}")
        return counts

    def _fill(self, values: Mapping[str, Any]) -> Any2PointConfig:
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def resolve_common(self) -> Any2PointConfig:
        """The same configuration with every None filled in whose default does not depend on a source."""
        return self._fill(_OFFICIAL if self.parity == "official" else _DEFAULT)

    def resolve(self, source: Source) -> Any2PointConfig:
        """The same configuration with every None that has a default for this source and parity filled in."""
        official = self.parity == "official"
        image = source.position_table.dim() == 3
        clip = source.name == "clip-text"
        size = self.position_size or tuple(self.table_grid or source.position_table.shape[:-1])
        values: dict[str, Any] = {
            "attention_axis": "batch" if official and clip else "tokens",
            "permuted_lines": official and not image,
            "scramble": official and image,
            "position_adds": ("both" if clip else "every") if official else "once",
            "cell": max(size) * (26 / 518 if image else 2 / 77),
            "position_size": size,
            "tokenizer_width": source.width // 2 ** len(self.tokenizer_units),
            "norm_eps": source.layout.eps,
            "final_norm_eps": source.layout.eps,
        }
        if official and image:
            values["camera"] = 1.4
        config = self.resolve_common()._fill(values)
        width = source.width // 2 ** len(self.tokenizer_units)
        if config.tokenizer_width != width or width * 2 ** len(self.tokenizer_units) != source.width:
            got = f"{config.tokenizer_width} for a source of width {source.width}"
            stages = len(self.tokenizer_units)
            raise ValueError(f"`tokenizer_width`: expected the source's width / {2**stages}, got {got}")
        if (config.permuted_lines or (official and image)) and config.views != 6:
            raise ValueError(f"`views`: expected 6 with the official views, got {config.views}")
        if config.position_size is not None and len(config.position_size) != (2 if image else 1):
            shape = config.position_size
            raise ValueError(f"`position_size`: expected {2 if image else 1} number(s), got {shape}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any2PointConfig:
        """Inverse of `to_dict`; ValueError for fields that do not exist."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"`values`: expected fields of Any2PointConfig, got {unknown}")
        return cls(**values)
