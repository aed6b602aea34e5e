"""`python -m any2point`, the same as the command `any2point`."""

from __future__ import annotations

import sys

from any2point.cli import main

if __name__ == "__main__":
    sys.exit(main())
