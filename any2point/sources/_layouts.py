"""How the vision and audio families name and lay out what they share: blocks, tables, class-like tokens.

Every family is a `Names` per naming (where the tensors of a block and of the stem stand) and the few rules of
its own; what is common is read here. Tensors inside a block that nothing here knows (normalised queries,
relative positions, adapters) are an error: without them the network would be another one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, read_activation, read_heads
from any2point.sources.encoder import Activation, Layout
from any2point.sources.source import Source, choose_depth

Grid = tuple[int, int]
# Heads of the largest ViTs (so400m, huge, giant, gigantic), which are wider than the usual 64 channels.
_HUGE = {1152: 16, 1280: 16, 1408: 16, 1664: 16}


@dataclass(frozen=True)
class Names:
    """Where the tensors of a transformer stand; names in `block` are relative to it.

    Attributes:
        anchor: a tensor that every checkpoint of this naming has, and that tells the prefix of all others.
        block: blocks, with `{}` for the number.
        qkv: query, key and value, or the one layer that holds them ("attn.in_proj" of MultiheadAttention).
        proj: output of the attention.
        norm1: LayerNorm of the attention.
        norm2: LayerNorm of the MLP.
        mlps: first layer (or gate and value of a SwiGLU) and last layer of the MLP, by variant.
        scales: vectors of LayerScale, by variant.
        norm: final LayerNorm.
        input_norm: LayerNorm before the first block.
        table: position table.
        cls: class token.
        registers: tokens between class token and patches, in their order.
        stem: convolution that makes the patches.
        eps: of the LayerNorms, where no config.json tells.
    """

    anchor: str
    block: str
    qkv: tuple[str, ...]
    proj: str
    norm1: str
    norm2: str
    mlps: tuple[tuple[tuple[str, ...], str], ...] = ((("mlp.fc1",), "mlp.fc2"),)
    scales: tuple[tuple[str, str], ...] = ()
    norm: str = "norm"
    input_norm: str = ""
    table: str = ""
    cls: str = ""
    registers: tuple[str, ...] = ()
    stem: str = ""
    eps: float = 1e-6

    @property
    def probe(self) -> str:
        """First weight of a block, with `{}` for the number."""
        return f"{self.block}.{self.qkv[0]}" + ("_weight" if self.qkv == ("attn.in_proj",) else ".weight")


TIMM = Names(
    anchor="pos_embed",
    block="blocks.{}",
    qkv=("attn.qkv",),
    proj="attn.proj",
    norm1="norm1",
    norm2="norm2",
    mlps=((("mlp.fc1",), "mlp.fc2"), (("mlp.w12",), "mlp.w3")),
    scales=(("ls1.gamma", "ls2.gamma"), ("gamma_1", "gamma_2")),
    input_norm="norm_pre",
    table="pos_embed",
    cls="cls_token",
    registers=("dist_token", "reg_token", "register_tokens"),
    stem="patch_embed.proj.weight",
)

# Hugging Face: the names of the files, and those that the modules of transformers 5 have in memory.
_HF_FILES = Names(
    anchor="embeddings.position_embeddings",
    block="encoder.layer.{}",
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    norm1="norm1",
    norm2="norm2",
    norm="layernorm",
    table="embeddings.position_embeddings",
    cls="embeddings.cls_token",
    registers=("embeddings.distillation_token", "embeddings.register_tokens"),
    stem="embeddings.patch_embeddings.projection.weight",
)
_HF_MODULES = replace(
    _HF_FILES,
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
)
_VIT_FILES = replace(_HF_FILES, norm1="layernorm_before", norm2="layernorm_after", eps=1e-12)
_VIT_MODULES = replace(_HF_MODULES, norm1="layernorm_before", norm2="layernorm_after", eps=1e-12)
HF_VIT = (
    replace(_VIT_FILES, mlps=((("intermediate.dense",), "output.dense"),)),
    replace(_VIT_MODULES, block="layers.{}"),
)
_HF_MLPS = (
    (("mlp.fc1",), "mlp.fc2"),
    (("mlp.weights_in",), "mlp.weights_out"),
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
)
_HF_SCALES = (("layer_scale1.lambda1", "layer_scale2.lambda1"),)
HF_DINOV2 = (
    replace(_HF_FILES, mlps=_HF_MLPS, scales=_HF_SCALES),
    replace(_HF_MODULES, mlps=_HF_MLPS, scales=_HF_SCALES),
)


def find_names(state: Mapping[str, Tensor], layouts: Sequence[Names]) -> tuple[Names, str] | None:
    """The naming that a checkpoint has, and the prefix of its names (the shortest if there are many)."""
    for names in layouts:
        for key in sorted(state, key=len):
            prefix = key.removesuffix(names.anchor)
            fits = key.endswith(names.anchor) and (not prefix or prefix.endswith("."))
            norm = f"{names.block.format(0)}.{names.norm1}.weight"
            if fits and prefix + names.probe.format(0) in state and prefix + norm in state:
                return names, prefix
    return None


def find_vit(
    state: Mapping[str, Tensor], layouts: Sequence[Names], *, spectrogram: bool = False
) -> tuple[Names, str] | None:
    """As `find_names`, for patches of an image, or else of a spectrogram, which has one channel."""
    found = find_names(state, layouts)
    if found is None:
        return None
    names, prefix = found
    stem = state.get(prefix + names.stem)
    one_channel = stem is not None and stem.shape[1:2] == (1,)
    return found if one_channel == spectrogram else None


def open_reader(state: Mapping[str, Tensor], layouts: Sequence[Names], what: str) -> tuple[Names, Reader]:
    """The naming and a reader below its prefix, or a ValueError that says which names were expected."""
    found = find_names(state, layouts)
    if found is None:
        wanted = " or ".join(f"...{names.probe.format(0)} with ...{names.anchor}" for names in layouts)
        raise ValueError(f"`path`: expected {what}, but no tensors are named {wanted}")
    names, prefix = found
    return names, Reader(state, prefix)


def read_blocks(reader: Reader, names: Names, depth: int | None) -> tuple[dict[str, Tensor], int]:
    """The blocks under canonical names, and how many they are; ValueError for tensors nothing here knows."""
    depth = choose_depth(count_blocks(reader.state, names.probe), depth)
    first = names.block.format(0)
    first_layers, last_layer = next(
        (mlp for mlp in names.mlps if f"{first}.{mlp[0][0]}.weight" in reader), names.mlps[0]
    )
    scales = next((pair for pair in names.scales if f"{first}.{pair[0]}" in reader), ())
    # A family without biases (Whisper's keys, qkv_bias=False) has none in any block.
    no_bias = [part for part in names.qkv if f"{first}.{part}.bias" not in reader]
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        old, new = names.block.format(i), f"blocks.{i}"
        if names.qkv == ("attn.in_proj",):
            for leaf in ("weight", "bias"):
                tensors[f"{new}.attn.qkv.{leaf}"] = reader.take(f"{old}.attn.in_proj_{leaf}")
        else:
            parts = [f"{old}.{part}" for part in names.qkv]
            tensors |= reader.fused(parts, f"{new}.attn.qkv", no_bias=[f"{old}.{part}" for part in no_bias])
        for leaf in ("bias_k", "bias_v"):
            if f"{first}.attn.{leaf}" in reader:
                tensors[f"{new}.attn.{leaf}"] = reader.take(f"{old}.attn.{leaf}").flatten()
        tensors |= reader.pair(f"{old}.{names.proj}", f"{new}.attn.proj")
        tensors |= reader.pair(f"{old}.{names.norm1}", f"{new}.norm1")
        tensors |= reader.pair(f"{old}.{names.norm2}", f"{new}.norm2")
        tensors |= reader.fused([f"{old}.{layer}" for layer in first_layers], f"{new}.mlp.fc1")
        tensors |= reader.pair(f"{old}.{last_layer}", f"{new}.mlp.fc2")
        for scale, target in zip(scales, ("ls1", "ls2")):
            tensors[f"{new}.{target}"] = reader.take(f"{old}.{scale}")
    reader.check_blocks(f"{names.block}.", depth)
    return tensors, depth


def layout_of(
    tensors: Mapping[str, Tensor],
    *,
    activation: Activation,
    eps: float,
    norm: Literal["pre", "post"] = "pre",
) -> Layout:
    """The layout that the tensors show; a first layer of twice the width of the last is a SwiGLU."""
    gated = tensors["blocks.0.mlp.fc1.weight"].shape[0] == 2 * tensors["blocks.0.mlp.fc2.weight"].shape[1]
    return Layout(
        norm=norm,
        activation="swiglu" if gated else activation,
        layer_scale="blocks.0.ls1" in tensors,
        bias_kv="blocks.0.attn.bias_k" in tensors,
        input_norm="input_norm.weight" in tensors,
        eps=eps,
    )


def split_table(
    table: Tensor, leading: Sequence[int] = (1,), grid: Grid | None = None, *, square: bool = True
) -> tuple[Tensor, Tensor]:
    """The patches' part of a position table as a grid, and the rows of the class-like tokens before it.

    Args:
        table: `[1, rows, C]` or `[rows, C]`.
        leading: numbers of rows that may stand before the patches, the likeliest first.
        grid: rows and columns of the patches, if known.
        square: whether a square will do where the grid is not known or does not fit (a table may have been
            resampled after its configuration was written).

    Returns:
        `[H, W, C]`, or `[L, C]` for a single row or column, and `[rows of leading, C]`.

    Raises:
        ValueError: the patches are neither that grid nor, where it would do, a square.
    """
    table = table.reshape(-1, table.shape[-1])
    rows = table.shape[0]
    shapes: dict[int, Grid] = {}
    for count in leading:
        side = math.isqrt(max(0, rows - count))
        if square and side and side * side == rows - count:
            shapes.setdefault(count, (side, side))
        if grid is not None and grid[0] * grid[1] == rows - count:
            shapes = {count: grid}
            break
    if not shapes:
        areas = ["n*n"] * square + ([] if grid is None else [f"{grid[0]}*{grid[1]}"])
        wanted = [f"{count} + {area}" if count else area for area in areas for count in leading]
        raise ValueError(f"`path`: expected {' or '.join(wanted)} rows of positions, got {rows}")
    count, shape = next(iter(shapes.items()))
    patches = table[count:].contiguous()
    return patches if 1 in shape else patches.unflatten(0, shape), table[:count].clone()


def _pair(value: Any, name: str) -> Grid:
    pair = [value, value] if isinstance(value, int) else value
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, int) and x > 0 for x in pair):
        raise ValueError(
            f"`path`: expected one or two positive numbers as {name} in config.json, got {value!r}"
        )
    return pair[0], pair[1]


def image_grid(config: Mapping[str, Any], stem: Tensor | None) -> Grid | None:
    """Rows and columns of patches that a config.json of Hugging Face or timm tells, or None."""
    size = config.get("image_size")
    shape = config.get("pretrained_cfg", {}).get("input_size")  # channels, height, width
    size = shape[1:] if isinstance(shape, list) else size
    size = config.get("model_args", {}).get("img_size", size)
    patch = config.get("patch_size", None if stem is None else list(stem.shape[-2:]))
    if size is None or patch is None:
        return None
    (height, width), (down, across) = _pair(size, "size of the image"), _pair(patch, "patch_size")
    return height // down, width // across


def spectrogram_grid(count: int, height: int, strides: Sequence[int]) -> Grid:
    """Frequency rows and time columns of patches over the 128 mel bins that all these families use.

    Args:
        count: number of patches.
        height: of a patch, in mel bins.
        strides: of the patches along frequency, the likeliest first; the first whose rows divide the patches
            counts.
    """
    rows = [(128 - height) // stride + 1 for stride in strides]
    for bands in rows:
        if count > 0 and bands > 0 and count % bands == 0:
            return bands, count // bands
    wanted = " or ".join(map(str, rows))
    raise ValueError(
        f"`path`: expected {wanted} rows of frequencies in the position table, got {count} patches"
    )


def read_vit(
    family: str,
    modality: str,
    names: Names,
    reader: Reader,
    config: Mapping[str, Any],
    *,
    depth: int | None,
    heads: int | None,
    origin: Mapping[str, Any],
    grid: Grid | None = None,
    activation: Activation = "gelu",
) -> Source:
    """A pre-norm ViT over patches: class token, registers and a learned table of positions on a grid.

    The grid is `grid` if that is given, else what config.json tells, else a square. The class token has a
    position if the table holds a row for it, and none (zeros) otherwise; the rows of registers, where the
    table holds them, are added to the registers.
    """
    tensors, depth = read_blocks(reader, names, depth)
    # timm has its last norm after pooling (`fc_norm`) in models that average: no final norm for tokens then.
    if "fc_norm.weight" not in reader or f"{names.norm}.weight" in reader:
        tensors |= reader.pair(names.norm, "norm")
    if names.input_norm and f"{names.input_norm}.weight" in reader:
        tensors |= reader.pair(names.input_norm, "input_norm")
    cls_token = reader.take(names.cls).flatten() if names.cls in reader else None
    found = [reader.take(name).flatten(0, -2) for name in names.registers if name in reader]
    registers = torch.cat(found) if found else None
    own = 0 if cls_token is None else 1
    count = own + (0 if registers is None else len(registers))
    table, rows = split_table(
        reader.take(names.table),
        tuple(dict.fromkeys((own, 0, count))),
        image_grid(config, reader.state.get(names.stem)) if grid is None else grid,
        square=grid is None,
    )
    if registers is not None and len(rows) == count:
        registers = registers + rows[own:]
    cls_position = None
    if cls_token is not None:
        cls_position = rows[0].clone() if len(rows) else torch.zeros_like(cls_token)
    width = table.shape[-1]
    return Source(
        name=family,
        modality=modality,
        width=width,
        depth=depth,
        heads=read_heads(config, heads, default=_HUGE.get(width, max(1, width // 64))),
        layout=layout_of(
            tensors,
            activation=read_activation(config, activation),
            eps=float(config.get("layer_norm_eps", names.eps)),
        ),
        tensors=tensors,
        position_table=table,
        cls_token=cls_token,
        cls_position=cls_position,
        registers=registers,
        origin=origin,
        unused=reader.unused(),
    )


def sinusoid(length: int, width: int) -> Tensor:
    """`[length, C]`: sines, then cosines, of periods 2 pi to 20000 pi positions; amplitude 1 (Whisper)."""
    half = width // 2
    rates = torch.exp(-math.log(10000) / max(1, half - 1) * torch.arange(half, dtype=torch.float64))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def sinusoid_grid(height: int, width: int, channels: int) -> Tensor:
    """`[H, W, C]`: sines and cosines of the column, then those of the row; amplitude 1 (MAE)."""
    rates = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))
    across, down = (torch.arange(n, dtype=torch.float64)[:, None] * rates for n in (width, height))
    columns = torch.cat([across.sin(), across.cos()], dim=1).expand(height, -1, -1)
    rows = torch.cat([down.sin(), down.cos()], dim=1)[:, None].expand(-1, width, -1)
    return torch.cat([columns, rows], dim=-1).float()
