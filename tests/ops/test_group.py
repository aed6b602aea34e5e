"""group: the contract, then sizes, dtypes and broken indices; and the inverse list behind every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_contract import OpContract, Sample

from any2point import ops, reference


class TestGroup(OpContract):
    op = staticmethod(ops.group)
    reference = staticmethod(reference.group)
    differentiable = ("features",)
    double_backward = True

    def samples(self, device: str) -> Iterator[Sample]:
        def sample(name: str, features: tuple[int, ...], index: tuple[int, ...]) -> Sample:
            rows = features[-2]
            kwargs = dict(features=torch.randn(features), index=torch.randint(-1, max(rows, 1), index))
            if rows == 0:
                kwargs["index"].fill_(-1)
            return Sample(name, kwargs).to(device)

        yield sample("plain", (2, 9, 5), (2, 4, 3))
        yield sample("packed", (13, 8), (3, 2, 4))
        for channels in (1, 3, 8, 96, 97):
            yield sample(f"C = {channels}", (2, 11, channels), (2, 7, 3))
        yield sample("one index a cloud", (3, 5, 4), (3, 1))
        yield sample("one index", (5, 4), (1,))
        yield sample("a single packed row", (5, 4), ())
        yield sample("no rows", (2, 0, 4), (2, 3, 2))
        yield sample("no clouds", (0, 5, 4), (0, 3, 2))
        yield sample("no centres", (2, 5, 4), (2, 0, 2))
        yield sample("no neighbours", (2, 5, 4), (2, 3, 0))
        yield sample("no channels", (2, 5, 0), (2, 3, 2))
        yield sample("more rows than entries", (2, 300, 4), (2, 3))
        short = sample("int32 index", (2, 9, 6), (2, 4, 3))
        yield Sample(short.name, short.kwargs | dict(index=short.kwargs["index"].int()))

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        index = torch.tensor([[[0, 3, -1], [3, 3, 1]]])
        yield Sample("padded", dict(features=torch.randn(1, 4, 2).double(), index=index)).to(device)
        yield Sample("packed", dict(features=torch.randn(5, 2).double(), index=index[0])).to(device)

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        yield dict(features=[1.0]), TypeError, r"features: expected a tensor"
        yield dict(features=torch.zeros(4)), ValueError, r"features: expected shape \[B, N, C\]"
        yield dict(features=torch.zeros(2, 9, 5).cfloat()), TypeError, r"features: expected a floating"
        yield dict(index=[0]), TypeError, r"index: expected an int64 tensor"
        yield dict(index=torch.zeros(2, 4, 3)), TypeError, r"index: expected int64"
        yield (
            dict(index=torch.zeros(3, 4, 3).long()),
            ValueError,
            r"index: expected shape \[B, ...\] with B = 2",
        )
        yield dict(index=torch.zeros(2).long()), ValueError, r"index: expected shape \[B, ...\]"
        yield dict(index=torch.zeros(2, 4, 3, device="meta").long()), ValueError, r"index: expected .* on cpu"
        yield dict(index=torch.full((2, 4, 3), 9)), ValueError, r"^index: expected values in -1..8, got 9 at"
        yield dict(index=torch.full((2, 4, 3), -2)), ValueError, r"^index: expected values in -1..8, got -2"


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("channels", [1, 3, 16])
def test_integers(device: str, dtype: torch.dtype, channels: int) -> None:
    features = torch.randint(0, 100, (2, 9, channels)).to(dtype)
    index = torch.randint(-1, 9, (2, 5, 4))
    got = ops.group(features.to(device), index.to(device))
    assert got.dtype == dtype
    assert torch.equal(got.cpu(), reference.group(features, index))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_copied_bit_by_bit(device: str, dtype: torch.dtype) -> None:
    features = torch.randn(6, 7).to(dtype)
    features[2, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]).to(dtype)
    got = ops.group(features.to(device), torch.arange(6, device=device)).cpu()
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(got.view(whole), features.view(whole))


def test_first_wrong_index_is_named() -> None:
    features, index = torch.zeros(3, 40, 2), torch.zeros(3, 50000, dtype=torch.int64)
    index[1, 7], index[2, 49999] = 40, -5
    for _ in range(5):
        with pytest.raises(ValueError, match=r"got 40 at position 50007"):
            ops.group(features, index)
    with pytest.raises(RuntimeError, match=r"index: expected values in -1..39"):
        torch.ops.any2point._group_backward(torch.zeros(3, 50000, 1), index, 40)


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_wrong_index_on_cuda(dtype: torch.dtype, channels: int) -> None:
    """NaN rows (zero for integers) without a gradient, nothing out of bounds."""
    features = torch.ones(2, 6, channels, device="cuda", dtype=dtype)
    index = torch.tensor([[0, 6, -1, -2, 5], [2**40, -(2**60), 3, 1 << 32, 4]], device="cuda")
    wrong = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 0, 1, 0]], dtype=torch.bool)
    if dtype.is_floating_point:
        features.requires_grad_()
    got = ops.group(features, index)
    filler = torch.nan if dtype.is_floating_point else 0
    want = torch.ones(2, 5, channels, dtype=dtype)
    want[0, 2], want[wrong] = 0, filler
    torch.testing.assert_close(got.detach().cpu(), want, rtol=0, atol=0, equal_nan=True)
    if dtype.is_floating_point:
        got.sum().backward()
        assert features.grad is not None
        assert float(features.grad.sum()) == 4 * channels


def test_offset_storage(device: str) -> None:
    """Rows that begin off the 16-byte grid take the narrow path and give the same."""
    buffer = torch.randn(2 * 9 * 8 + 1, device=device)
    features = buffer[1:].view(2, 9, 8)
    index = torch.randint(0, 9, (2, 6), device=device)
    assert torch.equal(ops.group(features, index), ops.group(features.clone(), index))
    grad = torch.randn(2 * 6 * 8 + 1, device=device)[1:].view(2, 6, 8)
    backward = torch.ops.any2point._group_backward
    assert torch.equal(backward(grad, index, 9), backward(grad.clone(), index, 9))


# The counting sort's chunks and rows, the radix sort beyond them, and few rows with many entries.
@pytest.mark.parametrize("entries", [0, 1, 31, 33, 1023, 1025, 3000])
@pytest.mark.parametrize("rows", [1, 2, 33, 300, 2048, 2049, 5000])
@pytest.mark.parametrize("clouds", [1, 3])
def test_gradient_adds_up(device: str, clouds: int, rows: int, entries: int) -> None:
    """Against index_add on whole numbers, where every order gives the same sum."""
    index = torch.randint(-1, rows, (clouds, entries))
    index[:, : entries // 3] = index[:, : entries // 3] % min(rows, 2)  # some rows take very many
    grad = torch.randint(-8, 9, (clouds, entries, 3)).float()
    got = torch.ops.any2point._group_backward(grad.to(device), index.to(device), rows)
    want = torch.zeros(clouds, rows + 1, 3)
    for b in range(clouds):
        want[b].index_add_(0, torch.where(index[b] < 0, rows, index[b]), grad[b])
    assert torch.equal(got.cpu(), want[:, :rows])


@pytest.mark.parametrize("channels", [1, 4, 7, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_of_few_rows(device: str, dtype: torch.dtype, channels: int) -> None:
    """Sums of thousands, which must not be taken in 16 bits."""
    index = torch.randint(-1, 2, (1, 20000), device=device)
    grad = torch.randint(0, 2, (1, 20000, channels), device=device).to(dtype)
    got = torch.ops.any2point._group_backward(grad, index, 2)
    for row in range(2):
        want = grad[index == row].double().sum(0).to(dtype)
        assert torch.equal(got[0, row], want)


def test_gradient_does_not_depend_on_threads() -> None:
    index, grad = torch.randint(-1, 50, (3, 4000)), torch.randn(3, 4000, 33)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(torch.ops.any2point._group_backward(grad, index, 50))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradient_of_an_expanded_sum(device: str) -> None:
    features = torch.randn(2, 9, 5, device=device, requires_grad=True)
    ops.group(features, torch.arange(4, device=device).expand(2, 3, 4)).sum().backward()
    want = torch.zeros(2, 9, 5)
    want[:, :4] = 3
    assert features.grad is not None
    assert torch.equal(features.grad.cpu(), want)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    channels, entries, rows = 512, (1 << 31) // 512 + 1000, 4096
    features = torch.randn(rows, channels, device="cuda", dtype=torch.float16)
    index = torch.arange(entries, device="cuda") % rows
    got = ops.group(features, index)
    for begin in (0, entries // 2, entries - 1000):
        assert torch.equal(got[begin : begin + 1000], features[index[begin : begin + 1000]])
    del got
    grad = torch.ones(1, entries, channels, device="cuda", dtype=torch.float16)
    sums = torch.ops.any2point._group_backward(grad, index[None], rows)
    counts = torch.bincount(index, minlength=rows).half()
    assert torch.equal(sums[0], counts[:, None].expand(rows, channels))


@pytest.mark.parametrize("rows", [1, 1000, 1024, 1025, 2047, 2048, 2049])
@pytest.mark.parametrize("entries", [4096, 9001])
def test_gradient_of_long_and_uneven_lists(rows: int, entries: int, device: str) -> None:
    """Lists built by several blocks, half of their entries at one row: whole numbers, so sums are exact."""
    index = torch.randint(-1, rows, (2, entries))
    index[:, ::2] = rows // 2
    features = torch.zeros(2, rows, 5, device=device, requires_grad=True)
    grad = torch.randint(-9, 10, (2, entries, 5)).float()
    (found,) = torch.autograd.grad(ops.group(features, index.to(device)), features, grad.to(device))
    wanted = torch.zeros(2, rows + 1, 5)
    for total, at, part in zip(wanted, index, grad):
        total.index_add_(0, at + 1, part)  # row 0: no row
    assert torch.equal(found.cpu(), wanted[:, 1:])


@pytest.mark.parametrize("entries", [1, 7, 33, 300])
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 64, 96, 97, 200])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.float64])
def test_rows_of_every_width(entries: int, channels: int, dtype: torch.dtype, device: str) -> None:
    features = torch.randint(0, 100, (3, 50, channels)).to(dtype)
    index = torch.randint(0, 50, (3, entries))
    got = ops.group(features.to(device), index.to(device))
    assert torch.equal(got.cpu(), features[torch.arange(3)[:, None], index])
