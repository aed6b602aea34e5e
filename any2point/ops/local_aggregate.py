"""Local aggregation: neighbours of each centre, with their relative positions, to one feature per centre."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from any2point.ops._checks import (
    check_clouds,
    check_floating,
    check_index,
    check_like,
    check_tensor,
    exporting,
    shape_text,
)
from any2point.ops._local_aggregate_passes import PER_UNIT, SAVED
from any2point.ops._local_aggregate_recompute import is_large
from any2point.ops._local_aggregate_train import forward as train_forward
from any2point.ops._local_aggregate_train import on_hopper
from any2point.ops.group import checked, group
from any2point.reference.batch_norm import BatchNorm, are_shared, over_processes
from any2point.reference.local_aggregate import (
    ResidualUnit,
    group_offsets,
    offset_deviation,
    wavelengths,
)
from any2point.reference.local_aggregate import local_aggregate as _composition

__all__ = ["BatchNorm", "ResidualUnit", "local_aggregate"]

_TRITON = importlib.util.find_spec("triton") is not None


def local_aggregate(
    points: Tensor,
    features: Tensor,
    center: Tensor,
    neighbor: Tensor,
    units: Sequence[ResidualUnit],
    *,
    normalize: str = "scan",
    guard: bool = True,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    alpha: float = 1000.0,
    beta: float = 100.0,
    operand_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> Tensor:
    """Gather K neighbours per centre, add a sinusoid of their offset, apply residual units, take the maximum.

    With `x[b,s,k] = concat(features[neighbor], features[center]) + P(points[neighbor] - points[center])` it
    equals `max_k units(x)`, where `P` is the sinusoidal encoding of the normalised offset and every unit is
    `ReLU(x + BN(Linear(ReLU(BN(Linear(x))))))`.

    Args:
        points: `[B, N, 3]` coordinates, float32 or float64 (float16 and bfloat16 are raised to float32).
        features: `[B, N, C]`; for what happens in float16 and bfloat16 see below.
        center: `[B, S]` int64 or int32, rows of the S centres.
        neighbor: `[B, S, K]`, rows of their neighbours; -1 (missing) counts as the centre itself.
        units: weights of the residual units on `2C` channels; see `ResidualUnit`.
        normalize: "scan" (offsets divided by the largest one of the group, per axis) or "mn40" (by the
            standard deviation of all offsets).
        guard: False gives the official behaviour: 0/0 = NaN for flat groups, and one standard deviation over
            the whole batch.
        training: batch statistics in the batch normalisations, and running ones updated in place.
        momentum: of the running statistics.
        eps: of the batch normalisations.
        alpha: ratio of the sinusoid's longest to its shortest wavelength.
        beta: factor on the normalised offset.
        operand_dtype: torch.float16 allows kernels on sm_90 to round rows, hidden layers and weights to it
            where `features` are float32: to as many bits as TF32 has, but within 65504. Gradients keep the
            range of float32. It has no effect where there are no such kernels. None: operands are as below.
        recompute: keep nothing of the rows for the gradient where they need more than 48 MB, but compute
            them again: less memory, more time, the same results to rounding.

    Returns:
        `[B, S, 2C]` in the dtype of `features`.

    Raises:
        ValueError: shapes, or the options `normalize` and `operand_dtype`, are not as above.
        TypeError: an argument has another dtype than listed.

    Differentiable in: features, points and every weight.
    Deterministic: yes.
    Complexity: O(B S K (C H + C)) time, O(B S K C) memory. On the CPU, in float32 or less, kernels take over:
    evaluation without a gradient to keep needs O(B S C) memory, training O(B S K H) (with several units
    O(B S K C) for a while in backward), unless a gradient of the points is wanted; it differentiates once.
    With `recompute` kernels keep O(B S C) for backward. Inside forward and backward they need a hidden layer
    of all rows, O(B S K H), and the rows of some clouds at a time, 48 MB or those of one cloud (from three
    units on O(B S K C)). The composition needs what it would without while it differentiates, and in a graph
    of `torch.compile` `recompute` leaves it as it is.
    On CUDA (sm_80 and newer, with Triton) kernels evaluate, and train in as much memory; on sm_90 in float16
    and bfloat16 faster ones do it for units of (2C, H) = (192, 96) twice, (384, 192) or (768, 32). On other
    GPUs, and for a gradient of the points, training is the composition. Statistics may be shared by processes
    in all cases.

    Precision: on CUDA the kernels multiply in the dtype of `features` and add up in float32. float16 and
    bfloat16 round rows, hidden layers and weights to their own precision (float16 overflows beyond 65504);
    float32 is as accurate as float32 products, or TF32 where torch allows that for products
    (`torch.backends.cuda.matmul.fp32_precision`, `torch.set_float32_matmul_precision`). Offsets are float32.
    On the CPU bfloat16 is rounded in the same way in evaluation (without gradients to keep) where products of
    it are the faster ones: with AMX, or with AVX512_BF16 on AMD's; results differ between such CPUs and
    others. Elsewhere, and in training, float16 and bfloat16 are computed in float32 and rounded at the end.
    Under autocast (on the CPU: in evaluation within `torch.no_grad()`) float32 features are rounded to its
    dtype, which is then that of the result.

    Source: Point-NN / Point-PN (Zhang et al., CVPR 2023), LGA module; Any2Point (Tang et al., ECCV 2024).

    Example:
        >>> norm = lambda c: BatchNorm(torch.ones(c), torch.zeros(c), torch.zeros(c), torch.ones(c))
        >>> unit = ResidualUnit(torch.randn(6, 12), None, norm(6), torch.randn(12, 6), None, norm(12))
        >>> points, center = torch.rand(1, 32, 3), torch.arange(8)[None]
        >>> neighbor = knn(points[:, :8], points, 4).index
        >>> local_aggregate(points, torch.rand(1, 32, 6), center, neighbor, [unit]).shape
        torch.Size([1, 8, 12])
    """
    points = check_clouds(points).points
    features = check_tensor("features", features, dims=3, layout="[B, N, C]")
    check_floating("features", features)
    check_like("features", features, "points", points, dtype=False)
    if points.shape[-1] != 3:
        raise ValueError(f"points: expected shape [B, N, 3], got {shape_text(points)}")
    if features.shape[:2] != points.shape[:2]:
        expected = f"[{points.shape[0]}, {points.shape[1]}, C]"
        raise ValueError(f"features: expected shape {expected} as in `points`, got {shape_text(features)}")
    # On the CPU rounding has a use in evaluation alone.
    evaluates = features.device.type == "cpu" and not (training or torch.is_grad_enabled())
    if features.dtype == torch.float32 and (features.is_cuda or evaluates):
        device = features.device.type
        if torch.is_autocast_enabled(device):
            features = features.to(torch.get_autocast_dtype(device))
    center = check_index("center", center, like=points, like_name="points")
    neighbor = check_index("neighbor", neighbor, like=points, like_name="points")
    if center.dim() != 2 or center.shape[0] != points.shape[0]:
        raise ValueError(f"center: expected shape [{points.shape[0]}, S], got {shape_text(center)}")
    if neighbor.dim() != 3 or neighbor.shape[:2] != center.shape or neighbor.shape[2] == 0:
        expected = f"[{center.shape[0]}, {center.shape[1]}, K] with K > 0"
        raise ValueError(f"neighbor: expected shape {expected}, got {shape_text(neighbor)}")
    if normalize not in ("scan", "mn40"):
        raise ValueError(f"normalize: expected 'scan' or 'mn40', got {normalize!r}")
    if operand_dtype not in (None, torch.float16):
        raise ValueError(f"operand_dtype: expected None or torch.float16, got {operand_dtype}")
    width = 2 * features.shape[-1]
    for unit in units:
        if unit.in_weight.shape[-1] != width or unit.out_weight.shape[0] != width:
            got = f"{shape_text(unit.in_weight)} and {shape_text(unit.out_weight)}"
            raise ValueError(f"units: expected weights [H, {width}] and [{width}, H], got {got}")
    half = operand_dtype is not None and features.is_cuda and features.dtype == torch.float32
    half = half and on_hopper(features, [len(unit.in_weight) for unit in units], torch.float16)
    if _is_fused(points, features, neighbor, units, training, half):
        divisor = None
        if normalize == "mn40":
            offset = group_offsets(points, center, neighbor, group)
            divisor = offset_deviation(offset, guard=guard).expand(points.shape[0]).contiguous()
        # On the CPU bfloat16 has kernels of its own in evaluation.
        low = features.dtype == torch.bfloat16 and not training
        operand = features if features.is_cuda or low else features.float()
        if half and not training:  # the op for training rounds float32 itself, for the sake of its gradient
            operand = features.half()
        rows = (points.contiguous(), operand.contiguous(), center, neighbor, divisor)
        if training:
            wavelength = wavelengths(width, alpha, like=points)
            return _train((*rows, wavelength), units, beta, guard, half, momentum, eps, recompute).to(
                features.dtype
            )
        return _evaluate(rows, units, alpha, beta, guard, eps).to(features.dtype)
    # cuBLAS rounds otherwise for strided weights and biases; statistics are updated in place and stay.
    units = [
        unit._replace(
            in_weight=unit.in_weight.contiguous(),
            in_bias=None if unit.in_bias is None else unit.in_bias.contiguous(),
            out_weight=unit.out_weight.contiguous(),
            out_bias=None if unit.out_bias is None else unit.out_bias.contiguous(),
        )
        for unit in units
    ]
    step = functools.partial(
        _composition,
        points.contiguous(),
        features.contiguous(),
        center,
        neighbor,
        normalize=normalize,
        guard=guard,
        training=training,
        momentum=momentum,
        eps=eps,
        alpha=alpha,
        beta=beta,
        group=group,
    )
    if recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _recomputed(step, units)
    return step(units)


def _recomputed(step: Callable[[list[ResidualUnit]], Tensor], units: list[ResidualUnit]) -> Tensor:
    """`step(units)` that is computed again for the gradient, without an update of running statistics."""

    def copied(norm: BatchNorm) -> BatchNorm:
        return norm._replace(running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone())

    copies = [unit._replace(in_norm=copied(unit.in_norm), out_norm=copied(unit.out_norm)) for unit in units]
    passes = [units]
    result: Tensor = checkpoint(
        lambda: step(passes.pop() if passes else copies), use_reentrant=False, preserve_rng_state=False
    )
    return result


def _is_fused(
    points: Tensor,
    features: Tensor,
    neighbor: Tensor,
    units: Sequence[ResidualUnit],
    training: bool,
    half: bool,
) -> bool:
    """Whether kernels can take over; exported graphs are for any device. `half`: with float16 operands."""
    if exporting():
        return False
    if features.is_cuda:
        if training:
            hidden = [unit.in_weight.shape[0] for unit in units]
            # Rows of all groups are numbered in 32 bits, those of a group in 15 (of which some are infinite).
            small = neighbor.numel() < 1 << 31 and neighbor.shape[2] < 31744
            small = small and features[..., 0].numel() < 1 << 31
            hopper = half or on_hopper(features, hidden, features.dtype)
            if not small or not (hopper or (_TRITON and all((features.shape[-1], *hidden)))):
                return False
        elif not units or not _TRITON:
            return False
        if torch.cuda.get_device_properties(features.device).major < 8:
            return False
    elif features.device.type != "cpu":
        return False
    layers = [(u.in_weight, u.in_bias, *u.in_norm, u.out_weight, u.out_bias, *u.out_norm) for u in units]
    tensors = [points, features, *(tensor for layer in layers for tensor in layer if tensor is not None)]
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    if training:  # gradients of everything but the points; statistics of at least two rows
        moving = torch.is_grad_enabled() and points.requires_grad
        return len(units) > 0 and neighbor.numel() > 1 and not moving
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


# points, features, center, neighbor, divisor, wavelength
Rows = tuple[Tensor, Tensor, Tensor, Tensor, "Tensor | None", Tensor]


def _train(
    rows: Rows,
    units: Sequence[ResidualUnit],
    beta: float,
    guard: bool,
    half: bool,
    momentum: float,
    eps: float,
    recompute: bool,
) -> Tensor:
    parameters: list[Tensor] = []
    for unit in units:
        for weight, bias, norm in (
            (unit.in_weight, unit.in_bias, unit.in_norm),
            (unit.out_weight, unit.out_bias, unit.out_norm),
        ):
            bias = weight.new_zeros(len(weight)) if bias is None else bias
            parameters += [tensor.float().contiguous() for tensor in (weight, bias, norm.weight, norm.bias)]
    size = 2 if half else rows[1].element_size()
    recompute = recompute and is_large(
        rows[3].numel(), [len(w) for w in parameters[::PER_UNIT]], 2 * rows[1].shape[2], size
    )
    out, _, *saved = checked(train_forward, *rows, beta, guard, eps, half, parameters, recompute)
    count: float | Tensor = rows[3].numel()
    if are_shared():
        (count,) = over_processes(out.new_full((), count, dtype=torch.float64))
    running: list[Tensor] = []
    means: list[Tensor] = []
    deviations: list[Tensor] = []
    for unit, statistics in zip(units, zip(*[iter(saved)] * SAVED)):
        singles = (statistics[3][2:], statistics[9])
        for norm, (mean, deviation) in zip((unit.in_norm, unit.out_norm), singles):
            running += [norm.running_mean, norm.running_var]
            means.append(mean)
            deviations.append(deviation)
    with torch.no_grad():
        variances = torch._foreach_sub(torch._foreach_pow(deviations, -2.0), eps)
        torch._foreach_mul_(variances, count / (count - 1))
        batch = [x for pair in zip(means, variances) for x in pair]
        torch._foreach_lerp_(running, [x.to(y.dtype) for x, y in zip(batch, running)], momentum)
    return out


def _evaluate(
    rows: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    units: Sequence[ResidualUnit],
    alpha: float,
    beta: float,
    guard: bool,
    eps: float,
) -> Tensor:
    width = 2 * rows[1].shape[-1]
    layers = [
        layer
        for unit in units
        for layer in (
            (unit.in_weight, unit.in_bias, unit.in_norm),
            (unit.out_weight, unit.out_bias, unit.out_norm),
        )
    ]
    if rows[1].is_cuda:
        tensors = [tensor for weight, bias, norm in layers for tensor in (weight, bias, *norm)]
        there = [tensor is not None for tensor in tensors]
        given = [tensor for tensor in tensors if tensor is not None]
        wavelength, *folded = _fold_layers(given, there, width, alpha, eps, rows[1])
    else:
        wavelength = wavelengths(width, alpha, like=rows[0])
        folded = [tensor for layer in layers for tensor in _fold(*layer, eps)]
    return checked(torch.ops.any2point._local_aggregate.default, *rows, wavelength, folded, beta, guard)


def _fold(weight: Tensor, bias: Tensor | None, norm: BatchNorm, eps: float) -> list[Tensor]:
    """Weight and bias of a linear layer with the batch normalisation after it."""
    scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + eps)
    shift = norm.bias.float() - norm.running_mean.float() * scale
    if bias is not None:
        shift = shift + bias.float() * scale
    return [(weight.float() * scale[:, None]).contiguous(), shift]


@torch.library.custom_op("any2point::_fold_layers", mutates_args=(), device_types="cuda")
def _fold_layers(
    tensors: list[Tensor], there: list[bool], width: int, alpha: float, eps: float, like: Tensor
) -> list[Tensor]:
    """`wavelengths`, and `_fold` of all layers with weights in the dtype of `like`, in one launch.

    A layer has a weight, a bias and four tensors of its normalisation; `there` says which are in `tensors`.
    """
    from any2point.triton.local_aggregate import fold

    left = iter(tensors)
    six = zip(*[iter([next(left) if is_there else None for is_there in there])] * 6)
    layers = [(weight, bias, BatchNorm(*norm)) for weight, bias, *norm in six]
    return fold(layers, width, alpha, eps, like.dtype)


@_fold_layers.register_fake
def _(
    tensors: list[Tensor], there: list[bool], width: int, alpha: float, eps: float, like: Tensor
) -> list[Tensor]:
    wavelength = like.new_empty(width // 6, dtype=torch.float32)
    return [wavelength] + [
        tensor
        for weight in tensors
        if weight.dim() == 2
        for tensor in (
            weight.new_empty(weight.shape, dtype=like.dtype),
            weight.new_empty(len(weight), dtype=torch.float32),
        )
    ]


@torch.library.register_fake("any2point::_local_aggregate")
def _fake(
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
    return features.new_empty(*center.shape, 2 * features.shape[-1])


torch.library.register_fake("any2point::_local_aggregate_hopper")(_fake)


def _cuda(
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
    if on_hopper(features, [len(bias) for bias in units[1::4]], features.dtype):
        features = features.contiguous()
        if features.data_ptr() % 16:
            features = features.clone()
        units = [tensor.to(features.dtype) if i % 2 == 0 else tensor for i, tensor in enumerate(units)]
        return torch.ops.any2point._local_aggregate_hopper.default(
            points.contiguous(), features, center, neighbor, divisor, wavelength, units, beta, guard
        )

    from any2point.triton.local_aggregate import local_aggregate

    return local_aggregate(points, features, center, neighbor, divisor, wavelength, units, beta, guard)


if _TRITON:
    torch.library.impl("any2point::_local_aggregate", "CUDA")(_cuda)
