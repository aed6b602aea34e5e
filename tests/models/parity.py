"""What an `Any2Point` of official weights computes, under the keys of the official code's dumps, and how far
it is from them.

Every key of a dump has to be known here: one that is not compared is an error.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import golden
import numpy as np
import torch
import torch.nn.functional as F
from golden import Dump, relative_error
from torch import Tensor

from any2point import Any2Point
from any2point.models.official_names import Place, official_names
from any2point.nn import tokenizer as tokenizer_module
from any2point.reference.batch_norm import BatchNorm, masked_batch_norm
from any2point.reference.guided_aggregate import attend_in_cells
from any2point.reference.segment_pool import segment_pool
from any2point.reference.virtual_project import virtual_project

QUIET = {"attention_dropout": 0.0, "drop_path": 0.0, "adapter_dropout": 0.0, "dropout": 0.0}
# Gradients that are zero up to rounding: biases before a batch normalisation, the final normalisation's bias
# (the head's batch normalisation removes it), CLIP's class token under attention over the batch.
ROUNDING = r".*net[12]\.0\.bias|cls_head_finetune\.[04]\.bias|(encoder\.)?norm\.bias"
CLIP_ROUNDING = r"|(encoder\.)?cls_(token|pos)"
# Keys that are not compared, and why.
EXCEPTIONS = {"pts": "the input: the dump's own points, or those that the shipped dumps share"}
# Allowed error, plain and with large signals, relative to the largest value of a key: at least half as much
# again as the largest over all twelve dumps. A training step passes a batch normalisation of four nearly
# equal features, which magnifies rounding. In DINOv2's plain dumps one unit lies at the kink of its ReLU:
# gradients in float64 differ by 2e-2 (median) from the dump, those in float32 by that or by 3e-5, as the
# threads fall.
TOLERANCE = {
    "index": (0.0, 0.0),
    "coordinates": (1e-6, 1e-6),
    "tokenizer": (5e-6, 5e-6),
    # Lines are read at coordinates up to 77, which float32 rounds to 4e-6.
    "encoding": (5e-5, 5e-5),
    "block": (1e-5, 1e-5),
    "cell attention": (3e-5, 3e-5),  # small values out of weights with LayerNorm folded in
    "logits": (1e-5, 1e-5),
    "train logits": (1e-3, 2e-3),
    "train loss": (1e-4, 3e-4),
    "gradient norm, worst": (3e-2, 1e-2),
    "gradient norm, median": (2e-3, 2e-3),
    "gradient, worst": (0.15, 0.15),
    "gradient, median": (5e-2, 5e-2),
    "rounding gradient": (1e-3, 1e-3),
    "statistics": (4e-5, 4e-5),
}
# Sums in another order than those of the official run, which was on a CPU.
OTHER_DEVICES = 4


class Row(NamedTuple):
    """One comparison: what, the kind of value, the error, and how large it may be."""

    key: str
    group: str
    error: float
    allowed: float

    @property
    def wrong(self) -> bool:
        return not self.error <= self.allowed


class Value(NamedTuple):
    """A value of ours, all of it: its group, and which of its axes is that of channels."""

    group: str
    tensor: Tensor
    channels: int = -1


def build(variant: str, state: dict[str, Tensor], *, hot: bool = False) -> Any2Point:
    table = golden.position_table(variant, hot=hot)
    return Any2Point.from_official(state, variant, position_table=table, **QUIET)


def compare(model: Any2Point, variant: str, dump: Dump, points: Tensor, *, hot: bool = False) -> list[Row]:
    """Every key of a dump against the model: one evaluation, one training step, which changes it."""
    step, rows = 1 if hot else 0, []
    slack = 1 if points.device.type == "cpu" else OTHER_DEVICES

    def row(key: str, group: str, error: float) -> None:
        rows.append(Row(key, group, error, slack * TOLERANCE[group][step]))

    values = evaluate(model, points)
    with torch.no_grad():
        values["logits_batch01"] = Value("logits", model(points[:2]).cpu())
    train, gradients = training_step(model, points)
    values |= train
    for key, want in dump.values.items():
        if key in EXCEPTIONS:
            continue
        if key.startswith("buf/"):
            name, stride = re.fullmatch(r"buf/(.+?)(?:_c(\d+))?", key).groups()  # type: ignore[union-attr]
            got = _official_tensor(model, variant, name)[:: int(stride or 1)]
            row(key, "statistics", relative_error(got, want))
            continue
        group, got = select(values, key)
        if group == "index":
            row(key, group, 0.0 if np.array_equal(np.asarray(got), want) else float("inf"))
        elif group == "train loss":
            row(key, group, abs(float(got) - float(want)))
        else:
            row(key, group, relative_error(got, want))
    for key, group, error in compare_gradients(model, variant, dump, gradients):
        row(key, group, error)
    for name, norm in dump.buffer_norms.items():
        got = _official_tensor(model, variant, name).double().norm().item()
        row(f"norm of {name}", "statistics", abs(got - norm) / max(1.0, abs(norm)))
    return rows


def select(values: dict[str, Value], key: str) -> tuple[str, Any]:
    """The part of our values that a key of a dump names."""
    if key.startswith("knn_digest_"):
        value = values[key.replace("knn_digest", "knn_idx_sorted")]
        digests = [
            hashlib.sha256(cloud.numpy().astype("<i2").tobytes()).digest()[:8] for cloud in value.tensor
        ]
        return "index", np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), 8)
    match = re.fullmatch(r"(.+?)(_s0)?(_full01)?(?:_c(\d+))?", key)
    assert match is not None
    name, first, both, stride = match.groups()
    if name not in values:
        raise AssertionError(f"{key}: the dump has it, and nothing here is compared with it")
    group, got, channels = values[name]
    got = got[0] if first else got
    got = got[:2] if both else got
    if stride:
        index = [slice(None)] * got.dim()
        index[channels] = slice(None, None, int(stride))
        got = got[tuple(index)]
    return group, got


def evaluate(model: Any2Point, points: Tensor) -> dict[str, Value]:
    """Everything on the way from the points to the logits."""
    seen: dict[str, Any] = {}
    encoder = model.encoder
    guided = encoder.adapters[0]
    first = encoder.source.blocks[0]

    def keep(name: str, choose: Callable[[Any, Any], Any]) -> Callable[[Any, Any, Any], None]:
        return lambda _module, args, out: seen.update({name: choose(args, out)})

    def given(args: Any, _out: Any) -> Any:
        return args

    def out(_args: Any, result: Any) -> Any:
        return result

    hooks = [
        module.register_forward_hook(keep(name, choose))
        for module, name, choose in (
            (model.tokenizer, "tokens", out),
            (model.projection, "projected", out),
            (first.attn, "attention", out),
            (first.mlp, "mlp", out),
            (guided, "guided", given),
            (guided.adapter, "adapter", out),
            (model.norm, "normed", out),
            (model.head, "feature", given),
        )
    ]
    stages: list[tuple[Any, Tensor]] = []
    blocks: list[Tensor] = []
    aggregate, block = tokenizer_module.local_aggregate, encoder.block
    embed, join = model.tokenizer._embed, guided.adapter.join

    def aggregated(*args: Any, **options: Any) -> Tensor:
        stages.append((args, aggregate(*args, **options)))
        return stages[-1][1]

    def through_block(index: int, x: Tensor, position: Tensor, *args: Any) -> Tensor:
        seen.setdefault("block0_in", x if encoder.position_adds == "once" else x + position)
        blocks.append(block(index, x, position, *args))
        return blocks[-1]

    def embedded(*args: Any) -> Tensor:
        seen["embedded"] = embed(*args)
        return seen["embedded"]

    def joined(x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        guided.adapter(y if scale is None else scale * y)  # a kernel may not call it
        return join(x, y, scale)

    with (
        torch.no_grad(),
        mock.patch.object(model.tokenizer, "_embed", embedded),
        mock.patch.object(guided.adapter, "join", joined),
        mock.patch.object(tokenizer_module, "local_aggregate", aggregated),
        mock.patch.object(encoder, "block", through_block),
    ):
        logits = model(points)
    for hook in hooks:
        hook.remove()

    tokens, (x, cell, cluster, *_) = seen["tokens"], seen["guided"]
    voxels = int(cluster.max()) + 1
    cells = model.projection.num_cells
    batch = torch.arange(len(points), device=points.device)
    same = cell[..., :, None] == cell[..., None, :]
    count = cluster.flatten().bincount(minlength=voxels)
    values = {
        "labels": Value("index", golden.LABELS),
        "center": Value("coordinates", tokens.centers),
        "raw_embed": Value("tokenizer", _channels_first(seen["embedded"]), -2),
        "tokens": Value("tokenizer", tokens.features),
        "pos_embed": Value("encoding", seen["projected"].encoding),
        "cluster": Value("index", cluster.flatten()),
        "voxel_raw": Value("index", raw_voxels(tokens.centers, model.config.voxel_size)),
        "idx_ptr": Value("index", torch.cat([count.new_zeros(1), count.cumsum(0)])),
        "flat_grid_index": Value("index", (cell + cells * batch[:, None, None]).transpose(0, 1).flatten(1)),
        "mask_allowed_count": Value("index", same.sum(-1).transpose(0, 1)),
        "block0_in": Value("block", seen["block0_in"]),
        "block0_out": Value("block", blocks[0]),
        "block_last_out": Value("block", blocks[-1]),
        "blocks_out": Value("block", torch.stack(blocks)),
        "b0_attn": Value("block", seen["attention"]),
        "b0_mlp": Value("block", seen["mlp"]),
        "b0_adapter": Value("block", seen["adapter"] / model.config.scale_factor),
        "norm_out": Value("block", seen["normed"]),
        "global_feat": Value("block", seen["feature"][0]),
        "logits": Value("logits", logits),
    }
    for stage, (args, result) in enumerate(stages):
        values[f"fps_idx_stage{stage}"] = Value("index", args[2])
        values[f"knn_idx_sorted_stage{stage}"] = Value("index", args[3].sort(-1).values)
        if stage < len(stages) - 1:
            values[f"stage{stage}"] = Value("tokenizer", _channels_first(result), -2)
    for name, axis in (("pos_x", 0), ("pos_y", 1)):
        if axis < seen["projected"].position.shape[-1]:
            values[name] = Value("coordinates", seen["projected"].position[..., axis])
    with torch.no_grad():
        values |= _views(model, tokens.centers) | _inside_guided(model, x, cell, cluster)
    return {name: value._replace(tensor=value.tensor.cpu()) for name, value in values.items()}


def _channels_first(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)


def raw_voxels(centers: Tensor, size: float) -> Tensor:
    """The official numbers of voxels: over the largest extent of the batch, cloud by cloud."""
    steps = ((centers - centers.amin(1, keepdim=True)) / size).long()
    extent = steps.amax((0, 1)) + 1
    stride = steps.new_tensor([1, int(extent[0]), int(extent[0] * extent[1])])
    cloud = torch.arange(len(centers), device=centers.device)[:, None] * int(extent.prod())
    return ((steps * stride).sum(-1) + cloud).flatten()


def _views(model: Any2Point, centers: Tensor) -> dict[str, Value]:
    """Encodings of every view, of which the op gives the mean: from the rows and weights that it reads."""
    projection, read = model.projection, []

    def recorded(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        read.append((index, weight))
        return table.new_zeros(len(index), table.shape[-1])

    virtual_project(
        centers,
        projection.table,
        projection.views,
        cell=projection.cell,
        size=projection.size,
        camera=projection.camera,
        wrap=projection.wrap,
        interpolate=recorded,
    )
    (index, weight), views = read[0], len(projection.views)
    rows = projection.table.flatten(0, -2)[index] * weight[..., None] * views
    each = rows.unflatten(1, (views, -1)).sum(2).unflatten(0, (len(centers), -1)).transpose(1, 2)
    if projection.table.dim() == 2:
        return {"interp": Value("encoding", each)}
    return {"interp_raw": Value("encoding", _channels_first(each), -2)}


def _inside_guided(model: Any2Point, tokens: Tensor, cell: Tensor, cluster: Tensor) -> dict[str, Value]:
    """The steps of the first block's guided aggregation, in the first view."""
    guided, attention = model.encoder.adapters[0], model.encoder.attention.tensors()
    heads = attend_in_cells(tokens, cell, attention, num_heads=6, scale=12**-0.5, eps=guided.norm_eps)
    branch = F.linear(heads[:, 0], attention.proj_weight[0], attention.proj_bias[0])
    rows = len(tokens) * guided.num_cells
    cloud = torch.arange(len(tokens), device=tokens.device)[:, None]
    segment = (cell[:, 0] + guided.num_cells * cloud).flatten()
    attended = (tokens + branch).flatten(0, 1)
    pooled = segment_pool(attended, segment, rows, "mean")
    if guided.pooling == "max+mean":
        pooled = pooled + segment_pool(attended, segment, rows, "max")
    step = {"training": False, "momentum": 0.1, "eps": 1e-5}
    norm = BatchNorm(*(tensor[0] for tensor in guided.view_norm.tensors()))
    view = F.gelu(masked_batch_norm(pooled, norm, pooled.new_ones(rows, dtype=torch.bool), **step))
    flat, voxel = tokens.flatten(0, 1), cluster.flatten()
    count = int(voxel.max()) + 1
    space = segment_pool(flat, voxel, count, "max") + segment_pool(flat, voxel, count, "mean")
    every = flat.new_ones(count, dtype=torch.bool)
    space = F.gelu(masked_batch_norm(space, guided.space_norm.tensors(), every, **step))
    return {
        "b0_attn1_v0": Value("cell attention", branch.flatten(0, 1)),
        "b0_binfeat_v0": Value("block", pooled),
        "b0_outv0": Value("block", view),
        "b0_out3d": Value("block", space),
    }


def training_step(model: Any2Point, points: Tensor) -> tuple[dict[str, Value], dict[str, Tensor | None]]:
    """Logits, loss and gradients of one training step; statistics are updated."""
    model.train()
    logits = model(points)
    loss = F.cross_entropy(logits, golden.LABELS.to(logits.device))
    loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name: None if grad is None else grad.cpu() for name, grad in trained.items()}
    values = {"train_logits": Value("train logits", logits.detach().cpu())}
    return values | {"train_loss": Value("train loss", loss.detach().cpu())}, gradients


def places(model: Any2Point, variant: str) -> dict[str, Place]:
    family, dataset = variant.split("/")
    return official_names(family, dataset, depth=model.source_info.depth)


def _official_tensor(model: Any2Point, variant: str, name: str) -> Tensor:
    place = places(model, variant)[name]
    value = model.state_dict()[place.name].cpu()
    return value if place.row is None else value[place.row]


def compare_gradients(
    model: Any2Point, variant: str, dump: Dump, gradients: dict[str, Tensor | None]
) -> list[tuple[str, str, float]]:
    """Worst and median errors of the gradients' norms and of their sampled values."""
    table = places(model, variant)
    trained = {p.name for p in golden.parameters(variant) if p.trained}
    assert trained == set(dump.gradient_norms), "the official code trains other parameters"
    ours = {table[name].name for name in trained}
    assert ours == set(gradients), sorted(ours ^ set(gradients))
    small = ROUNDING + (CLIP_ROUNDING if variant.startswith("clip") else "")
    largest = max(dump.gradient_norms.values())
    norms: dict[str, float] = {}
    rounding: dict[str, float] = {}
    samples: dict[str, float] = {}
    for name, norm in dump.gradient_norms.items():
        place = table[name]
        gradient = gradients[place.name]
        assert gradient is not None, name
        gradient = gradient if place.row is None else gradient[place.row]
        if re.fullmatch(small, name):
            rounding[name] = float(gradient.norm()) / largest
            continue
        norms[name] = abs(gradient.double().norm().item() - norm) / norm
        if name not in dump.gradients:
            continue
        values, step, substep = dump.gradients[name]
        usual = norm * (len(values) / gradient.numel()) ** 0.5
        # Left out: weights on CLIP's class token, whose gradients are rounding, where only they are sampled.
        if np.linalg.norm(values) > 1e-2 * usual:
            difference = gradient.flatten()[::step][::substep] - torch.from_numpy(values)
            samples[name] = difference.norm().item() / float(np.linalg.norm(values))
    assert not dump.gradients or len(samples) > 0.9 * len(norms)
    rows = []
    for kind, errors in (("gradient norm", norms), ("gradient", samples)):
        if errors:
            worst = max(errors, key=lambda name: errors[name])
            rows.append((f"{kind} of {worst}", f"{kind}, worst", errors[worst]))
            rows.append((f"{kind}, median", f"{kind}, median", float(np.median(list(errors.values())))))
    worst = max(rounding, key=lambda name: rounding[name])
    return [*rows, (f"gradient of {worst}", "rounding gradient", rounding[worst])]
