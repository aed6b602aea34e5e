"""Image tower of CLIP: OpenAI (`visual.`), open_clip (the same names) and Hugging Face (`vision_model.`).

A ViT with a LayerNorm before the first block (`ln_pre`, the source's input norm). OpenAI's models have
QuickGELU, most of open_clip's GELU, and the tensors do not tell: the activation is what config.json
(`hidden_act`) or open_clip_config.json (`quick_gelu`) says, or else OpenAI's. The output projection and the
text tower play no part. A checkpoint with both towers is read as "clip-text" unless `family="clip-vision"`
is given; one with the image tower alone is recognised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources._layouts import Names, find_names, open_reader, read_vit
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

_OPENAI = Names(
    anchor="class_embedding",
    block="transformer.resblocks.{}",
    qkv=("attn.in_proj",),
    proj="attn.out_proj",
    norm1="ln_1",
    norm2="ln_2",
    mlps=((("mlp.c_fc",), "mlp.c_proj"),),
    norm="ln_post",
    input_norm="ln_pre",
    table="positional_embedding",
    cls="class_embedding",
    stem="conv1.weight",
    eps=1e-5,
)
_HF = Names(
    anchor="embeddings.class_embedding",
    block="encoder.layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    norm1="layer_norm1",
    norm2="layer_norm2",
    norm="post_layernorm",
    input_norm="pre_layrnorm",
    table="embeddings.position_embedding.weight",
    cls="embeddings.class_embedding",
    stem="embeddings.patch_embedding.weight",
    eps=1e-5,
)
LAYOUT = Layout(norm="pre", activation="quick_gelu", input_norm=True, eps=1e-5)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_names(state, (_OPENAI, _HF)) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    names, reader = open_reader(state, (_OPENAI, _HF), "CLIP's image tower")
    return read_vit(
        "clip-vision",
        "vision",
        names,
        reader,
        config.get("vision_config", config),
        depth=depth,
        heads=heads,
        origin=origin,
        activation="quick_gelu",
    )


FAMILY = Family(
    name="clip-vision",
    title="CLIP image towers",
    modality="vision",
    checkpoint="OpenAI ViT-*.pt or open_clip: `visual.`; Hugging Face: `vision_model.`",
    width=768,
    depth=12,
    positions=(14, 14),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
