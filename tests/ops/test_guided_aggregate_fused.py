"""The CPU's kernels of guided_aggregate, against the composition in float64, at every SIMD level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neighbour_clouds import LEVELS, simd
from op_contract import Recorder, assert_same
from test_guided_aggregate import make
from torch import Tensor
from torch.utils._pytree import tree_map

from any2point.ops import BatchNorm, CellAttention, guided_aggregate, segment_pool
from any2point.ops.group import group
from any2point.ops.guided_aggregate import plan_guided
from any2point.reference.guided_aggregate import guided_aggregate as reference

KERNEL = torch.ops.any2point._guided_aggregate.default
# features, six weights of the attention, weights and biases of both normalisations, running statistics
NAMES = ["out", "features", "norm", "norm bias", "qkv", "qkv bias", "proj", "proj bias"]
NAMES += ["view weight", "view bias", "space weight", "space bias"]

pytestmark = pytest.mark.usefixtures("one_thread")


def composition(**kwargs: Any) -> Tensor:
    scale = kwargs["attention"].proj_weight.shape[-1] ** -0.5
    return reference(**({"scale": scale} | kwargs), group=group, segment_pool=segment_pool)


def derive(
    function: Callable[..., Tensor], kwargs: dict[str, Any], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The result, its gradients and the running statistics after it."""

    def copy(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(dtype, copy=True) if x.is_floating_point() else x.clone()

    kwargs = tree_map(copy, kwargs)
    if kwargs.get("ensemble", "adaptive") != "adaptive":
        kwargs["space_norm"] = None
    norms = [kwargs[name] for name in ("view_norm", "space_norm") if kwargs[name] is not None]
    leaves = [kwargs["features"], *kwargs["attention"], *(tensor for norm in norms for tensor in norm[:2])]
    for leaf in leaves:
        leaf.requires_grad_()
    out = function(**kwargs)
    weight = torch.linspace(-1, 2, out.numel(), dtype=dtype, device=out.device).view(out.shape).cos()
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    return [out.detach(), *grads, *(tensor for norm in norms for tensor in norm[2:])]


def assert_near(got: list[Tensor], kwargs: dict[str, Any], least: float) -> None:
    """What `derive` gives: as far from float64 as four times the composition in float32, or `least`."""
    exact, plain = (derive(composition, kwargs, dtype) for dtype in (torch.float64, torch.float32))
    # What a normalisation subtracts again has no gradient but noise, here measured against its weight's.
    for i, (x, y, z) in enumerate(zip(got, exact, plain, strict=True)):
        size = max(float(exact[j].abs().max()) for j in ((i,) if i not in (5, 7) else (i, i - 1)))
        error, other = (float((value - y).abs().max()) / (size + 1e-3) for value in (x, z))
        name = NAMES[i] if i < len(NAMES) else "statistics"
        assert error < max(4 * other, least), f"{name}: {error:.1e}, the composition {other:.1e}"


def check(kwargs: dict[str, Any]) -> None:
    """At most four times as far from float64 as the composition in float32, or a few roundings."""
    with Recorder() as recorder:
        got = derive(guided_aggregate, kwargs)
    assert KERNEL in [call[0] for call in recorder.calls], "the composition ran"
    assert_near(got, kwargs, 1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ensemble", ["adaptive", "mean", "max"])
@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_against_float64(level: str, ensemble: str, pooling: str) -> None:
    options = {"ensemble": ensemble, "pooling": pooling}
    with simd(level):
        for training in (False, True):
            check(make() | options | {"training": training})
            odd = make(batch=3, s=40, width=41, views=3, cells=9, hidden=6)
            check(odd | options | {"training": training, "count_empty": training})


def shapes() -> dict[str, dict[str, Any]]:
    """Odd sizes, and cells of one token and of all."""
    crowd = make(batch=1, s=130, width=16, views=1, cells=1, hidden=12)
    apart = make(batch=2, s=6, width=33, cells=500)
    alone = make(batch=5, s=1, width=7, views=4)
    wide = make(batch=2, s=11, width=8, hidden=80) | {"num_heads": 40}
    narrow = make(batch=1, s=8, width=2, views=1, hidden=1) | {"num_heads": 1}
    one_head = make(s=20, hidden=15) | {"num_heads": 1}
    found = {"crowd": crowd, "apart": apart, "alone": alone, "wide heads": wide, "narrow": narrow}
    return found | {"one head": one_head, "scale": make() | {"scale": 2.5}}


@pytest.mark.parametrize("name", shapes())
def test_shapes(name: str) -> None:
    for training in (False, True):
        check(shapes()[name] | {"training": training})


def voxels_across_clouds() -> dict[str, Any]:
    """Some of them without tokens."""
    kwargs = make(batch=3, s=9)
    kwargs["cluster"] = torch.arange(27).view(3, 9) % 4
    return kwargs | {"training": True}


def test_voxels_across_clouds_and_without_tokens() -> None:
    check(voxels_across_clouds())


def equal_views() -> dict[str, Any]:
    """Whose maximum is that of all of them."""
    kwargs = make(views=3)
    kwargs["cell"][:] = kwargs["cell"][:, :1]
    for name in ("attention", "view_norm"):
        kwargs[name] = type(kwargs[name])(*(x[:1].expand_as(x).contiguous() for x in kwargs[name]))
    return kwargs | {"ensemble": "max"}


@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_equal_views_share_the_gradient_of_a_maximum(pooling: str) -> None:
    check(equal_views() | {"pooling": pooling})


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_dropped_branches(pooling: str, rows: bool) -> None:
    """Equal to the composition with the same draws."""
    kwargs = make(batch=6, s=9, views=1) | {"training": True, "drop_path": 0.4, "drop_path_rows": rows}

    def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(**kwargs: Any) -> Tensor:
            torch.manual_seed(0)
            return function(**kwargs)

        return call

    got, want = (derive(seeded(f), kwargs | {"pooling": pooling}) for f in (guided_aggregate, composition))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "max+mean"])
def test_bits_do_not_depend_on_threads(pooling: str) -> None:
    kwargs = make(batch=5, s=33, width=40, views=3, hidden=6) | {"training": True, "pooling": pooling}
    with Recorder() as recorder:
        derive(guided_aggregate, kwargs)
    assert len(recorder.calls) == 3, "lists, forward, backward"
    for op, args, _ in recorder.calls:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(op(*args))
        assert_same(results[1], results[0])
        assert_same(results[2], results[0])


def test_plan_is_shared() -> None:
    kwargs = make()
    given = (kwargs[name] for name in ("features", "cell", "cluster", "attention"))
    plan = plan_guided(*given, num_cells=5)
    assert_same(guided_aggregate(**kwargs, plan=plan), guided_aggregate(**kwargs))
    plain = kwargs | {"ensemble": "mean"}
    assert_same(guided_aggregate(**plain, plan=plan), guided_aggregate(**plain))


def test_lists() -> None:
    """Tokens by cell in ascending order, cells numbered where their cloud begins; voxels as given."""
    cell = torch.tensor([[[3, 0, 3]], [[1, 1, 1]]])
    cluster = torch.tensor([[0, 2, 0], [2, -1, 3]])
    order, segment, start, held = torch.ops.any2point._guided_lists(cell, cluster, 4)
    assert order.tolist() == [[1, 0, 2, 3, 4, 5], [0, 2, 1, 3, 5, 4]]
    assert segment.tolist() == [[1, 0, 1, 3, 3, 3], [0, 2, 0, 2, -1, 3]]
    assert start.tolist() == [[0, 1, 3, 3, 6, 6, 6], [0, 2, 2, 4, 5, 5, 5]]
    assert held.tolist() == [[2, 1], [2, 1]]
    for shape in ((0, 2, 3), (2, 2, 0)):
        empty = torch.zeros(shape, dtype=torch.int64)
        lists = torch.ops.any2point._guided_lists(empty, empty[:, 0], 4)
        assert [tuple(x.shape) for x in lists] == [(3, 0), (3, 0), (3, 1), (3, shape[0])]
        assert not lists[2].any()


def test_wrong_lists_are_refused() -> None:
    with Recorder() as recorder:
        guided_aggregate(**make())
    args = next(call[1] for call in recorder.calls if call[0] is KERNEL)
    for i in (5, 6, 7):  # order, segment, start
        for value in (-2, 10**6):
            wrong = args[i].clone()
            wrong[0, 3] = value
            with pytest.raises(RuntimeError, match="expected lists"):
                KERNEL(*args[:i], wrong, *args[i + 1 :])


def test_no_clouds() -> None:
    for training in (False, True):
        kwargs = make() | {"training": training}
        for name in ("features", "cell", "cluster"):
            kwargs[name] = kwargs[name][:0]
        kwargs["features"].requires_grad_()
        out = guided_aggregate(**kwargs)
        assert out.shape == (0, 9, 8)
        out.sum().backward()


def test_what_the_composition_does() -> None:
    plain = make()
    exact = tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, plain)
    with Recorder() as recorder:
        guided_aggregate(**exact)
    assert KERNEL not in [call[0] for call in recorder.calls]


def test_op_is_registered_as_torch_asks() -> None:
    for options in ({}, {"training": True, "pooling": "max+mean"}, {"ensemble": "max", "training": True}):
        with Recorder() as recorder:
            guided_aggregate(**make(s=5) | options)
        for op, args, kwargs in recorder.calls:
            torch.library.opcheck(op, args, kwargs)
            if op is KERNEL:
                graded = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in args[:3]]
                graded.append([x.clone().requires_grad_() for x in args[3]])
                torch.library.opcheck(op, (*graded, *args[4:]), kwargs)


def _norm(*size: int) -> BatchNorm:
    return BatchNorm(*(torch.ones(*size) for _ in range(4)))


def test_nothing_of_a_batch_of_equal_tokens_is_infinite() -> None:
    """Rows of zeros: lengths and sums of weights are clamped."""
    views, width = 2, 16
    attention = CellAttention(*(x * 0 for x in make(views=views, width=width)["attention"]))
    norms = [norm._replace(bias=torch.zeros_like(norm.bias)) for norm in (_norm(views, width), _norm(width))]
    kwargs = make(views=views, width=width) | {"attention": attention, "training": True}
    kwargs |= {"view_norm": norms[0], "space_norm": norms[1], "features": torch.zeros(2, 9, width)}
    assert all(x.isfinite().all() for x in derive(guided_aggregate, kwargs))
