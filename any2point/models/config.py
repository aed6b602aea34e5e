"""Everything that defines a model apart from its source; every quirk of the official code is an option."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from any2point.models.checks import check_for_source, check_values
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
    "bias_kv": False,
}
_DEFAULT: dict[str, Any] = {
    "center": True,
    "fps_start": "farthest",
    "fps_tie": "lowest",
    "guard": True,
    "wrap": False,
    "count_empty": False,
    "drop_path_rows": False,
    "bias_kv": True,
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
        input_features: channels of every point beside its coordinates (normals, colour, height, ...), F.
        tokenizer: "lga", the paper's stages of local aggregation, or "pointnet", one stage with a small
            PointNet on the neighbours of each token, as in Point-BERT; `stage_sizes`, the `tokenizer_` fields
            apart from the width, and `normalize` are of the first alone.
        tokenizer_width: channels of the first embedding: the source's width / 2 per stage, or None for that.
            Of "pointnet" the first hidden width, 128 by default.
        tokenizer_units: residual units per stage; its length is the number of stages.
        tokenizer_hidden: bottleneck of the last stage.
        normalize: how offsets of neighbours are normalised: "scan" or "mn40".
        positions: position encodings of the tokens. "virtual": the source's own, by virtual projection.
            Controls that know nothing of the source: "none"; "learned", a trained function of the centre (two
            linear layers, as in Point-BERT); "sinusoidal", fixed sines and cosines of the centre, as strong
            as the source's table. None of them depends on the order of tokens. The class token keeps its own
            position, and the guided aggregation its cells, which `adapter` turns off.
        views: number of lines or images, V.
        lines: for sequences, directions of the lines, V triples, instead of evenly spread ones.
        rotations: for images, V triples of Euler angles in degrees instead of evenly spread lines of sight;
            `any2point.nn.euler_rotations` says how they are applied. The official ones are (0, 0, 90),
            (90, 0, 90), (180, 0, 90), (270, 0, 90), (0, -90, 90) and (0, 90, 90).
        cell: edge of a cell in positions; 2/77 of a line or 26/518 of an image's side by default.
        position_size: extent of the positions, `(length,)` or `(height, width)` in pixels, of any aspect; by
            default the table's. The table is interpolated over it.
        voxel_size: edge of the voxels that guide the aggregation, in units of the coordinates.
        adapter: what is trained in the blocks: "both", the "bottleneck" adapter or the guided aggregation
            ("aggregate") alone, or "none"; "none" by default for `tuning` "probe", otherwise "both".
        adapter_blocks: numbers of the blocks that have it, from 0; all by default.
        insertion: what the bottleneck adapter takes and joins: the output of the MLP ("mlp_output", the
            paper's), its input ("mlp_parallel"), or the output of the attention ("attention_output"). The
            guided aggregation follows that half of the block: at its end, or between attention and MLP.
        adapter_dim: bottleneck of the adapters.
        adapter_dropout: in the adapters.
        scale_factor: factor on the adapters.
        coef_pro: factor on the guided aggregation.
        attention_dim: inner width of the attention in cells.
        attention_heads: its heads.
        pooling: of tokens in a cell: "mean" or "max+mean".
        ensemble: how views are blended: "adaptive" (weighted by their agreement with the voxels, the
            paper's), "mean" or "max".
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
        tuning: what is trained. "adapter", the paper's: tokenizer, class token and its position, adapters,
            final normalisation and head. "full": all of that and every weight of the source, its position
            table included. "probe", a linear probe: the tokenizer, without which a source takes no points,
            and a head of one linear layer; the class token and the final normalisation stay as they are.
        checkpointing: keep no intermediate results of blocks and stages of the tokenizer for the gradient,
            but compute them again: less memory, more time, the same gradients.
        source_dtype: "float32", or "bfloat16" to store and compute the frozen matrices in half the memory.
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
        bias_kv: use the keys and values that a source's attention adds (ImageBind). Official: dropped.
    """

    num_classes: int = 15
    num_points: int = 1024
    num_tokens: int = 128
    neighbors: int | tuple[int, ...] = 64
    stage_sizes: tuple[int, ...] | None = None
    input_features: int = 0
    tokenizer: str = "lga"
    tokenizer_width: int | None = None
    tokenizer_units: tuple[int, ...] = (2, 1, 1)
    tokenizer_hidden: int = 32
    normalize: str = "scan"
    positions: str = "virtual"
    views: int = 6
    lines: tuple[tuple[float, float, float], ...] | None = None
    rotations: tuple[tuple[float, float, float], ...] | None = None
    cell: float | None = None
    position_size: tuple[int, ...] | None = None
    voxel_size: float = 0.16
    adapter: str | None = None
    adapter_blocks: tuple[int, ...] | None = None
    insertion: str = "mlp_output"
    adapter_dim: int = 16
    adapter_dropout: float = 0.1
    scale_factor: float = 0.3
    coef_pro: float = 0.3
    attention_dim: int = 12
    attention_heads: int = 6
    pooling: str = "mean"
    ensemble: str = "adaptive"
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
    tuning: str = "adapter"
    checkpointing: bool = False
    source_dtype: str = "float32"

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
    bias_kv: bool | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("lines", "rotations"):
            rows = getattr(self, name)
            if rows is not None:
                object.__setattr__(self, name, _triples(rows))
        check_values(self)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Centres per stage of the tokenizer."""
        if self.tokenizer == "pointnet":
            return (self.num_tokens,)
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
        stages = 1 if self.tokenizer == "pointnet" else len(self.tokenizer_units)
        counts = (self.neighbors,) * stages if isinstance(self.neighbors, int) else self.neighbors
        if len(counts) != stages:
            raise ValueError(f"`neighbors`: expected one number or {stages}, got {self.neighbors}")
        return counts

    def _fill(self, values: Mapping[str, Any]) -> Any2PointConfig:
        missing = {name: value for name, value in values.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing)

    def resolve_common(self) -> Any2PointConfig:
        """The same configuration with every None filled in whose default does not depend on a source."""
        values = _OFFICIAL if self.parity == "official" else _DEFAULT
        return self._fill(values | {"adapter": "none" if self.tuning == "probe" else "both"})

    def resolve(self, source: Source) -> Any2PointConfig:
        """The same configuration with every None that has a default for this source and parity filled in."""
        official = self.parity == "official"
        image = source.position_table.dim() == 3
        clip = source.name == "clip-text"
        size = self.position_size or tuple(self.table_grid or source.position_table.shape[:-1])
        values: dict[str, Any] = {
            "attention_axis": "batch" if official and clip else "tokens",
            "permuted_lines": official and not image and self.lines is None,
            "scramble": official and image,
            "position_adds": ("both" if clip else "every") if official else "once",
            "cell": max(size) * (26 / 518 if image else 2 / 77),
            "position_size": size,
            "tokenizer_width": 128
            if self.tokenizer == "pointnet"
            else source.width // 2 ** len(self.tokenizer_units),
            "norm_eps": source.layout.eps,
            "final_norm_eps": source.layout.eps,
        }
        if official and image:
            values["camera"] = 1.4
        config = self.resolve_common()._fill(values)
        check_for_source(config, source)
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


def _triples(rows: Any) -> Any:
    """Rows of numbers (lists, arrays) as tuples; what is no such thing stays, for the checks to refuse."""
    try:
        return tuple(tuple(float(x) for x in row) for row in rows)
    except (TypeError, ValueError):
        return rows
