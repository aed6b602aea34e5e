"""DistilBERT in the Hugging Face layout: BERT's blocks under other names, without token types.

As for BERT, the embedding LayerNorm follows token + position, and the class token starts from the word
embedding of `[CLS]` (row 101) with the position of row 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix, read_activation, read_heads
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

_PROBE = "transformer.layer.0.attention.q_lin.weight"
_BLOCKS = "transformer.layer.{}."
_CLS = 101
LAYOUT = Layout(norm="post", activation="gelu", input_norm=True, eps=1e-12)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_prefix(state, _PROBE) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    prefix = find_prefix(state, _PROBE)
    if prefix is None:
        raise ValueError(f"`path`: expected a DistilBERT encoder, but no tensor is named ...{_PROBE}")
    reader = Reader(state, prefix)
    depth = choose_depth(count_blocks(reader.state, _BLOCKS + "attention.q_lin.weight"), depth)
    table = reader.take("embeddings.position_embeddings.weight")
    words = reader.rows("embeddings.word_embeddings.weight", table.shape[-1])
    tensors = reader.pair("embeddings.LayerNorm", "input_norm")
    for i in range(depth):
        old, new = f"transformer.layer.{i}", f"blocks.{i}"
        parts = [f"{old}.attention.{part}_lin" for part in ("q", "k", "v")]
        tensors |= reader.fused(parts, f"{new}.attn.qkv")
        tensors |= reader.pair(f"{old}.attention.out_lin", f"{new}.attn.proj")
        tensors |= reader.pair(f"{old}.sa_layer_norm", f"{new}.norm1")
        tensors |= reader.pair(f"{old}.ffn.lin1", f"{new}.mlp.fc1")
        tensors |= reader.pair(f"{old}.ffn.lin2", f"{new}.mlp.fc2")
        tensors |= reader.pair(f"{old}.output_layer_norm", f"{new}.norm2")
    reader.check_blocks(_BLOCKS, depth)
    has_cls = words.shape[0] > _CLS
    activation = read_activation(config, LAYOUT.activation, "activation")
    return Source(
        name="distilbert",
        modality="language",
        width=table.shape[-1],
        depth=depth,
        heads=read_heads(config, heads, default=None, name="n_heads"),
        layout=Layout(norm="post", activation=activation, input_norm=True, eps=LAYOUT.eps),
        tensors=tensors,
        position_table=table,
        cls_token=words[_CLS].clone() if has_cls else None,
        cls_position=table[0].clone() if has_cls else None,
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="distilbert",
    title="DistilBERT",
    modality="language",
    checkpoint="Hugging Face: `transformer.layer.N.attention.q_lin`; config.json tells heads",
    width=768,
    depth=6,
    positions=(512,),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
