"""What each part of a step has to do at least: bytes over copy bandwidth, or products over the matrix rate.

The larger of the two is the floor. Products are those of the formulas as they are written; a rewriting may
need fewer. Searches count the arithmetic of all pairs, which pruning may beat.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from any2point.bench import costs
from any2point.bench.costs import Cost
from any2point.bench.step import LOSS, OPTIMIZER, Step, parts_of
from any2point.bench.timing import Machine, matrix_rate


def floors(step: Step, machine: Machine) -> dict[str, tuple[float, float]]:
    """Microseconds (forward, backward) by part."""
    found = dict.fromkeys(parts_of(step.model), (0.0, 0.0))
    machine = dataclasses.replace(machine, matrix=matrix_rate(step.points.device.type, step.precision))
    for name, (forward, backward) in _costs(step).items():
        both = [max(cost.us(machine)) for cost in (forward, backward)]
        found[name] = both[0], both[1] if step.training else 0.0
    if not step.training:
        found |= dict.fromkeys((LOSS, OPTIMIZER), (0.0, 0.0))
    return found


def _costs(step: Step) -> dict[str, tuple[Cost, Cost]]:
    """(forward, backward) by part. A frozen product has one product backwards, a trained one two."""
    model: Any = step.model
    config = model.config
    item = 4 if step.precision.endswith("32") else 2  # bytes of an activation
    batch, points = step.points.shape[:2]
    nothing = Cost(0)
    parts: dict[str, tuple[Cost, Cost]] = {}
    tokenizer: Any = model.tokenizer
    sizes = getattr(tokenizer, "sizes", ())
    if sizes:
        parts["farthest points"] = costs.cost_farthest_point_sample(batch, points, sizes[0]), nothing
        search, rows, width = nothing, points, tokenizer.embed.out_features
        for stage, centers in enumerate(sizes):
            k, units = tokenizer.neighbors[stage], tokenizer.stages[stage]
            search = search + costs.cost_knn(batch, centers, rows, k)
            hidden = units[0].down.out_features
            cost = costs.cost_local_aggregate(batch, rows, centers, k, width, hidden, len(units))
            parts[f"local aggregation {stage + 1}"] = cost, Cost(2 * cost.bytes, 0, 2 * cost.products)
            rows, width = centers, 2 * width
        parts["nearest neighbours"] = search, nothing
        embedding = item * batch * points * tokenizer.embed.out_features
        parts["tokenizer, other"] = Cost(2 * embedding), Cost(3 * embedding)

    blocks: Any = model.encoder.source.blocks
    adapters: Any = model.encoder.adapters
    depth, width, tokens = len(blocks), model.cls_token.shape[-1], config.num_tokens
    length = tokens + model.encoder.prefix
    rows, state = batch * length, item * batch * length * width
    positions = model.projection.table.numel() // width
    projection = costs.cost_virtual_project(batch, tokens, positions, width, config.views)
    parts["virtual projection"] = projection, nothing

    over = batch if config.attention_axis == "batch" else length
    attention = 4 * rows * width * width + 2 * rows * over * width
    mlp = rows * sum(layer.weight.numel() for layer in (blocks[0].mlp.fc1, blocks[0].mlp.fc2))
    weights = item * 4 * width * width, item * mlp // rows
    for name, products, weight in (("attention", attention, weights[0]), ("MLP", mlp, weights[1])):
        forward = Cost(depth * (2 * state + weight), 0, depth * products)
        parts[name] = forward, Cost(depth * (3 * state + weight), 0, depth * products)

    bottlenecks = [guided.adapter for guided in adapters if guided.adapter is not None]
    products = sum(2 * rows * width * adapter.down.out_features for adapter in bottlenecks)
    moved = 2 * state * len(bottlenecks)
    parts["adapter"] = Cost(moved, 0, products), Cost(3 * moved // 2, 0, 2 * products)
    guiding = sum(guided.view_norm is not None for guided in adapters)
    one = costs.cost_guided_aggregate(batch, tokens, width, config.views, config.attention_dim)
    forward = Cost(guiding * (one.bytes * item // 4), 0, guiding * one.products)
    parts["guided aggregation"] = forward, Cost(3 * forward.bytes // 2, 0, 2 * forward.products)

    head = sum(parameter.numel() for parameter in model.head.parameters())
    parts["head"] = Cost(4 * head, 0, batch * head), Cost(8 * head, 0, 2 * batch * head)
    trained = sum(parameter.numel() for parameter in model.trainable_parameters())
    parts[OPTIMIZER] = Cost(32 * trained), nothing  # gradients twice, for their norm
    return parts
