"""Attention of the class token, computed beside the block, whose fused attention does not return it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from any2point.sources.encoder import Block


def class_attention(block: Block, x: Tensor) -> Tensor:
    """Weights that the first token gives to every token of its cloud in a block, without a mask.

    Args:
        block: the transformer block.
        x: `[B, T, C]`, what enters it.

    Returns:
        `[B, H, T]`. They sum to 1 over the T tokens, or to less in a source whose blocks have a key of their
        own (`bias_kv`).
    """
    attention = block.attn
    y = x if block.post_norm else block.norm1(x)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    width = weight.shape[1]
    y = y.to(weight.dtype)
    query = F.linear(y[:, :1], weight[:width], bias[:width])
    key = F.linear(y, weight[width : 2 * width], bias[width : 2 * width])
    own = getattr(attention, "bias_k", None)
    if own is not None:
        key = torch.cat([key, own.to(key.dtype).expand(key.shape[0], 1, -1)], dim=1)
    query, key = (z.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float() for z in (query, key))
    scores = (query @ key.mT)[:, :, 0] * query.shape[-1] ** -0.5
    return scores.softmax(-1)[..., : x.shape[1]].to(x.dtype)
