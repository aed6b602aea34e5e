"""Trim dumps of the official Any2Point code to the small files of tests/golden.

usage: make_golden.py DUMPS

DUMPS holds, for each of the six official model folders, VARIANT.npz and VARIANT_hot.npz (inputs, intermediate
and final values, one training step) and params_VARIANT.txt (names and shapes of all parameters and buffers):
the official code at commit 4e03b69, full depth, weights made from their names by tests/models/golden.py.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np

VARIANTS = {
    "clip-text_scanobjectnn": "Any2Point_CLIP_Lang",
    "dinov2_scanobjectnn": "Any2Point_DINOV2_Vision",
    "imagebind_scanobjectnn": "Any2Point_ImageBind_audio",
    "clip-text_modelnet40": "Any2Point_clip_lang_modelnet",
    "dinov2_modelnet40": "Any2Point_DINOV2_modelnet",
    "imagebind_modelnet40": "Any2Point_ImageBind_Modelnet",
}
FULL = ("clip-text_scanobjectnn", "dinov2_scanobjectnn")
OUT = Path(__file__).resolve().parent.parent / "tests" / "golden"

# Our name: (name in the dump, step over its last axis). The dump itself keeps every 8th to 32nd channel.
COMMON = {
    "tokens": ("tokens_c8", 16),
    "encoding": ("pos_embed_c8", 16),
    "position_x": ("pos_x", 1),
    "blocks": ("blocks_out_c32", 8),
    "feature": ("global_feat", 1),
    "logits": ("logits", 1),
    "logits_of_two": ("logits_batch01", 1),
    "train_logits": ("train_logits", 1),
    "train_loss": ("train_loss", 1),
}
DETAIL = {
    "tokens": ("tokens_c8", 4),
    "encoding": ("pos_embed_c8", 4),
    "block0_in": ("block0_in_c8", 8),
    "block0_out": ("block0_out_c8", 4),
    "last_out": ("block_last_out_c8", 4),
    "block0_attention": ("b0_attn_c16", 4),
    "block0_mlp": ("b0_mlp_c16", 4),
    "block0_adapter": ("b0_adapter_c16", 4),
    "block0_space": ("b0_out3d_c16", 4),
    "block0_pooled": ("b0_binfeat_v0_c16", 4),
    "block0_view": ("b0_outv0_c16", 4),
    "block0_cell_attention": ("b0_attn1_v0_c16", 4),
    "normed": ("norm_out_c16", 4),
}
HOT = {
    "blocks": ("blocks_out_c256", 1),
    "feature": ("global_feat", 1),
    "logits": ("logits", 1),
    "train_logits": ("train_logits", 1),
    "train_loss": ("train_loss", 1),
}


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


def trim(dump: np.lib.npyio.NpzFile, keys: dict[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    return {ours: dump[name][..., ::step] if step > 1 else dump[name] for ours, (name, step) in keys.items()}


def gradients(dump: np.lib.npyio.NpzFile, sizes: dict[str, int], count: int) -> dict[str, np.ndarray]:
    """Norms of all gradients in the order of their names, and `flatten()[::step][::substep]` of each."""
    values, steps = [], []
    for name in map(str, dump["grad_names"]):
        if f"grad/{name}" in dump:
            part, step = dump[f"grad/{name}"].reshape(-1), 1
        else:
            part, step = dump[f"gradsub/{name}"], max(1, sizes[name] // 256)
        substep = max(1, part.size // count)
        values.append(part[::substep].astype(np.float32))
        steps.append((step, substep, values[-1].size))
    return {
        "gradient_names": as_bytes(list(map(str, dump["grad_names"]))),
        "gradient_norms": dump["grad_norms"].astype(np.float32),
        "gradient_values": np.concatenate(values),
        "gradient_steps": np.array(steps, np.int32),
    }


def buffers(dump: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    return {
        "buffer_names": as_bytes(list(map(str, dump["buf_names_after"]))),
        "buffer_norms": dump["buf_norms_after"].astype(np.float64),
    }


def exact(dump: np.lib.npyio.NpzFile) -> dict[str, np.ndarray]:
    """Index results: small ones in full, neighbour lists as digests."""
    out = {
        "cluster": dump["cluster"].astype(np.int16),
        "cell": dump["flat_grid_index"].astype(np.int16),
    }
    for stage in range(3):
        out[f"fps{stage}"] = dump[f"fps_idx_stage{stage}"].astype(np.int16)
        neighbors = dump[f"knn_idx_sorted_stage{stage}"].astype("<i2")
        digest = [hashlib.sha256(cloud.tobytes()).digest()[:8] for cloud in neighbors]
        out[f"knn{stage}"] = np.frombuffer(b"".join(digest), np.uint8).reshape(len(neighbors), 8)
    return out


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    dumps = Path(sys.argv[1])
    OUT.mkdir(parents=True, exist_ok=True)
    points = {}
    for ours, name in VARIANTS.items():
        detailed = ours in FULL
        dump = np.load(dumps / f"{name}.npz")
        points[ours.split("_")[1]] = np.round(dump["pts"] * 2048).astype(np.int16)
        files = trim(dump, COMMON | (DETAIL if detailed else {})) | exact(dump)
        if "pos_y" in dump:
            files["position_y"] = dump["pos_y"]
        lines = parameters(dumps / f"params_{name}.txt")
        sizes = {line.split("|")[0]: size_of(line.split("|")[1]) for line in lines}
        files |= gradients(dump, sizes, 64 if detailed else 16) | buffers(dump)
        files["parameters"] = as_bytes(lines)
        np.savez_compressed(OUT / f"{ours}.npz", **files)
        hot = np.load(dumps / f"{name}_hot.npz")
        norms = {"gradient_norms": hot["grad_norms"].astype(np.float32)}
        np.savez_compressed(OUT / f"{ours}_hot.npz", **trim(hot, HOT), **norms)
    np.savez_compressed(OUT / "points.npz", **points)
    total = sum(file.stat().st_size for file in OUT.glob("*.npz"))
    print(f"{total / 1e6:.2f} MB in {OUT}")


if __name__ == "__main__":
    main()
