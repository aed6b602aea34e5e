"""A training step as one CUDA graph: many small kernels take longer to launch than to run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed
from torch import Tensor, nn

# labels [B], points [B, N, 3], features [B, N, F] if the model takes any, and the tensors of its
# neighbourhoods if they are there -> loss [], logits [B, classes]; leaves gradients in the parameters
Step = Callable[..., tuple[Tensor, Tensor]]


def capture(step: Step, model: nn.Module, batch: Sequence[Tensor]) -> Step:
    """Record `step` for one shape; the result replays it on other data of that shape.

    The model's buffers are left as they were. Its gradients become the graph's own tensors, which every
    replay overwrites: they must not be set to None.

    Args:
        step: forward and backward without synchronisation.
        model: what the step trains.
        batch: arguments of the step, on the CUDA device of the model.

    Returns:
        A function like `step`. Its results are overwritten by the next call.

    Raises:
        ValueError: if the step cannot be captured.
    """
    inputs = [tensor.clone() for tensor in batch]
    device = inputs[0].device
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries make their handles and workspaces, which a capture could not
            model.zero_grad(set_to_none=True)
            step(*inputs)
    main.wait_stream(side)
    model.zero_grad(set_to_none=True)  # so that the capture writes gradients instead of adding to them
    graph = torch.cuda.CUDAGraph()
    # NCCL has a thread that asks for the state of events at any time.
    mode = "thread_local" if torch.distributed.is_initialized() else "global"
    try:
        with torch.cuda.graph(graph, capture_error_mode=mode):
            loss, logits = step(*inputs)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"`cuda_graph`: not possible for this model, set it to false ({reason})") from error
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)

    def replay(*new: Tensor) -> tuple[Tensor, Tensor]:
        for tensor, value in zip(inputs, new):
            tensor.copy_(value)
        graph.replay()
        return loss, logits

    return replay
