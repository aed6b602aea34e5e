"""`parity="official"` against results of the official code.

Tolerances are relative to the largest value. Evaluation is held to 1e-5 (measured: 2e-6; for position
encodings of lines, which the official code reads at rounded coordinates, 2e-5 and 1.2e-5), one training step
to 1e-3 (measured: 4e-5 on logits).

Gradients are noisier. Four clouds with nearly equal features pass a batch normalisation in the head, which
magnifies rounding; one of its units at the kink of its ReLU then moves every gradient by a percent or so.
Norms are held to 3e-2 in the worst case and 2e-3 in the median (1e-2 in the worst case with large signals).
Gradients that are zero up to rounding (biases before a batch normalisation, the final normalisation's bias,
CLIP's class token under attention over the batch) only have to be small.
"""

from __future__ import annotations

import hashlib
import re

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import assert_near

from any2point import Any2Point
from any2point.models.official import VARIANTS, translate
from any2point.ops import knn
from any2point.reference.batch_norm import BatchNorm, masked_batch_norm
from any2point.reference.guided_aggregate import attend_in_cells
from any2point.reference.segment_pool import segment_pool

MAIN = ("clip-text/scanobjectnn", "dinov2/scanobjectnn")
OTHERS = tuple(name for name in VARIANTS if name not in MAIN)
ROUNDING = r".*net[12]\.0\.bias|cls_head_finetune\.[04]\.bias|(encoder\.)?norm\.bias"
CLIP_ROUNDING = r"|(encoder\.)?cls_(token|pos)"
QUIET = {"attention_dropout": 0.0, "drop_path": 0.0, "adapter_dropout": 0.0, "dropout": 0.0}


class Run:
    """One variant: its model, the official results, and what the model gives in evaluation mode."""

    def __init__(self, variant: str, *, hot: bool = False) -> None:
        self.variant, self.hot = variant, hot
        self.want = golden.load(variant, hot=hot)
        self.points = golden.points(variant)
        self.model = Any2Point.from_official(
            golden.state_dict(variant, hot=hot),
            variant,
            position_table=golden.position_table(variant, hot=hot),
            **QUIET,
        )
        self.inside: dict[str, torch.Tensor] = {}
        first = self.model.encoder.source.blocks[0]
        guided = self.model.encoder.adapters[0]
        watched = {"attention": first.attn, "mlp": first.mlp, "adapter": guided.adapter, "tokens": guided}
        hooks = [
            module.register_forward_hook(
                lambda _module, args, out, name=name: self.inside.update(
                    {name: args[0] if name == "tokens" else out}
                )
            )
            for name, module in watched.items()
        ]
        with torch.no_grad():
            self.x, self.position, self.cell, self.cluster, self.index = self.model.embed(self.points)
            encoder, x = self.model.encoder, self.x
            x = x + self.position if encoder.position_adds != "every" else x
            self.block0_in = x + self.position if encoder.position_adds != "once" else x
            self.blocks = []
            for i in range(len(encoder.adapters)):
                x = encoder.block(i, x, self.position, self.cell, self.cluster)
                self.blocks.append(x)
                for hook in hooks:
                    hook.remove()
            self.normed = self.model.norm(x)
            patches, cls = self.normed[:, 1:].amax(1), self.normed[:, 0]
            pair = [patches, cls] if self.model.config.feature_order == "max_cls" else [cls, patches]
            self.feature = torch.cat(pair, dim=-1)
            self.logits = self.model.head(self.feature)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.model.train()
        logits = self.model(self.points)
        return logits, F.cross_entropy(logits, golden.LABELS)


@pytest.fixture(scope="module", params=MAIN)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(request.param)


def check_indices(run: Run) -> None:
    want = {k: torch.from_numpy(v).long() for k, v in run.want.items() if k.startswith("fps")}
    first, second, third = want["fps0"], want["fps1"], want["fps2"]
    assert torch.equal(run.index, first.gather(1, second.gather(1, third)))
    batch, cells = len(run.points), run.model.projection.num_cells
    flat = (run.cell + cells * torch.arange(batch)[:, None, None]).transpose(0, 1).flatten(1)
    assert torch.equal(flat, torch.from_numpy(run.want["cell"]).long())
    assert torch.equal(run.cluster.flatten(), torch.from_numpy(run.want["cluster"]).long())

    points = run.points
    for stage, count in enumerate(run.model.config.counts):
        # The official indices themselves: two of them are swapped in one cloud, by a tie in its second stage.
        centers = points.gather(1, want[f"fps{stage}"][..., None].expand(-1, -1, 3))
        neighbor = knn(centers, points, count, sorted=False).index.numpy().astype("<i2")
        digest = [hashlib.sha256(cloud.tobytes()).digest()[:8] for cloud in neighbor]
        assert b"".join(digest) == run.want[f"knn{stage}"].tobytes(), f"neighbours of stage {stage}"
        points = centers


def check_forward(run: Run, channels: int) -> None:
    want = run.want
    assert_near(run.x[:, 1:, ::channels], want["tokens"], 5e-6, "tokens")
    assert_near(run.position[:, 1:, ::channels], want["encoding"], 2e-5, "position encodings")
    position = run.model.projection(run.points.gather(1, run.index[..., None].expand(-1, -1, 3))).position
    assert_near(position[..., 0], want["position_x"], 1e-6, "positions x")
    if "position_y" in want:
        assert_near(position[..., 1], want["position_y"], 1e-6, "positions y")
    blocks = torch.stack(run.blocks)[..., ::256]
    assert_near(blocks, want["blocks"], 1e-5, "blocks")
    assert_near(run.feature, want["feature"], 1e-5, "pooled feature")
    assert_near(run.logits, want["logits"], 1e-5, "logits")
    with torch.no_grad():
        assert_near(run.model(run.points[:2]), want["logits_of_two"], 1e-5, "logits of two clouds")


def check_norms(run: Run, names: list[str], norms: np.ndarray) -> tuple[list[float], list[torch.Tensor]]:
    """Relative errors of the gradients' norms, and the gradients; mere rounding only has to be small."""
    gradients = {name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}
    small = ROUNDING + (CLIP_ROUNDING if run.variant.startswith("clip") else "")
    errors, found = [], []
    for name, norm in zip(names, norms):
        ours, row = translate(name)  # type: ignore[misc]
        gradient = gradients[ours]
        assert gradient is not None, name
        found.append(gradient if row is None else gradient[row])
        if re.fullmatch(small, name):
            assert found[-1].norm() < 1e-3 * norms.max(), name
            errors.append(0.0)
        else:
            errors.append(abs(found[-1].double().norm().item() - norm) / norm)
    return errors, found


def check_training(run: Run) -> None:
    want = run.want
    logits, loss = run.step()
    loss.backward()
    assert_near(logits, want["train_logits"], 1e-3, "logits in training")
    assert abs(loss.item() - float(want["train_loss"])) < 1e-4
    names = golden.text(want["gradient_names"])
    assert sum(p.trained for p in golden.parameters(run.variant)) == len(names)
    errors, gradients = check_norms(run, names, want["gradient_norms"])
    assert max(errors) < 3e-2, names[int(np.argmax(errors))]
    assert np.median(errors) < 2e-3

    offset, differences = 0, []
    for gradient, error, norm, (step, substep, size) in zip(
        gradients, errors, want["gradient_norms"], want["gradient_steps"]
    ):
        values = want["gradient_values"][offset : offset + size]
        offset += size
        usual = norm * (len(values) / gradient.numel()) ** 0.5
        # Left out: gradients that are rounding, as a whole or (weights on CLIP's class token) where sampled.
        if error > 0 and np.linalg.norm(values) > 1e-2 * usual:
            difference = gradient.flatten()[::step][::substep] - torch.from_numpy(values)
            differences.append(difference.norm().item() / np.linalg.norm(values))
    assert len(differences) > 0.9 * len(names)
    assert max(differences) < 0.1
    assert np.median(differences) < 3e-2

    state = run.model.state_dict()
    for name, norm in zip(golden.text(want["buffer_names"]), want["buffer_norms"]):
        place = translate(name)
        if place is not None:
            value = state[place[0]] if place[1] is None else state[place[0]][place[1]]
            assert abs(value.double().norm().item() - norm) <= 1e-5 * max(1.0, abs(norm)), name


class TestMain:
    """The two variants of ScanObjectNN in detail."""

    def test_published_size(self, run: Run) -> None:
        summary = run.model.summary()
        clip = run.variant.startswith("clip")
        assert summary.trained_without_head == (948_312 if clip else 800_760)
        assert summary.trained == (1_411_943 if clip else 1_264_391)
        assert summary.trained + summary.frozen == (86_466_407 if clip else 86_337_287)

    def test_indices(self, run: Run) -> None:
        check_indices(run)

    def test_forward(self, run: Run) -> None:
        check_forward(run, 128 if run.want["tokens"].shape[-1] == 6 else 32)

    def test_first_block(self, run: Run) -> None:
        want, inside, encoder = run.want, run.inside, run.model.encoder
        assert_near(run.block0_in[..., ::64], want["block0_in"], 1e-5, "input")
        assert_near(inside["attention"][..., ::64], want["block0_attention"], 1e-5, "attention")
        assert_near(inside["mlp"][..., ::64], want["block0_mlp"], 1e-5, "MLP")
        adapter = inside["adapter"] / run.model.config.scale_factor
        assert_near(adapter[..., ::64], want["block0_adapter"], 1e-5, "adapter")
        assert_near(run.blocks[0][..., ::32], want["block0_out"], 1e-5, "output")
        assert_near(run.blocks[-1][..., ::32], want["last_out"], 1e-5, "output of the last block")
        assert_near(run.normed[..., ::64], want["normed"], 1e-5, "final norm")

        guided, attention = encoder.adapters[0], encoder.attention.tensors()
        with torch.no_grad():
            tokens = inside["tokens"]
            heads = attend_in_cells(
                tokens, run.cell, attention, num_heads=6, scale=12**-0.5, eps=guided.norm_eps
            )
            branch = F.linear(heads[:, 0], attention.proj_weight[0], attention.proj_bias[0])
            assert_near(branch.flatten(0, 1)[:, ::64], want["block0_cell_attention"], 1e-5, "cells")

            rows = len(tokens) * guided.num_cells
            cell = run.cell[:, 0] + guided.num_cells * torch.arange(len(tokens))[:, None]
            pooled = segment_pool((tokens + branch).flatten(0, 1), cell.flatten(), rows, "mean")
            assert_near(pooled[:, ::64], want["block0_pooled"], 1e-5, "pooled cells")
            norm = BatchNorm(*(tensor[0] for tensor in guided.view_norm.tensors()))
            step = {"training": False, "momentum": 0.1, "eps": 1e-5}
            view = F.gelu(masked_batch_norm(pooled, norm, torch.ones(rows, dtype=torch.bool), **step))
            assert_near(view[:, ::64], want["block0_view"], 1e-5, "features of a view")

            flat, voxel = tokens.flatten(0, 1), run.cluster.flatten()
            count = int(voxel.max()) + 1
            space = segment_pool(flat, voxel, count, "max") + segment_pool(flat, voxel, count, "mean")
            every = torch.ones(count, dtype=torch.bool)
            space = F.gelu(masked_batch_norm(space, guided.space_norm.tensors(), every, **step))
            assert_near(space[:, ::64], want["block0_space"], 1e-5, "features of voxels")

    def test_training_step(self, run: Run) -> None:
        check_training(run)


def check_hot(variant: str) -> None:
    run = Run(variant, hot=True)
    assert_near(torch.stack(run.blocks)[..., ::256], run.want["blocks"], 1e-5, "blocks")
    assert_near(run.feature, run.want["feature"], 1e-5, "pooled feature")
    assert_near(run.logits, run.want["logits"], 1e-5, "logits")
    logits, loss = run.step()
    loss.backward()
    assert_near(logits, run.want["train_logits"], 2e-3, "logits in training")
    assert abs(loss.item() - float(run.want["train_loss"])) < 3e-4
    names = golden.text(golden.load(variant)["gradient_names"])
    errors, _ = check_norms(run, names, run.want["gradient_norms"])
    assert max(errors) < 1e-2, names[int(np.argmax(errors))]


@pytest.mark.parametrize("variant", MAIN)
def test_large_signals(variant: str) -> None:
    check_hot(variant)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS)
def test_other_variants(variant: str) -> None:
    run = Run(variant)
    check_indices(run)
    check_forward(run, 128)
    check_training(run)


@pytest.mark.slow
@pytest.mark.parametrize("variant", OTHERS)
def test_large_signals_of_other_variants(variant: str) -> None:
    check_hot(variant)
