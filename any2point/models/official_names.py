"""Where each tensor of the official code stands in ours: one table, read in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

_NORM = ("weight", "bias", "running_mean", "running_var")
COUNT = "num_batches_tracked"
# Layers of a block: ours, and the official names where they are not the same.
_BLOCK = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_CLIP_BLOCK = ("ln_1", "attn.in_proj", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
# The head's linear layers, each with the normalisation that follows it.
_HEADS = {
    "scanobjectnn": (
        ("prediction.head.0.0", "prediction.head.0.1"),
        ("prediction.head.2.0", "prediction.head.2.1"),
        ("prediction.head.4.0", None),
    ),
    "modelnet40": (
        ("cls_head_finetune.0", "cls_head_finetune.1"),
        ("cls_head_finetune.4", "cls_head_finetune.5"),
        ("cls_head_finetune.8", None),
    ),
}


class Place(NamedTuple):
    """Where a tensor of the official code stands in ours.

    Attributes:
        name: in the model's `state_dict()`; a name that starts with "blocks." is of the frozen source.
        row: the row, if ours stacks the views.
        ones: trailing dimensions of size one that the official tensor (of a convolution) has and ours lacks.
        counter: a counter of batches that only the official code keeps.
    """

    name: str
    row: int | None = None
    ones: int = 0
    counter: bool = False


def official_names(
    family: str, dataset: str, *, depth: int, units: Sequence[int] = (2, 1, 1), views: int = 6
) -> dict[str, Place]:
    """Every parameter and buffer of an official model, and its place in ours.

    Args:
        family: "clip-text", "dinov2" or "imagebind".
        dataset: "scanobjectnn" or "modelnet40".
        depth: blocks.
        units: residual units per stage of the tokenizer.
        views: lines or images.

    Example:
        >>> official_names("clip-text", "scanobjectnn", depth=12)["encoder.attn1.3.qkv.weight"]
        Place(name='encoder.attention.qkv_weight', row=3, ones=0, counter=False)
    """
    scan = dataset == "scanobjectnn"
    prefix = "encoder." if scan else ""
    places = {f"{prefix}{name}": place for name, place in _encoder(family, depth, units, views)}
    for layer, (linear, norm) in zip((0, 4, 8), _HEADS[dataset]):
        leaves = ("weight",) if scan and norm else ("weight", "bias")  # no bias before a normalisation
        places |= {f"{linear}.{leaf}": Place(f"head.{layer}.{leaf}") for leaf in leaves}
        if norm:
            places |= {f"{norm}.{leaf}": Place(f"head.{layer + 1}.{leaf}") for leaf in (*_NORM, COUNT)}
    return places


def _encoder(family: str, depth: int, units: Sequence[int], views: int) -> Iterator[tuple[str, Place]]:
    yield "cls_token", Place("cls_token")
    yield "cls_pos", Place("cls_position")
    points = "patch_embed.EncP."
    yield f"{points}raw_point_embed.net.0.weight", Place("tokenizer.embed.weight", ones=1)
    yield from _batch_norm(f"{points}raw_point_embed.net.1", "tokenizer.embed_norm")
    for stage, count in enumerate(units):
        for unit in range(count):
            old, new = f"{points}LGA_list.{stage}.linear2.{unit}", f"tokenizer.stages.{stage}.{unit}"
            for net, side in (("net1", "down"), ("net2", "up")):
                yield f"{old}.{net}.0.weight", Place(f"{new}.{side}.weight", ones=2)
                yield f"{old}.{net}.0.bias", Place(f"{new}.{side}.bias")
                yield from _batch_norm(f"{old}.{net}.1", f"{new}.{side}_norm")
    for block in range(depth):
        yield from _frozen(family, block)
        yield from _trained(family, block, views)
    for leaf in ("weight", "bias"):
        yield f"norm.{leaf}", Place(f"norm.{leaf}")
        for view in range(views):
            yield f"norm3.{view}.{leaf}", Place(f"encoder.attention.norm_{leaf}", view)
            for layer in ("qkv", "proj"):
                yield f"attn1.{view}.{layer}.{leaf}", Place(f"encoder.attention.{layer}_{leaf}", view)


def _frozen(family: str, block: int) -> Iterator[tuple[str, Place]]:
    clip = family == "clip-text"
    stem = f"{'resblocks' if clip else 'blocks'}.{block}"
    for old, new in zip(_CLIP_BLOCK if clip else _BLOCK, _BLOCK):
        for leaf in ("weight", "bias"):
            joint = "_" if old == "attn.in_proj" else "."
            yield f"{stem}.{old}{joint}{leaf}", Place(f"blocks.{block}.{new}.{leaf}")
    if family == "dinov2":
        for scale in ("ls1", "ls2"):
            yield f"{stem}.{scale}.gamma", Place(f"blocks.{block}.{scale}")


def _trained(family: str, block: int, views: int) -> Iterator[tuple[str, Place]]:
    clip = family == "clip-text"
    old, new = f"{'resblocks' if clip else 'blocks'}.{block}", f"encoder.adapters.{block}"
    for layer, side in (("ln1", "down"), ("ln2", "up")):
        for leaf in ("weight", "bias"):
            yield f"{old}.adapter.{layer}.{leaf}", Place(f"{new}.adapter.{side}.{leaf}")
    yield from _batch_norm(f"{old}.out_transform_3d.0", f"{new}.space_norm")
    for view in range(views):
        yield from _batch_norm(f"{old}.out_transform_{1 if clip else 2}d.{view}.0", f"{new}.view_norm", view)


def _batch_norm(old: str, new: str, row: int | None = None) -> Iterator[tuple[str, Place]]:
    for leaf in _NORM:
        yield f"{old}.{leaf}", Place(f"{new}.{leaf}", row)
    # Every normalisation sees every batch, so that the head's counter stands for all of them.
    yield f"{old}.{COUNT}", Place(f"head.1.{COUNT}", counter=True)
