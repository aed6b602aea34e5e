"""A training step as one CUDA graph: many small kernels take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# points [B, N, 3], labels [B] -> loss [], logits [B, classes]; leaves gradients in the parameters
Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def capture(step: Step, model: nn.Module, points: Tensor, labels: Tensor) -> Step:
    """Record `step` for one shape; the result replays it on other data of that shape.

    The model's buffers are left as they were. Its gradients become the graph's own tensors, which every
    replay overwrites: they must not be set to None.

    Args:
        step: forward and backward without synchronisation.
        model: what the step trains.
        points: a batch, [B, N, 3], on the CUDA device of the model.
        labels: its labels, [B].

    Returns:
        A function like `step`. Its results are overwritten by the next call.

    Raises:
        ValueError: if the step cannot be captured.
    """
    points, labels = points.clone(), labels.clone()
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    main, side = torch.cuda.current_stream(points.device), torch.cuda.Stream(points.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries make their handles and workspaces, which a capture could not
            model.zero_grad(set_to_none=True)
            step(points, labels)
    main.wait_stream(side)
    model.zero_grad(set_to_none=True)  # so that the capture writes gradients instead of adding to them
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            loss, logits = step(points, labels)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`cuda_graph`: not possible for this model, set it to false ({reason})") from error
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)

    def replay(new_points: Tensor, new_labels: Tensor) -> tuple[Tensor, Tensor]:
        points.copy_(new_points)
        labels.copy_(new_labels)
        graph.replay()
        return loss, logits

    return replay
