"""GPUs that need not be there, for tests of what is launched on them."""

from __future__ import annotations

# (capability, processors, shared memory a block can have)
GPUS = {
    "sm_75": (75, 40, 65_536),
    "sm_80": (80, 108, 166_912),
    "sm_86": (86, 84, 101_376),
    "sm_89": (89, 128, 101_376),
    "sm_90": (90, 132, 232_448),
    "sm_100": (100, 148, 232_448),
    "sm_120": (120, 170, 101_376),
}
