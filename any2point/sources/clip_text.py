"""Text towers of CLIP (OpenAI, open_clip, Hugging Face): pre-norm, QuickGELU or GELU, a learned table.

Used are the blocks, the final LayerNorm and the position table (77 rows as published). The tower has no
class token; its token embedding, text projection, logit scale and the whole image tower play no part. Half
precision weights are widened to float32.

OpenAI's models have QuickGELU, most others GELU, and the tensors do not tell. The activation is what
`config.json` (`hidden_act`) or `open_clip_config.json` (`quick_gelu`) says; without such a file it is
OpenAI's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix, read_activation, read_heads
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

_PROBE = "transformer.resblocks.0.attn.in_proj_weight"
_HF_PROBE = "embeddings.token_embedding.weight"
_BLOCKS, _HF_BLOCKS = "transformer.resblocks.{}.", "encoder.layers.{}."
LAYOUT = Layout(norm="pre", activation="quick_gelu", eps=1e-5)


def _prefixes(state: Mapping[str, Tensor]) -> tuple[str | None, str | None]:
    """What stands before the names of OpenAI's and of Hugging Face's layout, None where that is not it."""
    openai, hf = find_prefix(state, _PROBE, exclude="visual."), find_prefix(state, _HF_PROBE)
    if openai is not None and f"{openai}ln_final.weight" not in state:  # an image tower by itself
        openai = None
    if hf is not None and f"{hf}encoder.layers.0.self_attn.q_proj.weight" not in state:
        hf = None
    return openai, hf


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return _prefixes(state) != (None, None)


def _openai_blocks(reader: Reader, depth: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        old, new = f"transformer.resblocks.{i}", f"blocks.{i}"
        for leaf in ("weight", "bias"):
            tensors[f"{new}.attn.qkv.{leaf}"] = reader.take(f"{old}.attn.in_proj_{leaf}")
        tensors |= reader.pair(f"{old}.attn.out_proj", f"{new}.attn.proj")
        tensors |= reader.pair(f"{old}.ln_1", f"{new}.norm1") | reader.pair(f"{old}.ln_2", f"{new}.norm2")
        tensors |= reader.pair(f"{old}.mlp.c_fc", f"{new}.mlp.fc1")
        tensors |= reader.pair(f"{old}.mlp.c_proj", f"{new}.mlp.fc2")
    return tensors | reader.pair("ln_final", "norm")


def _hf_blocks(reader: Reader, depth: int) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        old, new = f"encoder.layers.{i}", f"blocks.{i}"
        parts = [f"{old}.self_attn.{part}_proj" for part in ("q", "k", "v")]
        tensors |= reader.fused(parts, f"{new}.attn.qkv")
        tensors |= reader.pair(f"{old}.self_attn.out_proj", f"{new}.attn.proj")
        tensors |= reader.pair(f"{old}.layer_norm1", f"{new}.norm1")
        tensors |= reader.pair(f"{old}.layer_norm2", f"{new}.norm2")
        tensors |= reader.pair(f"{old}.mlp.fc1", f"{new}.mlp.fc1")
        tensors |= reader.pair(f"{old}.mlp.fc2", f"{new}.mlp.fc2")
    return tensors | reader.pair("final_layer_norm", "norm")


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    prefix, hf_prefix = _prefixes(state)
    if prefix is not None:
        reader = Reader(state, prefix)
        depth = choose_depth(count_blocks(reader.state, _BLOCKS + "attn.in_proj_weight"), depth)
        tensors, table = _openai_blocks(reader, depth), reader.take("positional_embedding")
        reader.check_blocks(_BLOCKS, depth, ("attn_mask",))
    elif hf_prefix is not None:
        reader = Reader(state, hf_prefix)
        depth = choose_depth(count_blocks(reader.state, _HF_BLOCKS + "self_attn.q_proj.weight"), depth)
        tensors, table = _hf_blocks(reader, depth), reader.take("embeddings.position_embedding.weight")
        reader.check_blocks(_HF_BLOCKS, depth)
    else:
        raise ValueError(f"`path`: expected CLIP's text tower, but no tensor is named ...{_PROBE}")
    text = config.get("text_config", config)
    width = table.shape[-1]
    return Source(
        name="clip-text",
        modality="language",
        width=width,
        depth=depth,
        heads=read_heads(text, heads, default=max(1, width // 64)),
        layout=Layout(
            activation=read_activation(text, LAYOUT.activation),
            eps=float(text.get("layer_norm_eps", LAYOUT.eps)),
        ),
        tensors=tensors,
        position_table=table,
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="clip-text",
    title="CLIP text towers",
    modality="language",
    checkpoint="OpenAI .pt, open_clip: `transformer.resblocks.N`; Hugging Face: `text_model.`",
    width=768,
    depth=12,
    positions=(77,),
    layout=LAYOUT,
    has_cls=False,
    matches=_matches,
    convert=_convert,
)
