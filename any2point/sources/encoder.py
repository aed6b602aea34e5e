"""The frozen transformer: one implementation for every source family."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any2point.sources.glue import (
    attend,
    attend_stacked,
    fork_norm,
    fork_norm_stacked,
    half_mlp,
    hidden_layer,
    join,
    join_norm,
    join_norm_stacked,
    quick_gelu,
)
from any2point.sources.linear import Linear

Activation = Literal["gelu", "quick_gelu", "gelu_tanh", "relu", "swiglu"]


@dataclass(frozen=True)
class Layout:
    """How the blocks of a transformer are put together.

    Attributes:
        norm: "pre" (CLIP, ViT: `x + f(LN(x))`) or "post" (BERT: `LN(x + f(x))`).
        activation: of the MLP: "gelu" (erf), "quick_gelu" (`x sigmoid(1.702 x)`, CLIP), "gelu_tanh" (GPT-2),
            "relu" or "swiglu" (DINOv2's giant: `silu(a) b` of the two halves of a doubled first layer).
        layer_scale: whether each branch is multiplied by a learned vector (DINOv2).
        bias_kv: whether every block has one more key and value of its own that all tokens attend to
            (ImageBind), as in `nn.MultiheadAttention(add_bias_kv=True)`.
        input_norm: whether a LayerNorm follows the sum of token and position (BERT's embedding LayerNorm).
        eps: of every LayerNorm.
    """

    norm: Literal["pre", "post"] = "pre"
    activation: Activation = "gelu"
    layer_scale: bool = False
    bias_kv: bool = False
    input_norm: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.norm not in ("pre", "post"):
            raise ValueError(f"`norm`: expected pre or post, got {self.norm!r}")
        if self.activation not in get_args(Activation):
            known = ", ".join(get_args(Activation))
            raise ValueError(f"`activation`: expected one of {known}, got {self.activation!r}")
        number = isinstance(self.eps, (int, float)) and not isinstance(self.eps, bool)
        if not number or not 0 < self.eps < math.inf:
            raise ValueError(f"`eps`: expected a positive number, got {self.eps!r}")


def drop_path(branch: Tensor, rate: float) -> Tensor:
    """Zero the branch `[B, ...]` of whole samples with probability `rate`, and rescale the others."""
    shape = (branch.shape[0],) + (1,) * (branch.dim() - 1)
    return branch * ((torch.rand(shape, device=branch.device) >= rate).to(branch.dtype) / (1 - rate))


def _in_autocast(x: Tensor) -> bool:
    """Whether autocast chooses types by itself."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _taken(x: Tensor, layer: nn.Linear) -> Tensor:
    """`x` in the type of the layer's weights."""
    return x if _in_autocast(x) else x.to(layer.weight.dtype)


def _returned(y: Tensor, x: Tensor) -> Tensor:
    """`y` in the type of `x`, which half precision weights change."""
    return y if _in_autocast(x) else y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in the type of its own weight, whatever comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention with fused query, key and value."""

    def __init__(self, width: int, heads: int, bias_kv: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.bias_k = nn.Parameter(torch.zeros(width)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.zeros(width)) if bias_kv else None

    def forward(
        self, x: Tensor, *, axis: str = "tokens", causal: bool = False, dropout: float = 0.0
    ) -> Tensor:
        """`x [B, T, C]`; with axis "batch" every token slot attends over the clouds of the batch."""
        over_batch = axis == "batch"
        qkv = self.qkv(_taken(x, self.qkv))
        if self.bias_k is None or self.bias_v is None:
            y = attend(qkv, self.heads, over_batch=over_batch, causal=causal, dropout=dropout)
            return _returned(self.proj(y), x)
        qkv = qkv.transpose(0, 1) if over_batch else qkv
        query, key, value = (z.transpose(1, 2) for z in qkv.unflatten(-1, (3, self.heads, -1)).unbind(2))
        key, value, mask = self._append(key, self.bias_k), self._append(value, self.bias_v), None
        if causal:  # the appended column is open to every row
            length = query.shape[2]
            mask = torch.ones(length, length + 1, dtype=torch.bool, device=x.device).tril()
            mask = mask | (torch.arange(length + 1, device=x.device) == length)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        y = _returned(self.proj(y.transpose(1, 2).flatten(2)), x)
        return y.transpose(0, 1) if over_batch else y

    def stacked(self, x: Tensor, batch: int, prefix: int, *, over_batch: bool) -> Tensor:
        """`forward` on CUDA, of rows `[R, C]`: the first tokens of all clouds, then the others."""
        qkv = self.qkv(_taken(x, self.qkv))
        return self.proj(attend_stacked(qkv, self.heads, batch, prefix, over_batch=over_batch))

    def _append(self, x: Tensor, row: Tensor) -> Tensor:
        row = row.to(x.dtype).view(1, self.heads, 1, -1).expand(x.shape[0], -1, -1, -1)
        return torch.cat([x, row], dim=2)


class MLP(nn.Module):
    """Two linear layers with the source's activation between them."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = Linear(width, 2 * hidden if activation == "swiglu" else hidden)
        self.fc2 = Linear(hidden, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., C]` -> `[..., C]`."""
        inputs = _taken(x, self.fc1)
        whole = half_mlp(inputs, self.fc1, self.fc2, self.activation)
        if whole is not None:
            return whole
        y = hidden_layer(inputs, self.fc1, self.activation)
        y = self._activate(self.fc1(inputs)) if y is None else y
        return _returned(self.fc2(y), x)

    def _activate(self, y: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, y = y.chunk(2, dim=-1)
            return F.silu(gate) * y
        if self.activation == "quick_gelu":
            return quick_gelu(y)
        if self.activation == "relu":
            return F.relu(y)
        return F.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """One transformer block, with a place for an adapter on the output of its MLP."""

    def __init__(self, width: int, heads: int, mlp_width: int, layout: Layout) -> None:
        super().__init__()
        self.post_norm = layout.norm == "post"
        self.norm1 = LayerNorm(width, layout.eps)
        self.attn = Attention(width, heads, layout.bias_kv)
        self.norm2 = LayerNorm(width, layout.eps)
        self.mlp = MLP(width, mlp_width, layout.activation)
        self.ls1 = nn.Parameter(torch.ones(width)) if layout.layer_scale else None
        self.ls2 = nn.Parameter(torch.ones(width)) if layout.layer_scale else None

    def forward(
        self,
        x: Tensor,
        adapter: Callable[[Tensor], Tensor] | None = None,
        *,
        axis: str = "tokens",
        causal: bool = False,
        dropout: float = 0.0,
        path_rate: float = 0.0,
    ) -> Tensor:
        """`x [B, T, C]` -> `[B, T, C]`; `adapter` takes the MLP's branch, and its output is added to it."""
        x, inputs = self.attend_ahead(x, axis=axis, causal=causal, dropout=dropout, path_rate=path_rate)
        return self.transform(x, adapter, inputs=inputs, path_rate=path_rate)

    def attend(
        self,
        x: Tensor,
        adapter: Callable[[Tensor], Tensor] | None = None,
        *,
        axis: str = "tokens",
        causal: bool = False,
        dropout: float = 0.0,
        path_rate: float = 0.0,
    ) -> Tensor:
        """The first half, `[B, T, C]` -> `[B, T, C]`; `adapter` takes the attention's branch."""
        x, inputs = self._fork(x, self.norm1, self.attn.qkv)
        y = self.attn(inputs, axis=axis, causal=causal, dropout=dropout)
        out = self._join(x, y, self.ls1, adapter, None, path_rate)
        return (self.norm1(out) if self.post_norm else out).to(x.dtype)

    def attend_ahead(
        self, x: Tensor, *, axis: str, causal: bool, dropout: float, path_rate: float
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` without an adapter, and the `inputs` of `transform` if they are there at once."""
        if self.post_norm or path_rate:
            return self.attend(x, axis=axis, causal=causal, dropout=dropout, path_rate=path_rate), None
        x, inputs = self._fork(x, self.norm1, self.attn.qkv)
        y = self.attn(inputs, axis=axis, causal=causal, dropout=dropout)
        return join_norm(x, y, self.ls1, self.norm2, self.mlp.fc1.weight.dtype)

    def transform(
        self,
        x: Tensor,
        adapter: Callable[[Tensor], Tensor] | None = None,
        *,
        inputs: Tensor | None = None,
        parallel: bool = False,
        path_rate: float = 0.0,
    ) -> Tensor:
        """The second half; `adapter` takes the MLP's branch, or with `parallel` what the MLP takes."""
        if inputs is None:
            x, inputs = self._fork(x, self.norm2, self.mlp.fc1)
        out = self._join(x, self.mlp(inputs), self.ls2, adapter, inputs if parallel else None, path_rate)
        return (self.norm2(out) if self.post_norm else out).to(x.dtype)

    def attend_stacked(
        self, x: Tensor, tail: Tensor, batch: int, *, over_batch: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """`attend_ahead` on CUDA: the first tokens x of all clouds, and the others below it, as rows."""
        x, below, y = fork_norm_stacked(x, tail, self.norm1, self.attn.qkv.weight.dtype)
        y = self.attn.stacked(y, batch, len(x) // batch, over_batch=over_batch)
        return join_norm_stacked(x, below, y, self.ls1, self.norm2, self.mlp.fc1.weight.dtype)

    def transform_stacked(
        self, x: Tensor, tail: Tensor, inputs: Tensor, adapter: Any, keep: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`transform` on CUDA of what `attend_stacked` gave; the adapter joins the branch by itself."""
        return adapter.join_stacked(x, tail, self.mlp(inputs), self.ls2, keep)

    def _fork(self, x: Tensor, norm: LayerNorm, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """What goes on beside a branch, and what the branch takes; its first layer is `layer`."""
        return (x, x) if self.post_norm else fork_norm(x, norm, layer.weight.dtype)

    def _join(
        self,
        x: Tensor,
        y: Tensor,
        scale: Tensor | None,
        adapter: Callable[[Tensor], Tensor] | None,
        taken: Tensor | None,
        path_rate: float,
    ) -> Tensor:
        """Branch `y` and what the adapter makes of it, or of `taken`, added to `x`.

        An adapter with a method `join(x, y, scale)` does all of it.
        """
        joined = getattr(adapter, "join", None)
        if joined is not None and taken is None and not path_rate:
            return joined(x, y, scale)
        if path_rate or (scale is not None and adapter is not None and taken is None):
            y = y if scale is None else scale * y
            y, scale = drop_path(y, path_rate) if path_rate else y, None
        if adapter is None:
            return join(x, y, scale, None)
        return join(x, y, scale, adapter(y if taken is None else taken))


class FrozenEncoder(nn.Module):
    """The blocks of a source: no parameter requires a gradient, and it stays in evaluation mode.

    `unfreeze` ends that, for full fine-tuning.
    """

    frozen = True

    def __init__(self, width: int, depth: int, heads: int, mlp_width: int, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.input_norm = LayerNorm(width, layout.eps) if layout.input_norm else None
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, layout) for _ in range(depth))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Keep evaluation mode, whatever the parent module is switched to, unless unfrozen."""
        return super().train(mode and not self.frozen)

    def unfreeze(self) -> FrozenEncoder:
        """Train all weights, in memory of their own (they may be shared with a `Source`)."""
        self.frozen = False
        for module in self.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
        return self

    def embed(self, x: Tensor) -> Tensor:
        """What the source does to the sum of token and position before its first block."""
        return x if self.input_norm is None else self.input_norm(x).to(x.dtype)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """The plain source, without adapters: `[B, T, C]` -> `[B, T, C]`, without the final norm."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, causal=causal)
        return x

    def hidden_states(self, x: Tensor, *, causal: bool = False) -> list[Tensor]:
        """What enters the first block and what leaves every block: depth + 1 tensors `[B, T, C]`."""
        states = [self.embed(x)]
        for block in self.blocks:
            states.append(block(states[-1], causal=causal))
        return states
