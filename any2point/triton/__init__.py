"""GPU kernels in Triton, one module per op; imported when the first of them is launched."""

from __future__ import annotations

import torch


def tf32_allowed() -> bool:
    """Whether torch may round float32 operands of products on GPUs to 10 bits; Dynamo cannot trace this."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
