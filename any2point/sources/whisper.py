"""Whisper's encoder: Hugging Face (whole model or encoder) and OpenAI's .pt.

Pre-norm, GELU, no class token, keys without bias. Positions are the fixed sinusoid [1500, C] of 20 ms frames;
where a checkpoint leaves it out, it is computed. Convolutions and decoder play no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import Names, find_names, layout_of, open_reader, read_blocks, sinusoid
from any2point.sources.checkpoint import read_activation, read_heads
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

_HF = Names(
    anchor="conv1.weight",
    block="layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    norm1="self_attn_layer_norm",
    norm2="final_layer_norm",
    mlps=((("fc1",), "fc2"),),
    norm="layer_norm",
    table="embed_positions.weight",
)
_OPENAI = Names(
    anchor="conv1.weight",
    block="blocks.{}",
    qkv=("attn.query", "attn.key", "attn.value"),
    proj="attn.out",
    norm1="attn_ln",
    norm2="mlp_ln",
    mlps=((("mlp.0",), "mlp.2"),),
    norm="ln_post",
    table="positional_embedding",
)
LAYOUT = Layout(norm="pre", activation="gelu", eps=1e-5)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_names(state, (_HF, _OPENAI)) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, (_HF, _OPENAI), "Whisper's encoder")
    tensors, depth = read_blocks(reader, names, depth)
    tensors |= reader.pair(names.norm, "norm")
    width = tensors["norm.weight"].shape[0]
    length = int(config.get("max_source_positions", 1500))
    return Source(
        name="whisper",
        modality="audio",
        width=width,
        depth=depth,
        heads=read_heads(config, heads, default=max(1, width // 64), name="encoder_attention_heads"),
        layout=layout_of(
            tensors, activation=read_activation(config, "gelu", "activation_function"), eps=LAYOUT.eps
        ),
        tensors=tensors,
        position_table=reader.take(names.table) if names.table in reader else sinusoid(length, width),
        position_kind="sinusoidal",
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="whisper",
    title="Whisper encoders",
    modality="audio",
    checkpoint="Hugging Face: `encoder.layers.N`, `encoder.conv1`; OpenAI .pt: `encoder.blocks.N`",
    width=512,
    depth=6,
    positions=(1500,),
    layout=LAYOUT,
    has_cls=False,
    matches=_matches,
    convert=_convert,
    position_kind="sinusoidal",
    table=sinusoid,
)
