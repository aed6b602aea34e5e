"""Trim dumps of the official Any2Point code to the small files of tests/golden.

usage: make_golden.py DUMPS

DUMPS holds, for each of the six official model folders, VARIANT.npz and VARIANT_hot.npz (inputs, intermediate
and final values, one training step) and params_VARIANT.txt (names and shapes of all parameters and buffers):
the official code at commit 4e03b69, full depth, weights made from their names by tests/models/golden.py.

Every value stays, with fewer channels: `tokens_c8` (every 8th) becomes `tokens_c32` or `tokens_c128`; copies
of the same value with all channels (`_full01`) and the input, which is shared, are left out. Lists of
neighbours become digests. tests/models/parity.py says what is compared; check_golden.py compares with the
complete dumps.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "models"))

from golden import FOLDER, FOLDERS  # noqa: E402

DETAILED = ("clip-text/scanobjectnn", "dinov2/scanobjectnn")
LEFT_OUT = ("pts", "grad_names", "grad_norms", "buf_names_after", "buf_norms_after")
# Kept channels of each value: every so many, in the detailed files and in the others.
CHANNELS = (64, 256)
FINER = {"tokens": (32, 128), "pos_embed": (32, 128), "raw_embed": (32, 32), "stage0": (32, 64)}
FINER |= {"stage1": (32, 64), "block0_out": (32, 256), "block_last_out": (32, 256), "blocks_out": (256, 256)}
CHANNELS_FIRST = ("raw_embed", "stage0", "stage1", "interp_raw")


def parameters(path: Path) -> list[str]:
    """`name|shape|fill rule|trained` of every parameter and buffer."""
    lines = []
    for line in path.read_text().splitlines():
        if line.startswith(("param", "buffer")):
            shape = line[line.index("(") + 1 : line.index(")")].replace(" ", "").strip(",")
            rule = line[line.index(")") + 1 :].split()[0]
            _, status, name = line.split()[:3]
            lines.append(f"{name}|{shape}|{rule}|{int(status == 'TRAIN')}")
    return lines


def size_of(shape: str) -> int:
    return int(np.prod([int(n) for n in shape.split(",") if n], dtype=np.int64))


def as_bytes(lines: list[str]) -> np.ndarray:
    return np.frombuffer("\n".join(lines).encode(), np.uint8)


def trim(key: str, value: np.ndarray, detailed: bool) -> dict[str, np.ndarray]:
    """The part of a value that is kept, under the key that says which."""
    if key.startswith("knn_idx_sorted"):
        digest = [hashlib.sha256(cloud.tobytes()).digest()[:8] for cloud in value.astype("<i2")]
        packed = np.frombuffer(b"".join(digest), np.uint8).reshape(len(value), 8)
        return {key.replace("knn_idx_sorted", "knn_digest"): packed}
    if key.startswith("buf/"):
        return {f"{key}_c8": value[::8]}
    if value.dtype.kind == "i":
        return {key: value.astype(np.int16 if abs(value).max() < 1 << 15 else np.int32)}
    match = re.fullmatch(r"(.+?)(_s0)?_c(\d+)", key)
    if match is None:
        return {key: value}
    name, first, had = match[1], match[2] or "", int(match[3])
    wanted = FINER.get(name, CHANNELS)[0 if detailed else 1]
    step = max(1, wanted // had)
    kept = value[..., ::step, :] if name in CHANNELS_FIRST else value[..., ::step]
    return {f"{name}{first}_c{had * step}": kept}


def gradients(dump: np.lib.npyio.NpzFile, sizes: dict[str, int], count: int) -> dict[str, np.ndarray]:
    """Of each gradient `flatten()[::step][::substep]`, one after another in the order of their names."""
    values, steps = [], []
    for name in map(str, dump["grad_names"]):
        if f"grad/{name}" in dump:
            part, step = dump[f"grad/{name}"].reshape(-1), 1
        else:
            part, step = dump[f"gradsub/{name}"], max(1, sizes[name] // 256)
        substep = max(1, part.size // count)
        values.append(part[::substep].astype(np.float32))
        steps.append((step, substep, values[-1].size))
    return {"gradient_values": np.concatenate(values), "gradient_steps": np.array(steps, np.int32)}


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    dumps = Path(sys.argv[1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    points = {}
    for variant, name in FOLDERS.items():
        detailed = variant in DETAILED
        lines = parameters(dumps / f"params_{name}.txt")
        sizes = {line.split("|")[0]: size_of(line.split("|")[1]) for line in lines}
        for suffix in ("", "_hot"):
            dump = np.load(dumps / f"{name}{suffix}.npz")
            files: dict[str, np.ndarray] = {}
            for key in dump.files:
                if key in LEFT_OUT or "_full01" in key or key.startswith(("grad/", "gradsub/")):
                    continue
                files |= trim(key, dump[key], detailed and not suffix)
            files["grad_norms"] = dump["grad_norms"].astype(np.float32)
            files["buf_norms_after"] = dump["buf_norms_after"]
            if not suffix:
                points[variant.split("/")[1]] = np.round(dump["pts"] * 2048).astype(np.int16)
                files |= gradients(dump, sizes, 64 if detailed else 16)
                for names in ("grad_names", "buf_names_after"):
                    files[names] = as_bytes(list(map(str, dump[names])))
                files["parameters"] = as_bytes(lines)
            np.savez_compressed(FOLDER / f"{variant.replace('/', '_')}{suffix}.npz", **files)
    np.savez_compressed(FOLDER / "points.npz", **points)
    total = sum(file.stat().st_size for file in FOLDER.glob("*.npz"))
    print(f"{total / 1e6:.2f} MB in {FOLDER}")


if __name__ == "__main__":
    main()
