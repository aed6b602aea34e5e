"""Run with TRITON_INTERPRET=1: what rounding took from the maximum over neighbours is given back."""

from __future__ import annotations

import torch
from test_local_aggregate import make
from torch import Tensor

from any2point.ops.group import group
from any2point.reference.local_aggregate import encode_offsets, group_offsets, normalize_offsets, wavelengths
from any2point.triton.local_aggregate_residual import add_rounding


def half(x: Tensor) -> Tensor:
    return x.half().float()


def main() -> None:
    torch.set_num_threads(1)
    for width, hidden, units in ((12, 20, 1), (33, 8, 1), (24, 40, 2)):
        kwargs = make(2, 21, 3, 5, width, 0)
        points, features, center, neighbor = (
            kwargs[name] for name in ("points", "features", "center", "neighbor")
        )
        neighbor[0, 1, 2:4] = -1
        generator = torch.Generator().manual_seed(width)
        offset = normalize_offsets(group_offsets(points, center, neighbor, group), "scan")
        near = torch.where(neighbor < 0, center[..., None], neighbor)
        middle = group(features, center)[:, :, None].expand(*near.shape, -1)
        rows = torch.cat([group(features, near), middle], dim=-1)
        wave = encode_offsets(offset, 2 * width)
        exact, rounded = rows + wave, half(half(rows) + half(wave))

        def drawn(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator)

        # y1, what makes h of it, and the second layer.
        unit = [drawn(near.numel(), hidden).half(), drawn(hidden), drawn(hidden)]
        unit += [drawn(2 * width, hidden).half(), drawn(2 * width)]
        if units > 1:
            h = half((unit[0].float() * unit[1] + unit[2]).relu())
            branch = (h @ unit[3].float().T + unit[4]).view_as(exact)
            exact, rounded = (exact + branch).relu(), half((rounded + branch).relu())
        # The last branch; where nothing is positive, nothing changes.
        branch = drawn(*exact.shape)
        argmax = (rounded + branch).argmax(2, keepdim=True)
        before, want = ((x + branch).gather(2, argmax)[:, :, 0].relu() for x in (rounded, exact))
        want = torch.where(before > 0, want, 0.0)
        got = before.clone()
        wavelength = wavelengths(2 * width, 1000.0, like=points)
        where = center, neighbor, None, wavelength, 100.0, True
        add_rounding(got, argmax[:, :, 0].int(), unit * units, points, features, *where)
        assert (got - want).norm() < 0.1 * (before - want).norm()
        assert (got == 0).any()


if __name__ == "__main__":
    main()
