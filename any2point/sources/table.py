"""What `any2point sources` prints: the table of families, or what a given checkpoint is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from any2point.sources import FAMILIES, Family, Layout, Source
from any2point.sources.checkpoint import read_checkpoint
from any2point.sources.checks import convert
from any2point.sources.source import get_family, matching_families

_COLUMNS = 100
_NOTES = (
    "Base model: channels x blocks; other sizes and position tables of a family are read as they are. "
    "Input norm: a LayerNorm after token + position. Stand-in: the family has no absolute positions, and "
    "this takes their place.",
    "`any2point sources PATH` tells what a checkpoint is.",
)
_ACTIVATIONS = {
    "gelu": "GELU",
    "quick_gelu": "QuickGELU",
    "gelu_tanh": "GELU by tanh",
    "relu": "ReLU",
    "swiglu": "SwiGLU",
}


def print_sources(
    path: str | Path | None = None,
    *,
    family: str | None = None,
    heads: int | None = None,
    as_json: bool = False,
) -> None:
    """Print every family of sources, or, given a path, what the checkpoint there is.

    Args:
        path: a checkpoint, as for `Source.from_checkpoint`.
        family: read it as this family; without a checkpoint, print this family alone.
        heads: attention heads, where the checkpoint does not tell.
        as_json: machine-readable.

    Raises:
        ValueError: there is no checkpoint, or it is broken or of no known family.
    """
    if path is None:
        if heads is not None:
            raise ValueError(f"`heads`: expected a checkpoint to read with {heads} heads, got none")
        entries = list(FAMILIES.values()) if family is None else [get_family(family)]
        rows = [_family_row(entry) for entry in entries]
        print(json.dumps(rows, indent=2) if as_json else _render_families(entries))
    else:
        report = _inspect(path, family, heads)
        print(json.dumps(report, indent=2) if as_json else _render_checkpoint(report))


def _family_row(entry: Family) -> dict[str, Any]:
    return {
        "name": entry.name,
        "title": entry.title,
        "modality": entry.modality,
        "layout": asdict(entry.layout),
        "class_token": entry.has_cls,
        "registers": entry.registers,
        "positions": list(entry.positions),
        "position_kind": entry.position_kind,
        "width": entry.width,
        "depth": entry.depth,
        "checkpoint": entry.checkpoint,
    }


def _layout_text(layout: Layout, has_cls: bool, registers: int) -> str:
    parts = [f"{layout.norm}-norm", _ACTIVATIONS[layout.activation]]
    parts += ["LayerScale"] * layout.layer_scale + ["bias of keys and values"] * layout.bias_kv
    parts += ["input norm"] * layout.input_norm
    parts.append("class token" if has_cls else "no class token")
    parts += [f"{registers} register{'s' * (registers > 1)}"] if registers else []
    return ", ".join(parts)


def _positions_text(shape: Sequence[int], kind: str) -> str:
    return f"{' x '.join(map(str, shape))} {kind}"


def _render_families(families: Sequence[Family]) -> str:
    lines = [_family_line("", "base model", "position table", "blocks and tokens")]
    modality = None
    for entry in families:
        if entry.modality != modality:
            modality = entry.modality
            lines += ["", modality]
        positions = _positions_text(entry.positions, entry.position_kind)
        layout = _layout_text(entry.layout, entry.has_cls, entry.registers)
        lines.append(_family_line(entry.name, f"{entry.width} x {entry.depth}", positions, layout))
        for text in (entry.title, f"checkpoint: {entry.checkpoint}"):
            lines += _wrap(text, " " * 15)
    lines.append("")
    for text in _NOTES:
        lines += _wrap(text, "")
    return "\n".join(lines)


def _family_line(name: str, base: str, positions: str, layout: str) -> str:
    return f"  {name:<13}{base:<12}{positions:<20}{layout}"


def _wrap(text: str, first: str) -> list[str]:
    """Lines of `text` after `first`, and below where it starts."""
    return textwrap.wrap(
        text, _COLUMNS, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )


def _inspect(path: str | Path, family: str | None, heads: int | None) -> dict[str, Any]:
    state, config, file = read_checkpoint(path)
    names = matching_families(state, config, file) if family is None else [family]
    entry = get_family(names[0])
    source: Source = convert(entry, state, config, heads=heads, origin={"path": str(file)})
    return {
        "file": str(file),
        "also": names[1:],
        "title": entry.title,
        **source.describe(),
        "mlp_width": source.mlp_width,
        "class_token": source.has_cls,
        "registers": 0 if source.registers is None else len(source.registers),
        "parameters": sum(tensor.numel() for tensor in source.state_dict().values()),
        "unused": list(source.unused),
    }


def _render_checkpoint(report: Mapping[str, Any]) -> str:
    layout = _layout_text(Layout(**report["layout"]), report["class_token"], report["registers"])
    heads, size = report["heads"], report["width"] // report["heads"]
    unused = report["unused"]
    seen = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
    rows = {
        "family": f"{report['family']} ({report['title']}), {report['modality']}",
        "also fits": ", ".join(report["also"]) and f"{', '.join(report['also'])} (choose with --family)",
        "blocks": f"{report['depth']}: {layout}",
        "width": f"{report['width']}: {heads} heads of {size}, MLPs of {report['mlp_width']}",
        "positions": _positions_text(report["positions"], report["position_kind"]),
        "parameters": f"{report['parameters']:,}, all frozen",
        "unused": f"{len(unused)} tensor{'s' * (len(unused) > 1)}: {seen}" if unused else "nothing",
        "fingerprint": report["fingerprint"][:12],
    }
    lines = [report["file"]]
    for name, text in rows.items():
        if text:
            lines += _wrap(text, f"  {name:<13}")
    return "\n".join(lines)
