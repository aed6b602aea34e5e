"""BERT and its relatives (MiniLM, sentence-transformers) in the Hugging Face layout: post-norm, GELU.

What BERT does to a token is `LN(word + position + token_type)`. Here the word is a 3D token, so:
- the position table is `position_embeddings + token_type_embeddings[0]`: the type-0 vector belongs to every
  token of a single sentence, and interpolation weights sum to one, so folding it in is exact;
- the embedding LayerNorm is kept, frozen, and applied to token + position before the first block
  (`Layout.input_norm`), since post-norm blocks were trained on normalised inputs;
- the class token starts from the word embedding of `[CLS]` (row 101 of BERT's vocabularies), its position
  from row 0 of the table, which stays in the table.
There is no final LayerNorm in a post-norm encoder; the model's own starts as the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

_PROBE = "encoder.layer.0.attention.self.query.weight"
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
        raise ValueError(f"`path`: expected a BERT encoder, but no tensor is named ...{_PROBE}")
    heads = config.get("num_attention_heads") if heads is None else heads
    if not isinstance(heads, int):
        raise ValueError("`heads`: a BERT checkpoint without config.json does not tell; give heads=")
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"`path`: expected the activation gelu in config.json, got {activation!r}")
    reader = Reader(state, prefix)
    depth = choose_depth(count_blocks(reader.state, "encoder.layer.{}.attention.self.query.weight"), depth)

    table = reader.take("embeddings.position_embeddings.weight")
    if "embeddings.token_type_embeddings.weight" in reader:
        table = table + reader.take("embeddings.token_type_embeddings.weight")[0]
    words = reader.take("embeddings.word_embeddings.weight")
    tensors = reader.pair("embeddings.LayerNorm", "input_norm")
    for i in range(depth):
        old, new = f"encoder.layer.{i}", f"blocks.{i}"
        parts = [f"{old}.attention.self.{part}" for part in ("query", "key", "value")]
        tensors |= reader.fused(parts, f"{new}.attn.qkv")
        tensors |= reader.pair(f"{old}.attention.output.dense", f"{new}.attn.proj")
        tensors |= reader.pair(f"{old}.attention.output.LayerNorm", f"{new}.norm1")
        tensors |= reader.pair(f"{old}.intermediate.dense", f"{new}.mlp.fc1")
        tensors |= reader.pair(f"{old}.output.dense", f"{new}.mlp.fc2")
        tensors |= reader.pair(f"{old}.output.LayerNorm", f"{new}.norm2")
    has_cls = words.shape[0] > _CLS
    eps = float(config.get("layer_norm_eps", LAYOUT.eps))
    return Source(
        name="bert",
        modality="language",
        width=table.shape[-1],
        depth=depth,
        heads=heads,
        layout=Layout(norm="post", activation="gelu", input_norm=True, eps=eps),
        tensors=tensors,
        position_table=table,
        cls_token=words[_CLS].clone() if has_cls else None,
        cls_position=table[0].clone() if has_cls else None,
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="bert",
    title="BERT, MiniLM, sentence-transformers",
    modality="language",
    checkpoint="Hugging Face BertModel with or without `bert.`: model.safetensors and config.json",
    width=768,
    depth=12,
    positions=(512,),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
