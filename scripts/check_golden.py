"""Compare the model with complete dumps of the official Any2Point code, every key of all of them.

usage: check_golden.py DUMPS [VARIANT ...]

DUMPS is the folder that make_golden.py reads; a VARIANT is such as clip-text/scanobjectnn, by default all.
Each is run with plain and with hot weights, at full depth: about a minute and 3 GB a variant. Prints the
worst error of every kind of value, relative to the largest value, and exits with 1 if one is too large. The
tests do the same with the shipped part of the dumps.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "models")]

import golden  # noqa: E402
import parity  # noqa: E402
import torch  # noqa: E402


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    folder, names = Path(sys.argv[1]), sys.argv[2:] or list(golden.FOLDERS)
    wrong = 0
    for variant in names:
        for hot in (False, True):
            dump = golden.load_complete(folder, variant, hot=hot)
            model = parity.build(variant, golden.state_dict(variant, hot=hot), hot=hot)
            points = torch.from_numpy(dump.values["pts"])
            rows = parity.compare(model, variant, dump, points, hot=hot)
            kind = "hot" if hot else "plain"
            print(f"\n{variant}, {kind}: {len(dump.values)} arrays, {len(rows)} comparisons")
            for group in dict.fromkeys(row.group for row in rows):
                worst = max((row for row in rows if row.group == group), key=lambda row: row.error)
                print(f"  {group:22} {worst.error:.1e}  allowed {worst.allowed:.0e}  {worst.key}")
            for row in rows:
                if row.wrong:
                    print(f"  WRONG {row.key}: {row.error:.2e}, allowed {row.allowed:.0e}")
                    wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
