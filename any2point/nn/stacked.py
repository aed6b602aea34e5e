"""The adapted blocks on CUDA, with the rows of a batch in another order: prefixes first.

The guided aggregation leaves out class token and registers. Where these stand before the tokens of each
cloud, its input and output are copies. Here the prefixes of all clouds are stacked above all tokens: nothing
but the attention looks at the order of rows, and tokens are a tensor of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from any2point.ops import GuidedPlan
from any2point.sources.glue import attends, in_kernels, is_hooked

if TYPE_CHECKING:
    from any2point.nn.encoder import AdaptedEncoder


def is_stacked(encoder: AdaptedEncoder, tokens: Tensor) -> bool:
    """Whether `run_stacked` takes over, for `tokens [B, S, C]`: plain blocks, with kernels for every step."""
    if not in_kernels(tokens):
        return False
    source: Any = encoder.source
    layout, blocks = source.layout, list(source.blocks)
    if encoder.insertion != "mlp_output" or encoder.causal or encoder.checkpointing:
        return False
    if encoder.training and (encoder.dropout or any(encoder.path_rates)):
        return False
    if layout.norm != "pre" or layout.bias_kv or any(guided.adapter is None for guided in encoder.adapters):
        return False
    passed = [module for block in blocks for module in (block.norm1, block.attn, block.norm2)]
    if is_hooked(encoder, *passed):
        return False
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in source.parameters()):
        return False
    first: Any = blocks[0]
    dtype = first.mlp.fc2.weight.dtype
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else dtype
    batch, count, width = tokens.shape
    length = batch if encoder.axis == "batch" else encoder.prefix + count
    if not attends(dtype, length, width // first.attn.heads, tokens.get_device()):
        return False
    adapters: list[Any] = [guided.adapter for guided in encoder.adapters]
    return all(adapter.joins(tokens, dtype, block.ls2) for adapter, block in zip(adapters, blocks))


def run_stacked(
    encoder: AdaptedEncoder,
    prefix: Tensor,
    tokens: Tensor,
    prefix_position: Tensor,
    position: Tensor,
    cell: Tensor,
    cluster: Tensor,
    plan: GuidedPlan | None = None,
) -> tuple[Tensor, Tensor]:
    """`AdaptedEncoder.forward` of prefixes `[B, P, C]`, tokens `[B, S, C]` and the positions of both."""
    batch, over_batch = len(prefix), encoder.axis == "batch"
    adds = encoder.position_adds
    if adds != "every":
        prefix, tokens = prefix + prefix_position, tokens + position
    x, tokens = encoder.source.embed(prefix.flatten(0, 1)), encoder.source.embed(tokens)
    plan = encoder.plan(tokens, cell, cluster) if plan is None else plan
    keep = _kept(encoder, batch * (prefix.shape[1] + tokens.shape[1]), tokens.device)
    for index, block in enumerate(encoder.source.blocks):
        if adds != "once":
            x, tokens = x + prefix_position.flatten(0, 1), tokens + position
        frozen: Any = block
        guided: Any = encoder.adapters[index]
        x, tokens, inputs = frozen.attend_stacked(x, tokens, batch, over_batch=over_batch)
        x, tokens = frozen.transform_stacked(x, tokens, inputs, guided.adapter, keep[index])
        tokens = guided(tokens, cell, cluster, encoder.attention, plan)
    return x.view(prefix.shape), tokens


def _kept(encoder: AdaptedEncoder, rows: int, device: torch.device) -> Sequence[Tensor | None]:
    """What dropout keeps in every adapter, `[R, r]` uint8, in one launch where they are alike."""
    every: list[Any] = [guided.adapter for guided in encoder.adapters]
    kinds = {(adapter.training, adapter.dropout, adapter.down.out_features) for adapter in every}
    training, dropout, rank = kinds.pop()
    if kinds or not training or not dropout:
        return [None] * len(every)
    keep = torch.empty(len(every), rows, rank, dtype=torch.uint8, device=device)
    return keep.bernoulli_(1 - dropout).unbind()
