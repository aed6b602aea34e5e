"""What files say of points beside their coordinates: normals and colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NORMALS = ("nx", "ny", "nz")
COLORS = ("red", "green", "blue")
KINDS = {"normals": NORMALS, "colors": COLORS}
_ALIASES = {
    **{f"normal_{axis}": f"n{axis}" for axis in "xyz"},
    **{color[0]: color for color in COLORS},
    **{f"diffuse_{color}": color for color in COLORS},
}


def feature_names(kinds: Sequence[str]) -> tuple[str, ...]:
    """The columns of these kinds, one after the other.

    Raises:
        ValueError: a kind that files do not have.
    """
    if isinstance(kinds, str) or not set(kinds) <= set(KINDS) or len(set(kinds)) < len(kinds):
        raise ValueError(f"`features`: expected a list of {' and '.join(KINDS)}, each once, got {kinds!r}")
    return tuple(name for kind in kinds for name in KINDS[kind])


def select(columns: np.ndarray, names: Sequence[str], kinds: Sequence[str]) -> np.ndarray:
    """Take features out of a file's further columns.

    Args:
        columns: [N, A] float64.
        names: a name per column as the file has it, or "" for a column without one. Nameless columns must
            be three for each kind that no name says, in the order of `kinds`: nothing is guessed.
        kinds: out of `KINDS`.

    Returns:
        [N, F] float64; colours between 0 and 1 (columns that go beyond 1 count to 255).

    Raises:
        ValueError: what was expected and what was found.
    """
    known = [_ALIASES.get(name.lower(), name.lower()) for name in names]
    nameless = [i for i, name in enumerate(known) if not name]
    unsaid = [kind for kind in kinds if not set(KINDS[kind]) <= set(known)]
    if unsaid and len(nameless) != 3 * len(unsaid):
        wanted = " and ".join(f"{kind} ({' '.join(KINDS[kind])})" for kind in unsaid)
        found = f"{len(known)} ({' '.join(name or '?' for name in known)})" if known else "none"
        raise ValueError(f"expected {wanted} beside x y z, got further columns: {found}")
    parts = [np.empty((len(columns), 0))]
    for kind in kinds:
        if kind in unsaid:
            at, nameless = nameless[:3], nameless[3:]
        else:
            at = [known.index(name) for name in KINDS[kind]]
        part = columns[:, at]
        if not np.isfinite(part).all():
            raise ValueError(f"expected finite {kind}, got NaN or infinity")
        if kind == "colors":
            part = part / 255 if part.max() > 1 else part
            if part.min() < 0 or part.max() > 1:
                raise ValueError(
                    f"expected colors from 0 to 255 (or 1), got {columns[:, at].min():g} to "
                    f"{columns[:, at].max():g}"
                )
        parts.append(part)
    return np.concatenate(parts, axis=1)
