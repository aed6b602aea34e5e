"""A step replayed as a CUDA graph, where work stands beside other work, has the bits of an eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import clouds, make
from torch import Tensor

from any2point import Any2Point

QUIET: dict[str, Any] = {"attention_dropout": 0.0, "drop_path": 0.0, "adapter_dropout": 0.0, "dropout": 0.0}
KINDS: dict[str, dict[str, Any]] = {
    "lines": {},
    "images": {"family": "dinov2"},
    "other samples": {"fps_tie": "pointnet2", "wrap": True},
    "learned positions": {"positions": "learned"},
    "one group": {"tokenizer": "pointnet"},
}


def step(model: Any2Point, dtype: torch.dtype, points: Tensor, near: Any = None) -> list[Tensor]:
    """Logits, and gradients of a model in training."""
    with (
        torch.autocast("cuda", dtype, enabled=dtype != torch.float32),
        torch.set_grad_enabled(model.training),
    ):
        logits = model(points, neighborhoods=near)
    if not model.training:
        return [logits]
    model.zero_grad(set_to_none=True)
    logits.float().square().sum().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_repeats_eager_steps(kind: str, training: bool, dtype: torch.dtype) -> None:
    model = make(**KINDS[kind], **QUIET).cuda().train(training)
    batches = [clouds().cuda() * size for size in (1.0, 0.8, 1.3)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    points, want = batches[0].clone(), []
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches:
            want.append([tensor.clone() for tensor in step(model, dtype, batch)])
            model.load_state_dict(state)
        given = [tensor.clone() for tensor in step(model, dtype, points, model.neighborhoods(points))]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(given, want[0], strict=True))
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        got = step(model, dtype, points)
    for batch, each in zip(batches * 2, want * 2):
        model.load_state_dict(state)
        points.copy_(batch)
        graph.replay()
        wrong = [i for i, (a, b) in enumerate(zip(got, each, strict=True)) if not torch.equal(a, b)]
        assert not wrong
