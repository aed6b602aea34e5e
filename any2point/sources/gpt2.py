"""GPT-2 and DistilGPT-2 in the Hugging Face layout: pre-norm, GELU by tanh, learned positions.

Its linear layers are stored as `[in, out]` and are transposed here. There is no class token; the word
embedding, which is also the output layer, plays no part. GPT-2 was trained with a causal mask, which here is
an option of the model (`causal`), not of the source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from any2point.sources.checkpoint import Reader, count_blocks, find_prefix, read_activation, read_heads
from any2point.sources.encoder import Layout
from any2point.sources.source import Family, Source, choose_depth

_PROBE = "h.0.attn.c_attn.weight"
_BLOCKS = "h.{}."
# The mask and its value, which old checkpoints hold as if they were weights.
_BUFFERS = ("attn.bias", "attn.masked_bias")
LAYOUT = Layout(norm="pre", activation="gelu_tanh", eps=1e-5)


def _prefix(state: Mapping[str, Tensor]) -> str | None:
    """What stands before GPT-2's names; the first GPT shares them, but has no final LayerNorm."""
    prefix = find_prefix(state, _PROBE)
    return prefix if prefix is not None and f"{prefix}ln_f.weight" in state else None


def _matches(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    return _prefix(state) is not None


def _convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    depth: int | None = None,
    heads: int | None = None,
    origin: Mapping[str, Any],
) -> Source:
    prefix = _prefix(state)
    if prefix is None:
        raise ValueError(f"`path`: expected GPT-2, but no tensors are named ...{_PROBE} and ...ln_f.weight")
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise ValueError("`path`: expected attention scaled as in GPT-2, got another scale in config.json")
    reader = Reader(state, prefix)
    depth = choose_depth(count_blocks(reader.state, _BLOCKS + "attn.c_attn.weight"), depth)
    table = reader.take("wpe.weight")
    tensors: dict[str, Tensor] = {}
    for i in range(depth):
        old, new = f"h.{i}", f"blocks.{i}"
        tensors |= reader.pair(f"{old}.ln_1", f"{new}.norm1") | reader.pair(f"{old}.ln_2", f"{new}.norm2")
        for theirs, ours in {
            "attn.c_attn": "attn.qkv",
            "attn.c_proj": "attn.proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
        }.items():
            tensors[f"{new}.{ours}.weight"] = reader.take(f"{old}.{theirs}.weight").T.contiguous()
            tensors[f"{new}.{ours}.bias"] = reader.take(f"{old}.{theirs}.bias")
    tensors |= reader.pair("ln_f", "norm")
    reader.check_blocks(_BLOCKS, depth, _BUFFERS)
    width = table.shape[-1]
    return Source(
        name="gpt2",
        modality="language",
        width=width,
        depth=depth,
        heads=read_heads(config, heads, default=max(1, width // 64), name="n_head"),
        layout=Layout(
            activation=read_activation(config, LAYOUT.activation, "activation_function"),
            eps=float(config.get("layer_norm_epsilon", LAYOUT.eps)),
        ),
        tensors=tensors,
        position_table=table,
        origin=origin,
        unused=reader.unused(),
    )


FAMILY = Family(
    name="gpt2",
    title="GPT-2, DistilGPT-2",
    modality="language",
    checkpoint="Hugging Face: `h.N.attn.c_attn`, `ln_f`, `wpe`",
    width=768,
    depth=12,
    positions=(1024,),
    layout=LAYOUT,
    has_cls=False,
    matches=_matches,
    convert=_convert,
)
