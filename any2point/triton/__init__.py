"""GPU kernels in Triton, one module per op; imported when the first of them is launched."""
