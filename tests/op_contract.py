"""The battery that every op inherits: what `any2point.ops` promises of each of its functions.

A test class derives from OpContract, says which function and which reference it means, and gives samples:

    class TestKnn(OpContract):
        op = staticmethod(ops.knn)
        reference = staticmethod(reference.knn)
        differentiable = ("query", "points")

        def samples(self, device): yield Sample("odd", dict(query=..., points=..., k=3))
        def bad_inputs(self): yield dict(query=...), ValueError, r"query: expected"

Edge cases of the op itself stand in its own test file, next to the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

# (relative, absolute) for floating results against the reference, by dtype of the arguments
TOLERANCES = {
    torch.float64: (1e-10, 1e-12),
    torch.float32: (1e-5, 1e-6),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}


@dataclass
class Sample:
    """One call of an op: a name for messages and its keyword arguments."""

    name: str
    kwargs: dict[str, Any] = field(repr=False)

    def to(self, *args: Any) -> Sample:
        def move(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if args and isinstance(args[0], torch.dtype) and not x.is_floating_point():
                return x
            return x.to(*args)

        return Sample(self.name, tree_map(move, self.kwargs))


def tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)]


def assert_same(got: Any, want: Any, note: str = "") -> None:
    """Bit equality, NaN equal to NaN."""
    got, want = tensors(got), tensors(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        torch.testing.assert_close(
            a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{note}: {m}"
        )


def assert_within_twice(got: Tensor, plain: Tensor, exact: Tensor, note: str) -> None:
    """Root mean square errors of two results in low precision: `got` at most twice that of `plain`."""
    finite = exact.cpu().isfinite()
    assert torch.equal(got.cpu().isfinite(), finite), note
    errors = [(x.cpu().double() - exact.cpu().double())[finite].square() for x in (got, plain)]
    mine, other = (float(error.mean().sqrt()) if error.numel() else 0.0 for error in errors)
    assert mine <= 2 * other + 1e-7, f"{note}: error {mine:.2e}, of plain PyTorch {other:.2e}"


class Recorder(TorchDispatchMode):
    """Collects the any2point ops that a public function calls, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "any2point":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class OpContract:
    op: Callable[..., Any]
    reference: Callable[..., Any]
    differentiable: tuple[str, ...] = ()  # arguments that gradients reach
    low_precision: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    double_backward = False
    compiles = True
    registered = True  # the function ends in torch.ops.any2point.*; False for compositions of torch ops

    def samples(self, device: str) -> Iterator[Sample]:
        """Small float32 calls: odd sizes, empties, ties, lengths, offsets. The first is the plainest."""
        raise NotImplementedError

    def bad_inputs(self) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
        """(changes to the first sample's arguments, exception, pattern of its message)."""
        raise NotImplementedError

    def gradient_samples(self, device: str) -> Iterator[Sample]:
        """Tiny float64 calls for gradcheck, away from ties and kinks. Default: the first sample."""
        yield next(self.samples(device)).to(torch.float64)

    # What a result is compared by. Ops with index results keep the default (exact) for integer tensors.
    def compare(self, got: Any, want: Any, dtype: torch.dtype, note: str) -> None:
        rtol, atol = TOLERANCES[dtype]
        for a, b in zip(tensors(got), tensors(want), strict=True):
            exact = not a.is_floating_point()
            torch.testing.assert_close(
                a, b.to(a.dtype), rtol=0 if exact else rtol, atol=0 if exact else atol, equal_nan=True,
                check_device=False, msg=lambda m: f"{note}: {m}",
            )  # fmt: skip

    def call(self, sample: Sample) -> Any:
        return type(self).op(**sample.kwargs)

    def test_matches_reference(self, device: str) -> None:
        for sample in self.samples(device):
            want = type(self).reference(**sample.to("cpu").kwargs)
            self.compare(self.call(sample), tree_map(lambda x: x, want), torch.float32, sample.name)

    def test_matches_reference_in_float64(self, device: str) -> None:
        for sample in self.samples(device):
            sample = sample.to(torch.float64)
            want = type(self).reference(**sample.to("cpu").kwargs)
            self.compare(self.call(sample), want, torch.float64, sample.name)

    def test_low_precision(self, device: str) -> None:
        """The result for rounded inputs is the rounded result for the same inputs in float32."""
        for dtype in self.low_precision:
            for sample in self.samples(device):
                low = sample.to(dtype)
                want = self.call(low.to(torch.float32))
                self.compare(self.call(low), want, dtype, f"{sample.name} in {dtype}")

    def test_error_in_low_precision(self, device: str) -> None:
        """No further from the exact result than twice what plain PyTorch is in the same precision."""
        for dtype in self.low_precision:
            for sample in self.samples(device):
                low = sample.to(dtype)
                low_cpu = low.to("cpu")
                exact = type(self).reference(**low_cpu.to(torch.float64).kwargs)
                got, plain = self.call(low), type(self).reference(**low_cpu.kwargs)
                for x, y, z in zip(tensors(got), tensors(plain), tensors(exact), strict=True):
                    if x.is_floating_point():
                        assert_within_twice(x, y, z, f"{sample.name} in {dtype}")

    def test_non_contiguous(self, device: str) -> None:
        def scatter(x: Any) -> Any:  # same values, every second element of a larger buffer
            if not isinstance(x, Tensor) or x.dim() == 0:
                return x
            wide = torch.empty(*x.shape[:-1], x.shape[-1], 2, dtype=x.dtype, device=x.device)
            wide[..., 0] = x
            return wide[..., 0]

        for dtype in (torch.float32, *self.low_precision):
            for sample in self.samples(device):
                sample = sample.to(dtype)
                other = Sample(sample.name, tree_map(scatter, sample.kwargs))
                assert_same(self.call(other), self.call(sample), f"{sample.name} in {dtype}")

    def test_deterministic_and_fully_written(self, device: str) -> None:
        """Same bits on every run, also when torch fills fresh memory with NaN and when it does not."""
        for sample in self.samples(device):
            want = self.call(sample)
            torch.use_deterministic_algorithms(True)
            try:
                assert_same(self.call(sample), want, sample.name)
            finally:
                torch.use_deterministic_algorithms(False)

    def test_inputs_are_not_changed(self, device: str) -> None:
        for sample in self.samples(device):
            before = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, sample.kwargs)
            self.call(sample)
            assert_same(sample.kwargs, before, sample.name)

    def _with_grad(self, sample: Sample) -> tuple[Sample, list[Tensor]]:
        kwargs = dict(sample.kwargs)
        for name in self.differentiable:
            kwargs[name] = kwargs[name].detach().clone().requires_grad_()
        return Sample(sample.name, kwargs), [kwargs[name] for name in self.differentiable]

    def _floating_output(self, sample: Sample) -> tuple[Tensor, ...]:
        return tuple(x for x in tensors(self.call(sample)) if x.is_floating_point() and x.requires_grad)

    def test_gradcheck(self, device: str) -> None:
        if not self.differentiable:
            pytest.skip("no gradient")
        for sample in self.gradient_samples(device):
            graded, leaves = self._with_grad(sample)

            def function(*values: Tensor, graded: Sample = graded) -> tuple[Tensor, ...]:
                changed = graded.kwargs | dict(zip(self.differentiable, values))
                # Padding may be infinite: a constant, which differences of infinities cannot show.
                outputs = self._floating_output(Sample(graded.name, changed))
                return tuple(torch.where(x.isfinite(), x, 0.0) for x in outputs)

            assert torch.autograd.gradcheck(function, leaves), sample.name
            if self.double_backward:
                assert torch.autograd.gradgradcheck(function, leaves), sample.name

    def test_gradient_deterministic(self, device: str) -> None:
        if not self.differentiable:
            pytest.skip("no gradient")
        for sample in self.samples(device):
            results = []
            for _ in range(2):
                graded, leaves = self._with_grad(sample)
                outputs = [x for x in self._floating_output(graded) if x.numel()]
                if outputs:
                    finite = [torch.where(x.isfinite(), x, 0.0).square().sum() for x in outputs]
                    results.append(torch.autograd.grad(sum(finite), leaves, allow_unused=True))
            if results:
                assert_same(results[0], results[1], sample.name)

    def test_gradient_in_low_precision(self, device: str) -> None:
        """In the dtype of the inputs; no further from the exact one than twice what plain PyTorch is."""
        if not self.differentiable:
            pytest.skip("no gradient")

        def gradients(function: Callable[..., Any], sample: Sample) -> tuple[Tensor | None, ...]:
            graded, leaves = self._with_grad(sample)
            outputs = [x for x in tensors(function(**graded.kwargs)) if x.requires_grad and x.numel()]
            # Eighths: the same in every dtype.
            incoming = [
                (torch.arange(x.numel(), device=x.device) * 7 % 17 - 8).view(x.shape).to(x.dtype) / 8
                for x in outputs
            ]
            if not outputs:
                return (None,) * len(leaves)
            return torch.autograd.grad(outputs, leaves, incoming, allow_unused=True)

        op, reference = type(self).op, type(self).reference
        for dtype in self.low_precision:
            for sample in self.samples(device):
                low = sample.to(dtype)
                exact = gradients(reference, low.to("cpu").to(torch.float64))
                plain = gradients(reference, low.to("cpu"))
                for x, y, z in zip(gradients(op, low), plain, exact, strict=True):
                    if x is not None and y is not None and z is not None:
                        assert x.dtype == dtype
                        assert_within_twice(x, y, z, f"{sample.name} in {dtype}")

    def test_opcheck(self, device: str) -> None:
        if not self.registered:
            pytest.skip("composed of torch ops")
        for sample in list(self.samples(device))[:3]:
            graded, _ = self._with_grad(sample)
            for candidate in (sample, graded) if self.differentiable else (sample,):
                with Recorder() as recorder:
                    self.call(candidate)
                assert recorder.calls, "the function called no any2point op"
                for func, args, kwargs in recorder.calls:
                    if candidate is graded:
                        args = tuple(
                            a.detach().clone().requires_grad_()
                            if isinstance(a, Tensor) and a.is_floating_point()
                            else a
                            for a in args
                        )
                    torch.library.opcheck(func, args, kwargs)

    def test_compiles_without_breaks(self, device: str) -> None:
        if not self.compiles:
            pytest.skip("not compiled")
        torch._dynamo.reset()
        # The roundings of a composition under Inductor are Inductor's; an op's own are part of its contract.
        backend = "inductor" if device == "cuda" and self.registered else "aot_eager"
        for dynamic in (False, True):
            compiled = torch.compile(
                lambda kw: type(self).op(**kw), fullgraph=True, dynamic=dynamic, backend=backend
            )
            for sample in list(self.samples(device))[:2]:
                self.compare(compiled(dict(sample.kwargs)), self.call(sample), torch.float32, sample.name)

    def test_bad_inputs(self) -> None:
        first = next(self.samples("cpu"))
        for changes, exception, pattern in self.bad_inputs():
            with pytest.raises(exception, match=pattern):
                self.call(Sample("bad", first.kwargs | changes))

    def test_documented(self) -> None:
        text = inspect.getdoc(type(self).op) or ""
        for word in ("Args:", "Returns:", "Raises:", "Deterministic:", "Complexity:", "Example"):
            assert word in text, f"the docstring lacks {word!r}"

    @pytest.mark.gpu
    def test_cpu_and_cuda_agree(self) -> None:
        for sample in self.samples("cpu"):
            got, want = self.call(sample.to("cuda")), self.call(sample)
            for a, b in zip(tensors(got), tensors(want), strict=True):
                exact = not a.is_floating_point()
                rtol, atol = (0, 0) if exact else TOLERANCES[torch.float32]
                torch.testing.assert_close(
                    a.cpu(), b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, s=sample: f"{s.name}: {m}"
                )

    @pytest.mark.gpu
    def test_cuda_graph(self) -> None:
        """Captured once, replayed on new data; capture fails on any synchronisation."""
        sample = next(self.samples("cuda"))
        want = self.call(sample)
        static = Sample(
            sample.name, tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, sample.kwargs)
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.call(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        for x in tensors(static.kwargs):
            if x.is_floating_point():
                x.zero_()
        with torch.cuda.graph(graph):
            got = self.call(static)
        for x, y in zip(tensors(static.kwargs), tensors(sample.kwargs)):
            x.copy_(y)
        for x in tensors(got):
            x.fill_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(got, want, "replay")

    @pytest.mark.gpu
    def test_cuda_graph_of_a_training_step(self) -> None:
        """Forward and backward captured together; the replay gives the gradients of eager mode."""
        if not self.differentiable:
            pytest.skip("no gradient")
        graded, leaves = self._with_grad(next(self.samples("cuda")))

        def step() -> tuple[Tensor | None, ...]:
            outputs = self._floating_output(graded)
            loss = sum(torch.where(x.isfinite(), x, 0.0).square().sum() for x in outputs)
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            want = [x.clone() for x in step() if x is not None]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = [x for x in step() if x is not None]
        for x in got:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(got, want, "replay")

    @pytest.mark.gpu
    def test_side_stream_without_synchronisation(self) -> None:
        """Runs behind a sleeping kernel on another stream, sees what that stream wrote, never waits."""
        sample = next(self.samples("cuda"))
        want = self.call(sample)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        late = Sample(
            sample.name,
            tree_map(lambda x: torch.zeros_like(x) if isinstance(x, Tensor) else x, sample.kwargs),
        )
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            for x, y in zip(tensors(late.kwargs), tensors(sample.kwargs)):
                x.copy_(y)
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = self.call(late)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            busy = not stream.query()
        stream.synchronize()
        assert busy, "the call waited for the device"
        assert_same(got, want, "side stream")

    @pytest.mark.gpu
    def test_second_device(self) -> None:
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")
        sample = next(self.samples("cuda:0"))
        with torch.cuda.device(0):
            got = self.call(sample.to("cuda:1"))
            assert torch.cuda.current_device() == 0
        assert_same(got, self.call(sample), "cuda:1")


__all__ = ["OpContract", "Recorder", "Sample", "assert_same", "assert_within_twice", "tensors"]
