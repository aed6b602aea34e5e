"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT's layout with positions that start after the padding row.

RoBERTa numbers positions from `pad_token_id + 1` = 2, so the first two rows of its 514 were never seen by a
token and are left out. The class token is `<s>`, word 0, and its position the first of the remaining rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.bert import is_roberta, read_bert
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source

LAYOUT = Layout(norm="post", activation="gelu", input_norm=True, eps=1e-5)


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
        name="roberta",
        first=int(config.get("pad_token_id", 1)) + 1,
        cls_word=0,
        eps=LAYOUT.eps,
        depth=depth,
        heads=heads,
        origin=origin,
    )


FAMILY = Family(
    name="roberta",
    title="RoBERTa, XLM-RoBERTa, CamemBERT",
    modality="language",
    checkpoint="as BERT, with `roberta.` or one token type, or by config.json",
    width=768,
    depth=12,
    positions=(512,),
    layout=LAYOUT,
    has_cls=True,
    matches=is_roberta,
    convert=_convert,
)
