"""wav2vec 2.0 encoders (Hugging Face): no class token, no absolute positions, and so a stand-in for them.

These models have no position table: what they add before the first block is a grouped convolution over the
neighbouring frames, a function of the content, which 3D tokens in no order cannot feed. In its place stands
the fixed sinusoid of Whisper: 1500 positions (30 s of the same 20 ms frames), amplitude 1, sines then
cosines. The transformer was never trained with it: `position_kind` is "stand-in". The convolution plays no
part.

The base form is post-norm, with a LayerNorm between sum and first block (the source's input norm) and no
final norm; the stable form (large models, `do_stable_layer_norm`) is pre-norm, with that LayerNorm at the
end. config.json tells which; without it, the form is stable if every convolution of the feature extractor
has a LayerNorm, as in all published models. The network is HuBERT's too: without config.json or the prefix
`hubert.` a HuBERT checkpoint is read under this name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import Names, find_names, layout_of, open_reader, read_blocks, sinusoid
from any2point.sources.checkpoint import read_activation, read_heads
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

NAMES = Names(
    anchor="pos_conv_embed.conv.bias",
    block="layers.{}",
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.out_proj",
    norm1="layer_norm",
    norm2="final_layer_norm",
    mlps=((("feed_forward.intermediate_dense",), "feed_forward.output_dense"),),
    norm="layer_norm",
    eps=1e-5,
)
LAYOUT = Layout(norm="post", activation="gelu", input_norm=True, eps=1e-5)
LENGTH = 1500
# Heads by width; others, of models that are published with a config.json, are not of one rule.
_HEADS = {768: 12, 1024: 16}


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_names(state, (NAMES,)) is not None


def _is_stable(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    told = config.get("do_stable_layer_norm")
    if told is not None:
        return bool(told)
    return any(key.endswith("feature_extractor.conv_layers.1.layer_norm.weight") for key in state)


def read_speech(
    family: str,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None,
    heads: int | None,
    origin: Mapping[str, Any],
) -> Source:
    """The encoder of wav2vec 2.0 and HuBERT, in either form."""
    names, reader = open_reader(state, (NAMES,), "a wav2vec 2.0 or HuBERT encoder")
    tensors, depth = read_blocks(reader, names, depth)
    stable = _is_stable(state, config)
    tensors |= reader.pair(names.norm, "norm" if stable else "input_norm")
    width = tensors["blocks.0.norm1.weight"].shape[0]
    return Source(
        name=family,
        modality="audio",
        width=width,
        depth=depth,
        heads=read_heads(config, heads, default=_HEADS.get(width)),
        layout=layout_of(
            tensors,
            norm="pre" if stable else "post",
            activation=read_activation(config, "gelu"),
            eps=float(config.get("layer_norm_eps", names.eps)),
        ),
        tensors=tensors,
        position_table=sinusoid(LENGTH, width),
        position_kind="stand-in",
        origin=origin,
        unused=reader.unused(),
    )


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    return read_speech("wav2vec2", state, config, depth=depth, heads=heads, origin=origin)


FAMILY = Family(
    name="wav2vec2",
    title="wav2vec 2.0 encoders; a fixed sinusoid stands in for positions, of which they have none",
    modality="audio",
    checkpoint="Hugging Face: `encoder.layers.N.feed_forward`, `encoder.pos_conv_embed`",
    width=768,
    depth=12,
    positions=(LENGTH,),
    layout=LAYOUT,
    has_cls=False,
    matches=_matches,
    convert=_convert,
    position_kind="stand-in",
    table=sinusoid,
)
