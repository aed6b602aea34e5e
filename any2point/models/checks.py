"""What a configuration may hold, by itself and for a source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from any2point.models.kinds import describe, fits, kinds_of
from any2point.nn.encoder import INSERTIONS
from any2point.nn.views import euler_rotations, given_lines
from any2point.ops.virtual_project import cell_grid
from any2point.sources import Source

if TYPE_CHECKING:
    from any2point.models.config import Any2PointConfig

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "normalize": ("scan", "mn40"),
    "tokenizer": ("lga", "pointnet"),
    "positions": ("virtual", "none", "learned", "sinusoidal"),
    "adapter": (None, "both", "bottleneck", "aggregate", "none"),
    "insertion": INSERTIONS,
    "pooling": ("mean", "max+mean"),
    "ensemble": ("adaptive", "mean", "max"),
    "feature_order": ("max_cls", "cls_max"),
    "tuning": ("adapter", "full", "probe"),
    "source_dtype": ("float32", "bfloat16"),
    "parity": (None, "official"),
    "fps_start": (None, "farthest", "first"),
    "fps_tie": (None, "lowest", "pointnet2"),
    "attention_axis": (None, "tokens", "batch"),
    "position_adds": (None, "once", "every", "both"),
}
_POSITIVE = (
    *("num_classes", "num_points", "num_tokens", "neighbors", "stage_sizes", "position_size", "table_grid"),
    *("tokenizer_width", "tokenizer_units", "tokenizer_hidden", "adapter_dim", "attention_dim"),
    *("attention_heads", "head_width", "views", "voxel_size", "cell", "camera", "norm_eps", "final_norm_eps"),
)
# Every cell of every view of every cloud takes a row of C numbers.
_MAX_CELLS = 1 << 20
_PROBABILITIES = ("dropout", "adapter_dropout", "drop_path", "attention_dropout")
_ROWS = {"lines": "directions of three numbers, not all zero", "rotations": "three angles in degrees"}


def check_names(names: Sequence[str] | None, count: int) -> list[str] | None:
    """The names of the classes as a list, if there are any; an error unless they are `count` texts."""
    if names is None:
        return None
    if (
        isinstance(names, str)
        or not isinstance(names, Sequence)
        or not all(isinstance(n, str) for n in names)
    ):
        raise TypeError(f"`class_names`: expected a list of names, got {names!r}")
    if len(names) != count:
        raise ValueError(f"`class_names`: expected {count} names, got {len(names)}")
    return list(names)


def check_values(config: Any2PointConfig) -> None:
    """ValueError for a field that cannot be, or for fields that contradict each other."""
    for name, kind in kinds_of(type(config)).items():
        value = getattr(config, name)
        holds, text = fits(value, kind), _ROWS.get(name) or describe(kind)
        if name in _CHOICES:
            holds, text = holds and value in _CHOICES[name], f"one of {_CHOICES[name]}"
        elif name in _POSITIVE:
            holds, text = holds and _is_positive(value), describe(kind, "positive")
        elif name in _PROBABILITIES:
            holds, text = holds and 0 <= value < 1, "a probability below 1"
        elif name == "input_features":
            holds, text = holds and value >= 0, "an integer of 0 or more"
        if not holds:
            raise ValueError(f"`{name}`: expected {text}, got {value!r}")
    if not any(config.line_direction):
        raise ValueError(f"`line_direction`: expected not all zero, got {config.line_direction}")
    _check_stages(config)
    if config.attention_dim % config.attention_heads:
        got = f"{config.attention_dim} and {config.attention_heads}"
        raise ValueError(f"`attention_heads`: expected a divisor of `attention_dim`, got {got}")
    for name in ("lines", "rotations"):
        rows = getattr(config, name)
        if rows is not None and len(rows) != config.views:
            raise ValueError(f"`{name}`: expected {config.views} directions (`views`), got {len(rows)}")
    if config.lines is not None:
        given_lines(config.lines)
    if config.rotations is not None:
        euler_rotations(config.rotations)
    _check_together(config)


def _is_positive(value: float | tuple[int, ...] | None) -> bool:
    return value is None or (min(value, default=0) if isinstance(value, tuple) else value) > 0


def _check_stages(config: Any2PointConfig) -> None:
    if config.tokenizer == "pointnet" and config.stage_sizes is not None:
        raise ValueError(f"`stage_sizes`: expected None for `tokenizer` pointnet, got {config.stage_sizes}")
    sizes, counts = config.sizes, config.counts
    if any(b > a for a, b in zip((config.num_points, *sizes), sizes)):
        chain = (config.num_points, *sizes)
        raise ValueError(f"`num_tokens`: expected points >= centres of each stage >= tokens, got {chain}")
    if any(k < 1 or k > n for k, n in zip(counts, (config.num_points, *sizes))):
        available = (config.num_points, *sizes[:-1])
        raise ValueError(f"`neighbors`: expected 1 to {available} by stage, got {counts}")


def _check_together(config: Any2PointConfig) -> None:
    """Fields that ask for what another field takes away."""
    if config.tuning == "probe":
        if config.adapter not in (None, "none"):
            raise ValueError(f"`adapter`: expected none for `tuning` probe, got {config.adapter}")
        if config.positions == "learned":
            raise ValueError("`positions`: expected none that are trained for `tuning` probe, got learned")
    if config.tuning == "full" and config.source_dtype != "float32":
        raise ValueError(f"`source_dtype`: expected float32 for `tuning` full, got {config.source_dtype}")
    none = config.adapter == "none" or config.tuning == "probe"
    if none and config.adapter_blocks is not None:
        raise ValueError(f"`adapter_blocks`: expected None with `adapter` none, got {config.adapter_blocks}")
    if none and config.insertion != "mlp_output":
        raise ValueError(f"`insertion`: expected mlp_output with `adapter` none, got {config.insertion}")
    if config.adapter == "aggregate" and config.insertion == "mlp_parallel":
        raise ValueError(
            "`insertion`: expected mlp_output or attention_output with `adapter` aggregate, got mlp_parallel"
        )
    # What the official code sets may have no effect; what somebody asked for shall have one.
    if (none or config.adapter == "bottleneck") and config.parity is None:
        for name, default in (("pooling", "mean"), ("ensemble", "adaptive")):
            if getattr(config, name) != default:
                kind = "none" if none else config.adapter
                raise ValueError(
                    f"`{name}`: expected {default} with `adapter` {kind}, which aggregates nothing, "
                    f"got {getattr(config, name)}"
                )
    if config.causal and config.attention_axis == "batch":
        raise ValueError("`causal`: expected False with `attention_axis` batch, got True")
    if config.lines is not None and config.permuted_lines:
        raise ValueError("`lines`: expected None with `permuted_lines`, got both")


def check_for_source(config: Any2PointConfig, source: Source) -> None:
    """ValueError where a resolved configuration does not fit the source."""
    _check_together(config)
    image = source.position_table.dim() == 3
    if config.tokenizer == "lga":
        stages = len(config.tokenizer_units)
        width = source.width // 2**stages
        if config.tokenizer_width != width or width * 2**stages != source.width:
            got = f"{config.tokenizer_width} for a source of width {source.width}"
            raise ValueError(f"`tokenizer_width`: expected the source's width / {2**stages}, got {got}")
    given = config.rotations is not None
    if (config.permuted_lines or (config.parity == "official" and image and not given)) and config.views != 6:
        raise ValueError(f"`views`: expected 6 with the official views, got {config.views}")
    kind = f"{source.name}, whose positions are {'an image' if image else 'a sequence'}"
    foreign = {"lines": "; see `rotations`", "permuted_lines": ""}
    if not image:
        foreign = {"rotations": "; see `lines`", "camera": "", "scramble": "", "table_grid": ""}
    for name, hint in foreign.items():
        if getattr(config, name):
            raise ValueError(f"`{name}`: expected None for {kind}, got {getattr(config, name)}{hint}")
    grid, rows = config.table_grid, math.prod(source.position_table.shape[:-1])
    if grid is not None and math.prod(grid) != rows:
        raise ValueError(f"`table_grid`: expected two factors of the {rows} positions, got {grid}")
    if config.position_size is not None and len(config.position_size) != (2 if image else 1):
        shape = config.position_size
        raise ValueError(f"`position_size`: expected {2 if image else 1} number(s), got {shape}")
    assert config.position_size is not None
    assert config.cell is not None
    cells = math.prod(cell_grid(config.position_size, config.cell))
    if cells > _MAX_CELLS:
        raise ValueError(
            f"`cell`: expected at most {_MAX_CELLS:,} cells per view, got {cells:,} of {config.cell}"
        )
    blocks = config.adapter_blocks
    if blocks is not None and (
        not blocks or len(set(blocks)) != len(blocks) or not all(b in range(source.depth) for b in blocks)
    ):
        raise ValueError(f"`adapter_blocks`: expected distinct numbers below {source.depth}, got {blocks}")
