"""The hidden layer of a frozen MLP on GPUs with a tensor memory accelerator: product and activation in one.

For evaluation: where a gradient is asked for, what is before the activation has to be stored as well, which
takes the advantage away. Programs stay and take tiles in turn.

H200, 4128 rows, 768 to 3072 channels in bfloat16 with quick GELU: 37 us, of which the product takes 31; by
cuBLAS and a kernel for the activation 45 us. Limit: exponentials and reciprocals.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = triton.knobs.runtime.interpret
FEWEST = 1024  # rows; with fewer, tiles do not fill the GPU
ACTIVATIONS = ("quick_gelu", "gelu")
_M, _N, _K, _GROUP = 128, 256, 64, 8


@triton.jit
def _activate(h, QUICK: tl.constexpr):
    """The activation; the error function by formula 7.1.26 of Abramowitz and Stegun, 1.5e-7 off."""
    if QUICK:
        result = h / (1 + tl.exp2(-2.4554669595930157 * h))
    else:
        z = tl.abs(h) * 0.7071067811865476
        t = 1 / (1 + 0.3275911 * z)
        series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
        series = t * (0.254829592 + t * (-0.284496736 + t * series))
        below = 0.5 * series * tl.exp2(-1.4426950408889634 * z * z)  # of the normal distribution, below -|h|
        result = h * tl.where(h >= 0, 1 - below, below)
    return result


@triton.jit
def _finish(accumulator, bias, out, m, n, N, QUICK: tl.constexpr):
    """What is done to a tile of a product before it is stored."""
    size: tl.constexpr = accumulator.shape[1]
    column = n + tl.arange(0, size)
    accumulator += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    out.store([m, n], _activate(accumulator, QUICK).to(out.dtype))


@triton.jit
def _tile(
    x,
    weight,
    bias,
    out,
    tile,
    M,
    N,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,
    QUICK: tl.constexpr,
):
    down, across = tl.cdiv(M, TILE_M), tl.cdiv(N, TILE_N)
    first = tile // (GROUP * across) * GROUP
    rows = tl.minimum(down - first, GROUP)
    m = (first + tile % (GROUP * across) % rows) * TILE_M
    n = (tile % (GROUP * across) // rows) * TILE_N
    accumulator = tl.zeros((TILE_M, TILE_N), tl.float32)
    for step in range(tl.cdiv(K, TILE_K)):
        k = step * TILE_K
        accumulator = tl.dot(x.load([m, k]), weight.load([n, k]).T, accumulator)
    halves = tl.permute(tl.reshape(accumulator, (TILE_M, 2, TILE_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    _finish(left, bias, out, m, n, N, QUICK)
    _finish(right, bias, out, m, n + TILE_N // 2, N, QUICK)


@triton.jit
def _hidden_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    bias,  # [N]
    out,  # [M, N]
    M,
    N,
    K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
    GROUP: tl.constexpr,  # tiles of rows that share columns of the weight in the cache
    PROGRAMS: tl.constexpr,
    QUICK: tl.constexpr,
    STAY: tl.constexpr,  # whether a program takes more than one tile
):
    if STAY:
        tiles = tl.cdiv(M, TILE_M) * tl.cdiv(N, TILE_N)
        for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
            _tile(x, weight, bias, out, tile, M, N, K, TILE_M, TILE_N, TILE_K, GROUP, QUICK)
    else:
        _tile(x, weight, bias, out, tl.program_id(0), M, N, K, TILE_M, TILE_N, TILE_K, GROUP, QUICK)


class Hidden(torch.autograd.Function):
    """`act(x weight' + bias)` of `x [..., K]` and `weight [N, K]`, in one 16-bit type; without a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        n, k = weight.shape
        out = x.new_empty(*x.shape[:-1], n)
        ctx.mark_non_differentiable(out)
        rows, flat = x.reshape(-1, k), out.view(-1, n)
        programs = tiles = triton.cdiv(len(rows), _M) * triton.cdiv(n, _N)
        if not INTERPRETED:
            programs = min(programs, torch.cuda.get_device_properties(x.device).multi_processor_count)
        describe = TensorDescriptor.from_tensor
        with torch.cuda.device_of(x):
            _hidden_kernel[(programs,)](
                describe(rows, [_M, _K]), describe(weight.contiguous(), [_N, _K]), bias,
                describe(flat, [_M, _N // 2]), len(rows), n, k,
                TILE_M=_M, TILE_N=_N, TILE_K=_K, GROUP=_GROUP, PROGRAMS=programs, STAY=programs < tiles,
                QUICK=activation == "quick_gelu", num_warps=8, num_stages=3,
            )  # fmt: skip
        return out
