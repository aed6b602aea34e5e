"""`parity="official"` against results of the official code: every recorded value, and one training step.

`scripts/check_golden.py` does the same with the complete dumps.
"""

from __future__ import annotations

import re

import golden
import numpy as np
import parity
import pytest
import torch

from any2point import Any2Point
from any2point.models.official import VARIANTS

# What a dump of each kind has to hold, so that nothing can be lost on the way into this repository.
LINES, IMAGES = ("interp",), ("pos_y", "interp_raw")
PLAIN = {f"{name}{stage}" for name in ("fps_idx_stage", "knn_digest_stage") for stage in range(3)} | {
    *("center", "raw_embed", "stage0", "stage1", "tokens", "pos_x", "pos_embed", "voxel_raw", "cluster"),
    *("idx_ptr", "flat_grid_index", "mask_allowed_count", "block0_in", "b0_attn", "b0_mlp", "b0_adapter"),
    *("b0_out3d", "b0_attn1_v0", "b0_binfeat_v0", "b0_outv0", "block0_out", "block_last_out", "blocks_out"),
    *("norm_out", "global_feat", "logits", "logits_batch01", "labels", "train_logits", "train_loss"),
}
HOT = {
    *("tokens", "pos_embed", "block0_out", "block_last_out", "blocks_out", "global_feat", "logits", "labels"),
    *("train_logits", "train_loss"),
}


@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_missing(variant: str, hot: bool) -> None:
    dump = golden.load(variant, hot=hot)
    found = {re.sub(r"(_s0)?(_c\d+)?$", "", key) for key in dump.values if not key.startswith("buf/")}
    assert found == (HOT if hot else PLAIN | set(LINES if variant.startswith("clip") else IMAGES))
    trained = {p.name for p in golden.parameters(variant) if p.trained}
    assert set(dump.gradient_norms) == trained
    assert set(dump.gradients) == (set() if hot else trained)
    assert sum(key.startswith("buf/") for key in dump.values) == (0 if hot else 6)
    assert set(dump.buffer_norms) == {p.name for p in golden.parameters(variant) if "running" in p.name}


def check(variant: str, device: str, *, hot: bool) -> None:
    state = golden.state_dict(variant, hot=hot)
    model = parity.build(variant, state, hot=hot)
    check_size(model, variant)
    check_way_back(model, variant, state)
    model, points = model.to(device), golden.points(variant).to(device)
    rows = parity.compare(model, variant, golden.load(variant, hot=hot), points, hot=hot)
    wrong = [f"{row.key}: {row.error:.2e}, allowed {row.allowed:.0e}" for row in rows if row.wrong]
    assert not wrong, "\n".join(wrong)


PUBLISHED = {  # trained without the head, trained, all
    "clip-text/scanobjectnn": (948_312, 1_411_943, 86_466_407),
    "dinov2/scanobjectnn": (800_760, 1_264_391, 86_337_287),
    "imagebind/scanobjectnn": (874_536, 1_338_167, 86_392_631),
    "clip-text/modelnet40": (948_312, 1_418_880, 86_473_344),
    "dinov2/modelnet40": (800_760, 1_271_328, 86_344_224),
    "imagebind/modelnet40": (800_760, 1_271_328, 86_325_792),
}


def check_size(model: Any2Point, variant: str) -> None:
    summary = model.summary()
    without, trained, total = PUBLISHED[variant]
    assert (summary.trained_without_head, summary.trained) == (without, trained)
    assert summary.trained + summary.frozen == total


def check_way_back(model: Any2Point, variant: str, state: dict[str, torch.Tensor]) -> None:
    """The official state dict comes back bit for bit, in the wrapper that the official loaders expect."""
    scan = variant.endswith("scanobjectnn")
    back = model.to_official()["model" if scan else "base_model"]
    prefix = "" if scan else "module."
    assert back.keys() == {prefix + name for name in state}
    for name, value in state.items():
        assert torch.equal(back[prefix + name], value), name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hot", [False, True], ids=["plain", "hot"])
def test_official(variant: str, hot: bool, device: str) -> None:
    check(variant, device, hot=hot)


def test_unknown_values_are_an_error() -> None:
    values = {"tokens": parity.Value("tokenizer", torch.zeros(4, 128, 16))}
    assert parity.select(values, "tokens_full01_c8")[1].shape == (2, 128, 2)
    with pytest.raises(AssertionError, match="tokens2_c8: the dump has it"):
        parity.select(values, "tokens2_c8")
    assert parity.Row("nan", "block", float("nan"), 1.0).wrong
    assert golden.relative_error(torch.zeros(2), np.ones((2, 1))) == float("inf")
