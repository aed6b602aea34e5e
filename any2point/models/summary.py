"""Counting of parameters by part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Summary:
    """Parameters of a model by part; `str()` is a table.

    Attributes:
        rows: `(part, trained, frozen)`.
        head: name of the part that is the classification head.
    """

    rows: tuple[tuple[str, int, int], ...]
    head: str = "head"

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return sum(row[1] for row in self.rows)

    @property
    def frozen(self) -> int:
        """Frozen parameters (the position table, a buffer, is not counted)."""
        return sum(row[2] for row in self.rows)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """Names of the parts of which something is trained."""
        return tuple(row[0] for row in self.rows if row[1])

    @property
    def trained_without_head(self) -> int:
        """Trained parameters without the classification head, the number that the paper reports."""
        return sum(row[1] for row in self.rows if row[0] != self.head)

    def __str__(self) -> str:
        rows = [
            *self.rows,
            ("total", self.trained, self.frozen),
            ("total without head", self.trained_without_head, self.frozen),
        ]
        lines = [f"{'part':<24}{'trained':>14}{'frozen':>14}"]
        lines += [f"{part:<24}{trained:>14,}{frozen:>14,}" for part, trained, frozen in rows]
        lines.append(f"trained: {', '.join(self.trained_parts) or 'nothing'}")
        return "\n".join(lines)


def count_parameters(parts: dict[str, list[nn.Parameter]]) -> Summary:
    """The summary of parameters that are already sorted into parts."""
    rows = []
    for part, parameters in parts.items():
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        rows.append((part, trained, frozen))
    return Summary(tuple(rows))
