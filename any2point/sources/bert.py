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

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix, read_activation, read_heads
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

PROBE = "encoder.layer.0.attention.self.query.weight"
_BLOCKS = "encoder.layer.{}."
LAYOUT = Layout(norm="post", activation="gelu", input_norm=True, eps=1e-12)


def is_roberta(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with BERT's names is of RoBERTa's kin, whose positions are counted otherwise."""
    prefix = find_prefix(state, PROBE)
    if prefix is None or config.get("model_type") == "bert":
        return False
    if config.get("model_type") in ("roberta", "xlm-roberta", "camembert"):
        return True
    types = state.get(f"{prefix}embeddings.token_type_embeddings.weight")
    return "roberta." in prefix or (types is not None and len(types) == 1)


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return find_prefix(state, PROBE) is not None and not is_roberta(state, config)


def read_blocks(reader: Reader, depth: int) -> dict[str, Tensor]:
    """Embedding LayerNorm and the first blocks under their canonical names."""
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
    reader.check_blocks(_BLOCKS, depth)
    return tensors


def read_bert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    name: str,
    first: int,
    cls_word: int,
    eps: float,
    depth: int | None,
    heads: int | None,
    origin: Mapping[str, Any],
) -> Source:
    """A source from BERT's layout; `first` is the row of position 0, `cls_word` the class token's word."""
    prefix = find_prefix(state, PROBE)
    if prefix is None:
        raise ValueError(f"`path`: expected a {name} encoder, but no tensor is named ...{PROBE}")
    # Google's own checkpoints keep the names of TensorFlow.
    names = {name: name.replace("LayerNorm.gamma", "LayerNorm.weight") for name in state}
    names = {name: new.replace("LayerNorm.beta", "LayerNorm.bias") for name, new in names.items()}
    reader = Reader({names[name]: value for name, value in state.items()}, prefix)
    depth = choose_depth(count_blocks(reader.state, _BLOCKS + "attention.self.query.weight"), depth)
    table = reader.take("embeddings.position_embeddings.weight")[first:]
    if "embeddings.token_type_embeddings.weight" in reader:
        table = table + reader.rows("embeddings.token_type_embeddings.weight", table.shape[-1])[0]
    words = reader.rows("embeddings.word_embeddings.weight", table.shape[-1])
    has_cls = words.shape[0] > cls_word
    return Source(
        name=name,
        modality="language",
        width=table.shape[-1],
        depth=depth,
        heads=read_heads(config, heads, default=None),
        layout=Layout(
            norm="post",
            activation=read_activation(config, "gelu"),
            input_norm=True,
            eps=float(config.get("layer_norm_eps", eps)),
        ),
        tensors=read_blocks(reader, depth),
        position_table=table.contiguous(),
        cls_token=words[cls_word].clone() if has_cls else None,
        cls_position=table[0].clone() if has_cls else None,
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
    return read_bert(
        state,
        config,
        name="bert",
        first=0,
        cls_word=101,
        eps=LAYOUT.eps,
        depth=depth,
        heads=heads,
        origin=origin,
    )


FAMILY = Family(
    name="bert",
    title="BERT, MiniLM, sentence-transformers",
    modality="language",
    checkpoint="Hugging Face: `encoder.layer.N.attention.self`; config.json tells heads",
    width=768,
    depth=12,
    positions=(512,),
    layout=LAYOUT,
    has_cls=True,
    matches=_matches,
    convert=_convert,
)
