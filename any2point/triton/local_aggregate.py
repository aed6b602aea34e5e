"""Local aggregation in evaluation: gather, encoding, residual units and maximum in one kernel.

A program has GROUPS groups and goes through their neighbours STEP at a time; a row of its tile is one
neighbour, group by group, so that the maximum stays within warps. Rows x are wider than registers: they are
built in chunks of channels, again for each layer that needs them, with only the hidden layers kept. Weights
stream through shared memory. Nothing of size [B, S, K, C] is stored.

H200, three stages of the tokenizer (32 clouds, K = 81; products take 0.54 ms in float16 at 790 TFLOP/s):
3.13 ms in float16, 5.6 ms in TF32, 19.2 ms in float32 (each product in three of TF32). Limits: weights come
from L2 again for every 64 rows, rows are built up to three times, and building waits for products instead of
running beside them. csrc/local_aggregate/hopper.sm90a.cu does better for 16-bit features on sm_90.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from any2point.reference.batch_norm import BatchNorm
from any2point.triton import tf32_allowed
from any2point.triton._rows import _PLAIN, INTERPRETED, columns, geometry, prepare, relu

_ROWS = 64
_FREQUENCIES = 128  # of a program

Layer = tuple[Tensor, "Tensor | None", BatchNorm]  # weight, bias, normalisation


def local_aggregate(
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    divisor: Tensor | None,
    wavelength: Tensor,
    units: list[Tensor],
    beta: float,
    guard: bool,
) -> Tensor:
    """See the op `_local_aggregate` in csrc/library.cpp. Products are of the features' dtype."""
    batch, rows, half = features.shape
    centers, neighbors = neighbor.shape[1:]
    groups, width = batch * centers, 2 * half
    out = features.new_empty(batch, centers, width)
    if out.numel() == 0:
        return out
    precision = "tf32x3" if features.dtype == torch.float32 and not tf32_allowed() else "tf32"
    exact = features.dtype == torch.float32 and precision == "tf32x3"
    points, features, center, neighbor = (x.contiguous() for x in (points, features, center, neighbor))
    hidden = [len(bias) for bias in units[1::4]]
    weights = [x.to(features.dtype) if i % 2 == 0 else x for i, x in enumerate(units)]
    if features.dtype == torch.float32 and not exact:
        # Tensor cores cut off what does not fit into TF32; rounded before, errors do not add up.
        weights = [_round(x) if i % 2 == 0 else x for i, x in enumerate(weights)]
    step = min(16, triton.next_power_of_2(neighbors))
    chunk, stages = _tile(width, hidden, features)
    splits = tuple(size for count in hidden for size in _split(count))
    with torch.cuda.device_of(features):
        divisors, table = prepare(
            points, center, neighbor, divisor, wavelength, width, guard=guard, exact=exact
        )
        _kernel[(triton.cdiv(groups, _ROWS // step),)](
            points, features, center, neighbor, divisors, table, tuple(weights), out,
            rows, centers, groups, beta,
            K=neighbors, WIDTH=width, HIDDEN=tuple(hidden), SPLITS=splits,
            GROUPS=_ROWS // step, STEP=step, CHUNK=chunk, STAGES=stages,
            SINE="exact" if exact else "plain" if INTERPRETED else "fast", PRECISION=precision,
            num_warps=4, maxnreg=128 if sum(splits) <= 64 and not exact else None,
        )  # fmt: skip
    return out


def fold(layers: list[Layer], width: int, alpha: float, eps: float, dtype: torch.dtype) -> list[Tensor]:
    """What evaluation needs besides its rows, in one launch.

    The wavelengths, and weight (in `dtype`) and float32 bias of linear layers with the batch normalisation
    after each.
    """
    device = layers[0][0].device
    tensors, sizes = [], []
    out = [torch.empty(width // 6, dtype=torch.float32, device=device)]
    for weight, bias, norm in layers:
        rows, columns = weight.shape
        tensors += [tensor if tensor is None else tensor.contiguous() for tensor in (weight, bias, *norm)]
        out += [
            torch.empty(rows, columns, dtype=dtype, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        ]
        sizes += [rows, columns, triton.next_power_of_2(columns)]
    programs = triton.cdiv(width // 6, _FREQUENCIES) + sum(sizes[::3])
    with torch.cuda.device_of(layers[0][0]):
        _fold_kernel[(programs,)](
            tuple(tensors), tuple(out), alpha, eps,
            COUNT=width // 6, BLOCK=_FREQUENCIES, SIZES=tuple(sizes),
        )  # fmt: skip
    return out


@triton.jit
def _fold_kernel(
    layers,  # per layer weight [ROWS, COLUMNS], bias [ROWS] or None, weight, bias, mean and var of the norm
    out,  # [COUNT] float32, then per layer [ROWS, COLUMNS] and [ROWS] float32
    alpha,
    eps,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZES: tl.constexpr,  # per layer ROWS, COLUMNS, and the latter as a power of two
):
    row = tl.program_id(0) - (COUNT + BLOCK - 1) // BLOCK
    if row < 0:  # alpha^(i / COUNT)
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        exponent = i.to(tl.float64) / COUNT * tl.log2(tl.zeros((BLOCK,), tl.float64) + alpha)
        tl.store(out[0] + i, tl.exp2(exponent).to(tl.float32), i < COUNT)
    for i in tl.static_range(len(SIZES) // 3):
        if (row >= 0) & (row < SIZES[3 * i]):
            _fold_row(
                row, layers[6 * i], layers[6 * i + 1], layers[6 * i + 2], layers[6 * i + 3],
                layers[6 * i + 4], layers[6 * i + 5], out[2 * i + 1], out[2 * i + 2], eps,
                SIZES[3 * i + 1], SIZES[3 * i + 2],
            )  # fmt: skip
        row -= SIZES[3 * i]


@triton.jit
def _fold_row(
    row, weight, bias, norm_weight, norm_bias, mean, var, folded, shift, eps,
    COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.load(norm_weight + row).to(tl.float32) / tl.sqrt_rn(tl.load(var + row).to(tl.float32) + eps)
    at = tl.load(norm_bias + row).to(tl.float32) - tl.load(mean + row).to(tl.float32) * scale
    if bias is not None:
        at += tl.load(bias + row).to(tl.float32) * scale
    tl.store(shift + row, at)
    column = row.to(tl.int64) * COLUMNS + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < COLUMNS
    value = tl.load(weight + column, inside, 0.0).to(tl.float32) * scale
    tl.store(folded + column, value.to(folded.dtype.element_ty), inside)


def _round(weight: Tensor) -> Tensor:
    """Float32 to the nearest TF32; finite values."""
    return ((weight.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def _split(hidden: int) -> tuple[int, int]:
    """Hidden channels as two powers of two (the second may be 0), at least 16 each as products need it."""
    whole = max(16, triton.next_power_of_2(hidden))
    rest = max(16, triton.next_power_of_2(hidden - whole // 2))
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


def _tile(width: int, hidden: list[int], features: Tensor) -> tuple[int, int]:
    """Channels in a chunk and stages of the pipeline, as shared memory allows."""
    size = features.element_size()
    room = 1 << 30
    if features.is_cuda:
        room = triton.runtime.driver.active.utils.get_device_properties(features.device.index)[
            "max_shared_mem"
        ]
    total = sum(sum(_split(count)) for count in hidden)
    chunk, stages = min(128 // size, max(16, triton.next_power_of_2(width))), 3
    # weights of a chunk in every stage, a chunk of rows and the hidden layers on their way between layouts
    while chunk * total * size * stages + _ROWS * (4 * chunk + size * total) > room and chunk * stages > 16:
        chunk, stages = (chunk, stages - 1) if stages > 1 else (chunk // 2, 1)
    return chunk, stages


@triton.jit
def _operand(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """x as an operand of products in `dtype`, rounded to nearest."""
    if dtype == tl.float32 and PRECISION == "tf32" and not _PLAIN:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x.to(dtype)


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _into_hidden(
    x, weight, acc, c, H: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, SIZE] += x [ROWS, CHUNK] weight[FIRST .., c]^T"""
    h = FIRST + tl.arange(0, SIZE)
    at = weight + h[None, :] * WIDTH + c[:, None]
    if FIRST + SIZE <= H and WIDTH % CHUNK == 0:
        part = tl.load(at)
    else:
        part = tl.load(at, (h < H)[None, :] & (c < WIDTH)[:, None], 0.0)
    return tl.dot(x, part, acc, input_precision=PRECISION)


@triton.jit
def _out_of_hidden(
    hidden, weight, acc, c, H: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [ROWS, CHUNK] += hidden [ROWS, SIZE] weight[c, FIRST ..]^T"""
    h = FIRST + tl.arange(0, SIZE)
    at = weight + c[None, :] * H + h[:, None]
    if FIRST + SIZE <= H and WIDTH % CHUNK == 0:
        part = tl.load(at)
    else:
        part = tl.load(at, (h < H)[:, None] & (c < WIDTH)[None, :], 0.0)
    return tl.dot(hidden, part, acc, input_precision=PRECISION)


@triton.jit
def _through(
    x, hiddens, units, c, HIDDEN: tl.constexpr, SPLITS: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Channels c of the rows after COUNT units, whose hidden layers are `hiddens`."""
    for v in tl.static_range(COUNT):
        w = units[4 * v + 2]
        x += tl.load(units[4 * v + 3] + c, c < WIDTH, 0.0)[None, :]
        x = _out_of_hidden(hiddens[2 * v], w, x, c, HIDDEN[v], 0, SPLITS[2 * v], WIDTH, CHUNK, PRECISION)
        if SPLITS[2 * v + 1] > 0:
            x = _out_of_hidden(
                hiddens[2 * v + 1],
                w,
                x,
                c,
                HIDDEN[v],
                SPLITS[2 * v],
                SPLITS[2 * v + 1],
                WIDTH,
                CHUNK,
                PRECISION,
            )
        x = relu(x)
    return x


@triton.jit
def _bias(bias, ROWS: tl.constexpr, FIRST: tl.constexpr, H: tl.constexpr, COLUMNS: tl.constexpr):
    h = FIRST + tl.arange(0, COLUMNS)
    return tl.zeros((ROWS, COLUMNS), tl.float32) + tl.load(bias + h, h < H, 0.0)[None, :]


@triton.jit
def _kernel(
    points,  # [B, N, 3] float32
    features,  # [B, N, WIDTH / 2]
    center,  # [B, S] int64
    neighbor,  # [B, S, K] int64
    divisors,  # [B, S, 3] float32
    table,  # [2, WIDTH] float32
    units,  # per unit [H, WIDTH], [H] float32, [WIDTH, H], [WIDTH] float32
    out,  # [B, S, WIDTH]
    N,
    S,
    G,  # B S
    beta,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,  # H of each unit
    SPLITS: tl.constexpr,  # each H as two powers of two
    GROUPS: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    SINE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    ROWS: tl.constexpr = GROUPS * STEP
    UNITS: tl.constexpr = len(HIDDEN)
    dtype = features.dtype.element_ty
    row = tl.arange(0, ROWS)
    first = tl.program_id(0).to(tl.int64) * GROUPS
    group = tl.minimum(first + row // STEP, G - 1)
    whole = first + tl.arange(0, GROUPS)
    for start in range(0, K, STEP):
        k = tl.minimum(start + row % STEP, K - 1)  # again the last one: no new maximum
        near, middle, x, y, z = geometry(points, center, neighbor, divisors, group, k, beta, N, S, K)
        hiddens = ()
        for u in tl.static_range(UNITS):
            w = units[4 * u]
            a = _bias(units[4 * u + 1], ROWS, 0, HIDDEN[u], SPLITS[2 * u])
            b = _bias(units[4 * u + 1], ROWS, SPLITS[2 * u], HIDDEN[u], max(SPLITS[2 * u + 1], 16))
            for c0 in tl.range(0, WIDTH, CHUNK, num_stages=STAGES):
                c = c0 + tl.arange(0, CHUNK)
                v = columns(features, table, near, middle, x, y, z, c0, WIDTH, CHUNK, SINE)
                v = _through(v, hiddens, units, c, HIDDEN, SPLITS, u, WIDTH, CHUNK, PRECISION)
                v = _operand(v, dtype, PRECISION)
                a = _into_hidden(v, w, a, c, HIDDEN[u], 0, SPLITS[2 * u], WIDTH, CHUNK, PRECISION)
                if SPLITS[2 * u + 1] > 0:
                    b = _into_hidden(
                        v, w, b, c, HIDDEN[u], SPLITS[2 * u], SPLITS[2 * u + 1], WIDTH, CHUNK, PRECISION
                    )
            hidden = (_operand(relu(a), dtype, PRECISION), _operand(relu(b), dtype, PRECISION))
            hiddens = hiddens + hidden  # type: ignore[assignment]
        for c0 in tl.range(0, WIDTH, CHUNK, num_stages=STAGES):
            c = c0 + tl.arange(0, CHUNK)
            v = columns(features, table, near, middle, x, y, z, c0, WIDTH, CHUNK, SINE)
            v = _through(v, hiddens, units, c, HIDDEN, SPLITS, UNITS, WIDTH, CHUNK, PRECISION)
            v = tl.reduce(tl.reshape(v, (GROUPS, STEP, CHUNK)), 1, _largest)
            to = out + whole[:, None] * WIDTH + c[None, :]
            inside = (whole < G)[:, None] & (c < WIDTH)[None, :]
            before = tl.load(to, inside & (start > 0), float("-inf"))
            tl.store(to, _largest(v, before.to(tl.float32)).to(dtype), inside)
        tl.debug_barrier()  # what a thread has stored may be read by another
