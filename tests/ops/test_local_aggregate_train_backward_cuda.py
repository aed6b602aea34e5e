"""Backward passes of local_aggregate on a GPU, each against the CPU's on the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import any2point.ops  # noqa: F401  (registers them)

OPS = torch.ops.any2point
HAS = torch._C._dispatch_has_kernel_for_dispatch_key("any2point::_local_aggregate_out_sums", "CUDA")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not HAS, reason="built without sm_90")]
LOW = (torch.float16, torch.bfloat16)
# Rounding of operands, as the norm of the error by that of the result.
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}
HIDDEN = {192: 96, 384: 192, 768: 32}
# B, N, S, K, C: some with many tiles for each block, some with less than one.
SIZES = [
    (3, 500, 301, 81, 192),
    (1, 90, 33, 100, 192),
    (2, 64, 37, 16, 192),
    (1, 40, 3, 300, 192),
    (2, 30, 5, 7, 192),
    (2, 300, 151, 81, 384),
    (1, 70, 21, 64, 384),
    (1, 60, 5, 100, 384),
    (2, 200, 77, 81, 768),
    (1, 150, 55, 16, 768),
    (1, 9, 2, 7, 768),
]


class Case:
    """Random numbers for every pass; those that the GPU takes in 16 bits are such numbers."""

    def __init__(self, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        self.sizes, self.dtype = sizes, dtype
        self.generator = torch.Generator().manual_seed(sum(sizes))
        batch, _, s, self.neighbors, self.width = sizes
        self.groups, self.hidden = batch * s, HIDDEN[self.width]
        self.rows = self.groups * self.neighbors

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def low(self, *shape: int) -> Tensor:
        return self.normal(*shape).to(self.dtype)

    def hidden_layer(self) -> list[Tensor]:
        before = (self.normal(self.rows, self.hidden) * 1.5 + 0.5).to(self.dtype)
        return [before, self.normal(self.hidden).abs() + 0.2, self.normal(self.hidden) * 0.5]

    def entries(self) -> list[Tensor]:
        batch, _, s, k, width = self.sizes
        grad = self.normal(batch, s, width)
        grad[torch.rand(grad.shape, generator=self.generator) < 0.3] = 0
        argmax = torch.randint(k, grad.shape, generator=self.generator, dtype=torch.int32)
        return [grad.to(self.dtype).float(), argmax]

    def weights(self) -> list[Tensor]:
        """W2 [C, H], its bias, and the mean and 1 / deviation of the product."""
        width = self.width
        weight = self.normal(width, self.hidden) / self.hidden**0.5
        return [weight, self.normal(width), self.normal(width), self.normal(width).abs() + 0.5]

    def built(self) -> list[Any]:
        batch, n, s, k, width = self.sizes
        points = torch.rand(batch, n, 3, generator=self.generator)
        center = torch.stack([torch.randperm(n, generator=self.generator)[:s] for _ in range(batch)])
        neighbor = torch.randint(-1, n, (batch, s, k), generator=self.generator)
        center[0, -1] = -1
        wavelength = torch.rand(width // 6, generator=self.generator) * 200 + 1
        return [points, self.low(batch, n, width // 2), center, neighbor, None, wavelength, 100.0, True]

    def norm(self) -> list[Tensor]:
        ones = [self.normal(self.hidden) * 0.3 for _ in range(5)]
        return [ones[0], ones[1].abs() + 0.5, ones[2] + 1, *ones[3:]]


def to_cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [to_cpu(each) for each in value]
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def to_gpu(value: Any) -> Any:
    if isinstance(value, list):
        return [to_gpu(each) for each in value]
    return value.cuda() if isinstance(value, Tensor) else value


def poisoned(op: Any, args: list[Any], changed: tuple[int, ...] = ()) -> list[Tensor]:
    """What it returns and leaves in `changed` arguments, twice, equal bits, from memory full of NaN."""
    found = []
    for _ in range(2):
        given = to_gpu(args)
        for size in (1 << 8, 1 << 16, 1 << 22, 1 << 26):
            junk = [torch.full((size,), torch.nan, device="cuda") for _ in range(4)]
            del junk
        results = [*op(*given), *(given[i] for i in changed)]
        found.append([tensor.cpu() for tensor in results])
    for first, second in zip(*found):
        assert torch.equal(first, second), "another result from the same numbers"
    return found[0]


def assert_close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    got, want = got.double(), want.double()
    assert got.shape == want.shape, f"{name}: {got.shape}, expected {want.shape}"
    error = (got - want).abs()
    bad = ~(error <= 0.1 * want.abs() + 20 * tolerance * want.abs().mean())
    relative = (error.norm() / want.norm()).item()
    where = bad.nonzero()
    text = f"{name}: error {relative:.2e}, {len(where)} of {bad.numel()} far off"
    for at in where[:3].tolist():
        text += f", {at} {got[tuple(at)]:.5g} for {want[tuple(at)]:.5g}"
    print(text)
    assert relative <= tolerance, text


def summed(parts: Tensor, *shape: int) -> Tensor:
    return parts.double().sum(0)[tuple(slice(size) for size in shape)]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_out_sums(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(sizes, dtype)
    args = [*case.hidden_layer(), *case.entries(), case.neighbors, *case.weights()]
    got = poisoned(OPS._local_aggregate_out_sums, args)
    want = OPS._local_aggregate_out_sums(*to_cpu(args))
    tolerance = TOLERANCE[dtype]
    assert_close("grad", summed(got[0]), summed(want[0]), 1e-5)
    assert_close("grad_normed", summed(got[1]), summed(want[1]), tolerance)
    size = case.width, case.hidden
    assert_close("outer", summed(got[2], *size), summed(want[2], *size), tolerance)


@pytest.mark.parametrize("dense", [False, True], ids=["entries", "dense"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_hidden_grad(sizes: tuple[int, ...], dtype: torch.dtype, dense: bool) -> None:
    case = Case(sizes, dtype)
    if dense and case.width != 192:
        pytest.skip("one unit")
    hidden = case.hidden
    carried = case.normal(case.width, hidden) / hidden**0.5
    rows = case.low(case.rows, case.width)
    du = [None, None, [rows]] if dense else [*case.entries(), []]
    q = case.normal(hidden, hidden) / hidden**0.5 * 1e-4
    weights = [q, case.normal(hidden) * 0.01, carried.T.contiguous() if dense else carried]
    statistics = [case.normal(hidden), case.normal(hidden).abs() + 0.5]
    hidden_layer = case.hidden_layer()
    place = torch.full_like(hidden_layer[0], torch.nan)
    args = [*hidden_layer, *du, case.neighbors, *weights, *statistics, place, []]
    exact = to_cpu(args)
    want = OPS._local_aggregate_hidden_grad(*exact)
    if dense:
        args[5] = [half.contiguous() for half in rows.chunk(2, -1)]
    got = poisoned(OPS._local_aggregate_hidden_grad, args, (len(args) - 2,))
    tolerance = TOLERANCE[dtype]
    assert_close("sum", summed(got[0]), summed(want[0]), tolerance)
    assert_close("sum_normed", summed(got[1]), summed(want[1]), tolerance)
    assert_close("dz", got[2], exact[-2], tolerance)
    if dense:  # in the place of the second half
        given = to_gpu(args)
        given[-2] = given[5][1]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(OPS._local_aggregate_hidden_grad(*given), got))
        assert torch.equal(given[-2].cpu(), got[2])
        return
    given = to_gpu(args)
    given[-2] = given[-2][:0]  # the sums alone
    assert all(torch.equal(a.cpu(), b) for a, b in zip(OPS._local_aggregate_hidden_grad(*given), got))
    if case.width != 192:
        return
    # What there is of dz already, without du; and dy1 in the place of y1.
    part = case.low(case.rows, hidden)
    args[3:5], args[-2] = [None, None], part
    exact[3] = torch.zeros_like(exact[3])
    OPS._local_aggregate_hidden_grad(*exact)
    dz, before, mean = exact[-2], exact[0], exact[-4]
    positive = before * exact[1] + exact[2] > 0
    added = poisoned(OPS._local_aggregate_hidden_grad, args, (len(args) - 2,))
    want_dz = torch.where(positive, dz + part.float(), 0.0).double()
    normed = (before.double() - mean) * exact[-3]
    assert_close("added", added[2], want_dz, tolerance)
    found = added[2].double()  # sums are those of the rounded dz, from which later passes take its mean
    assert_close("sum", summed(added[0]), found.sum(0), 1e-4)
    assert_close("sum_normed", summed(added[1]), (found * normed).sum(0), tolerance)
    norm = [case.normal(hidden) + 1, case.normal(hidden) * 0.3, case.normal(hidden) * 0.3]
    for apart in (False, True):
        given[:5], given[-1] = to_gpu([*hidden_layer, *du[:2]]), to_gpu(norm)
        given[-2] = torch.full_like(given[0], torch.nan) if apart else given[0]
        OPS._local_aggregate_hidden_grad(*given)
        want_dy1 = norm[0] * (got[2].double() - norm[1] - normed * norm[2])
        assert_close("dy1", given[-2].cpu(), want_dy1, tolerance)


def test_small_q() -> None:
    """Below float16's normal numbers, and the only part of the result."""
    case = Case((1, 90, 33, 100, 192), torch.float16)
    grad, argmax = case.entries()
    q = case.normal(96, 96) * 1e-7
    weights = [q, torch.zeros(96), case.normal(192, 96)]
    statistics = [case.normal(96), case.normal(96).abs() + 0.5]
    hidden_layer = case.hidden_layer()
    place = torch.empty_like(hidden_layer[0])
    args = [*hidden_layer, grad * 0, argmax, [], case.neighbors, *weights, *statistics, place, []]
    got = poisoned(OPS._local_aggregate_hidden_grad, args)
    want = OPS._local_aggregate_hidden_grad(*to_cpu(args))
    assert_close("sum", summed(got[0]), summed(want[0]), 1e-3)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rows_grad_of_the_first_unit(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(sizes, dtype)
    before, dz, norm = case.hidden_layer()[0], case.low(case.rows, case.hidden), case.norm()
    weight = case.normal(case.width, case.hidden)
    args = [*case.built(), [], before, *case.entries(), [], dz, norm, weight, []]
    got = poisoned(OPS._local_aggregate_rows_grad, args, (13,))
    want = OPS._local_aggregate_rows_grad(*to_cpu(args))
    mean, deviation, factor, m1, m2 = (each.double() for each in norm)
    normed = (before.double() - mean) * deviation
    assert got[1].dtype == dtype
    tolerance = TOLERANCE[dtype]
    assert_close("dy1", got[1], factor * (dz.double() - m1 - normed * m2), tolerance)
    size = case.hidden, case.width
    assert_close("weight_grad", summed(got[0], *size), summed(want[0], *size), tolerance)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if sizes[-1] == 192], ids=str)
def test_rows_grad_of_another_unit(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(sizes, dtype)
    hidden, width, tolerance = case.hidden, case.width, TOLERANCE[dtype]
    below, weights = case.hidden_layer(), case.weights()
    done = [*below, case.normal(width, hidden) / hidden**0.5, case.normal(width) * 0.3]
    before, dz, norm = case.hidden_layer()[0], case.low(case.rows, hidden), case.norm()
    weight = case.normal(width, hidden) / hidden**0.5
    args = [*case.built(), done, before, *case.entries(), [], dz, norm, weight, weights]
    weight_grad, near, by_group, *got, center = poisoned(OPS._local_aggregate_rows_grad, args, (13,))
    want = OPS._local_aggregate_rows_grad(*to_cpu(args))
    assert_close("weight_grad", summed(weight_grad, hidden, width), summed(want[0], hidden, width), tolerance)
    du, exact = torch.cat([near, center], -1), want[1]
    assert du.dtype == dtype
    groups = center.double().unflatten(0, (case.groups, case.neighbors)).sum(1)
    assert_close("by_group", by_group, groups, 1e-4)
    both = (du != 0) & (exact != 0)
    assert ((du != 0) != (exact != 0)).double().mean() < 5 * tolerance, "another sign of z"
    assert_close("du", du[both], exact[both], tolerance)
    # The sums are of its own du.
    before, scale, shift = below
    h = torch.relu(before.double() * scale + shift).to(dtype).double()
    total, outer = du.double().sum(0), du.double().T @ h
    assert_close("grad", summed(got[0]), total, 1e-4)
    assert_close("outer", summed(got[2], width, hidden), outer, 1e-3)
    last, bias, mean, deviation = (each.double() for each in weights)
    normed = ((last * outer).sum(1) + (bias - mean) * total) * deviation
    assert_close("grad_normed", summed(got[1]), normed, 1e-3)
