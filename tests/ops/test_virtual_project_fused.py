"""The kernels of virtual_project have the bits of the composition, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neighbour_clouds import LEVELS, simd
from op_contract import Recorder, assert_same
from test_virtual_project import images, lines

from any2point.nn import spread_lines, spread_rotations
from any2point.ops import virtual_project
from any2point.ops.interpolate import interpolate
from any2point.reference.virtual_project import virtual_project as composition

KERNEL = torch.ops.any2point._virtual_project.default
OFFICIAL = {"wrap": True, "camera": 6.0, "scramble": True, "size": (70, 90), "cell": 20}

pytestmark = pytest.mark.usefixtures("one_thread")


def cases() -> dict[str, dict[str, Any]]:
    narrow = lines(length=1) | {"size": (29,)}
    wide = images(width=300) | {"size": (70, 90), "cell": 20, "camera": 1.0}
    flat, point, bad = lines(batch=3, s=17), images(s=1), lines(s=5)
    flat["centers"][0, :, 1] = 0.25
    flat["centers"][1] = 1.5
    bad["centers"][0, 2, 1] = float("nan")
    many = lines(s=70, width=129, views=13)
    found = {"lines": lines(), "images": images(), "official": images() | OFFICIAL, "one position": narrow}
    return found | {"wide": wide, "flat": flat, "point": point, "not a number": bad, "many": many}


def kernel_calls(kwargs: dict[str, Any]) -> int:
    with Recorder() as recorder:
        virtual_project(**kwargs)
    return sum(call[0] is KERNEL for call in recorder.calls)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_of_the_composition(level: str, dtype: torch.dtype, device: str) -> None:
    for name, kwargs in cases().items():
        kwargs["table"] = kwargs["table"].to(dtype)
        assert kernel_calls(kwargs), name
        want = composition(**kwargs, interpolate=interpolate)
        here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        with simd(level):
            got = virtual_project(**here)
        assert_same(got, want, name)


@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_of_the_table(threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    for name, kwargs in cases().items():
        grads = []
        for where, function in ((device, virtual_project), ("cpu", _composed)):
            here = {k: v.to(where) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            here["table"].requires_grad_()
            out = function(**here).encoding
            weight = torch.linspace(-1, 2, out.numel()).view(out.shape).to(where)
            grads.append(torch.autograd.grad((out * weight).sum(), here["table"])[0])
        if device == "cpu":
            assert_same(grads[0], grads[1], name)
        else:  # added up in another order
            torch.testing.assert_close(grads[0].cpu(), grads[1], rtol=1e-5, atol=1e-5, equal_nan=True)


def _composed(**kwargs: Any) -> Any:
    return composition(**kwargs, interpolate=interpolate)


def test_what_the_composition_does() -> None:
    plain = lines()
    for kwargs in (
        plain | {"wrap": True},
        plain | {"table": plain["table"].double()},
        plain | {"centers": plain["centers"].double()},
        plain | {"centers": plain["centers"].clone().requires_grad_()},
        plain | {"views": spread_lines(257)},
        images() | {"views": spread_rotations(257)},
    ):
        assert not kernel_calls(kwargs)
    moving = plain | {"centers": plain["centers"].clone().requires_grad_()}
    with torch.no_grad():
        assert kernel_calls(moving)


@pytest.mark.parametrize("make", [lines, images])
def test_op_is_registered_as_torch_asks(make: Any) -> None:
    kwargs = make()
    with Recorder() as recorder:
        virtual_project(**kwargs)
    ((op, args, options),) = recorder.calls
    for graded in (False, True):
        table = args[1].clone().requires_grad_(graded)
        torch.library.opcheck(op, (args[0], table, *args[2:]), options)


def test_gradient_twice() -> None:
    kwargs = images()
    table = kwargs.pop("table").requires_grad_()
    out = virtual_project(table=table, **kwargs).encoding
    (first,) = torch.autograd.grad(out.pow(3).sum(), table, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), table)
    want = _composed(table=table, **kwargs).encoding
    (first,) = torch.autograd.grad(want.pow(3).sum(), table, create_graph=True)
    assert_same(second, torch.autograd.grad(first.sum(), table)[0])


def test_compiled_code_keeps_the_kernel() -> None:
    """Exported programs hold the composition, code for `torch.compile` does not."""
    kwargs, seen = lines(), []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        seen.extend(node.target for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(lambda: virtual_project(**kwargs), fullgraph=True, backend=backend)()
    assert torch.ops.any2point._virtual_project.default in seen
