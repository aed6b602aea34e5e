"""Opening and saving figures, in one place."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "figure.dpi": 110,
    "savefig.bbox": "tight",
    "svg.hashsalt": "any2point",
    "svg.fonttype": "none",
}


@contextlib.contextmanager
def figure(path: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of `size` inches that is written to `path` when the block ends, whole or not at all.

    What the name ends in is the format, PNG or SVG. The same figure gives the same file.

    It is drawn by the Agg canvas alone, so that neither a display nor pyplot's global state is touched.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'any2point[viz]'") from None
    from any2point.models.hub import write_atomic

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=size)
        FigureCanvasAgg(drawn)
        yield drawn
        buffer = io.BytesIO()
        vector = Path(path).suffix == ".svg"
        drawn.savefig(buffer, format="svg" if vector else "png", metadata={"Date": None} if vector else None)
        write_atomic(Path(path), buffer.getvalue())
