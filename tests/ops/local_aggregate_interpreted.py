"""Run with TRITON_INTERPRET=1: the Triton kernels of local_aggregate on the CPU, against the reference."""

from __future__ import annotations

import itertools

import torch
from op_contract import assert_within_twice
from test_local_aggregate import make, make_unit

from any2point import reference
from any2point.ops.group import group
from any2point.ops.local_aggregate import _fold
from any2point.reference.local_aggregate import group_offsets, offset_deviation, wavelengths
from any2point.triton.local_aggregate import fold, local_aggregate


def evaluate(points, features, center, neighbor, units, *, normalize="scan", guard=True):  # type: ignore[no-untyped-def]
    """As the public function calls the kernels."""
    divisor = None
    if normalize == "mn40":
        offset = group_offsets(points, center, neighbor, group)
        divisor = offset_deviation(offset, guard=guard).expand(len(points)).contiguous()
    layers = [layer for unit in units for layer in (unit[:3], unit[3:])]
    width = 2 * features.shape[-1]
    wavelength, *folded = fold(layers, width, 1000.0, 1e-5, torch.float32)
    torch.testing.assert_close(wavelength, wavelengths(width, 1000.0, like=points))
    want = [tensor for layer in layers for tensor in _fold(*layer, 1e-5)]
    torch.testing.assert_close(folded, want)
    return local_aggregate(points, features, center, neighbor, divisor, wavelength, folded, 100.0, guard)


def main() -> None:
    torch.set_num_threads(1)
    # 24: an axis and the neighbour's half end within chunks; 48 and 33: hidden channels in two parts; 3 of K
    # neighbours and 5 groups: neither is whole.
    for k, width, hidden, units in ((5, 12, 4, 1), (3, 5, 33, 2), (18, 24, 48, 1)):
        kwargs = make(2, 21, 3, k, width, 0)
        generator = torch.Generator().manual_seed(k)
        kwargs["units"] = [make_unit(2 * width, hidden, generator, bias=i == 0) for i in range(units)]
        kwargs["neighbor"][0, 1, 1:3] = -1
        kwargs["center"][1, 2] = -1
        kwargs["neighbor"][1, 2] = -1
        options = itertools.product((torch.float32, torch.float16), (("scan", True), ("mn40", False)))
        for dtype, (normalize, guard) in options:
            given = kwargs | {
                "features": kwargs["features"].to(dtype),
                "normalize": normalize,
                "guard": guard,
            }
            exact = given | {"features": given["features"].double(), "points": given["points"].double()}
            want = reference.local_aggregate(**exact)
            with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == torch.float16):
                plain = reference.local_aggregate(**given)
            note = f"{k} neighbours, {dtype}, {normalize}"
            assert_within_twice(evaluate(**given), plain, want, note)
    flat = make(1, 21, 3, 5, 6, 1)
    flat["points"][..., 1] = 0.25
    assert evaluate(**flat).isfinite().all()
    assert evaluate(**flat, guard=False).isnan().all()
    flat["features"][0, int(flat["neighbor"][0, 1, 2]), 4] = torch.nan
    got, want = evaluate(**flat).isnan(), reference.local_aggregate(**flat).isnan()
    assert torch.equal(got, want), "NaN must be seen"
    assert want[0, 1].all()


if __name__ == "__main__":
    main()
