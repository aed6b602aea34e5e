"""What is trained: the source in full, a linear probe; and gradient checkpointing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import FAMILIES, SMALL, clouds, make, make_source
from torch import Tensor

from any2point import Any2Point, Any2PointConfig
from any2point.ops import _local_aggregate_recompute

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model: Any2Point, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(clouds(4)), torch.arange(4)).backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning(family: str) -> None:
    source = make_source(family)
    fingerprint = source.fingerprint
    model = make(source=source, tuning="full")
    assert all(p.requires_grad for p in model.parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    assert all(module.training for module in model.modules())
    train(model)
    assert not any(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        # A bias before a batch normalisation has no gradient at all.
        still = re.fullmatch(r"tokenizer\.stages\.\d\.\d\.(down|up)\.bias", name)
        assert still or not torch.equal(parameter, before[name]), name
    assert {"encoder.source.blocks.0.attn.qkv.weight", "projection.table"} <= set(before)
    assert source.fingerprint == fingerprint, "the source itself stays as it was"
    decayed, plain = model.parameter_groups(0.1)
    assert len(decayed["params"]) + len(plain["params"]) == len(before)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed_names = {names[id(p)] for p in decayed["params"]}
    assert "encoder.source.blocks.1.mlp.fc1.weight" in decayed_names
    assert not any("norm" in n or n.endswith("bias") or n == "projection.table" for n in decayed_names)


@pytest.mark.parametrize("family", FAMILIES)
def test_full_tuning_is_saved_whole(family: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = make(family, tuning="full")
    train(model)
    model.save_pretrained(tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"seed": 0', '"seed": 9'))  # no help from there
    loaded = Any2Point.from_pretrained(tmp_path)
    assert torch.equal(loaded(clouds()), model(clouds()))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(Any2Point.from_pretrained(tmp_path / "again")(clouds()), model(clouds()))
    train(model, 1)
    train(loaded, 1)
    assert loaded.encoder.source.blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("tuning", ["full", "probe"])
def test_resume(tuning: str) -> None:
    """What a run keeps (weights that are trained, buffers, optimiser) is enough to go on from."""
    states = []
    for stop in (False, True):
        torch.manual_seed(3)
        model = make(tuning=tuning, dropout=0.0, adapter_dropout=0.0).train()
        optimizer = torch.optim.AdamW(model.parameter_groups(), lr=1e-3)
        for step in range(4):
            if stop and step == 2:
                frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
                weights = {n: v.clone() for n, v in model.state_dict().items() if n not in frozen}
                state = optimizer.state_dict()
                model = make(tuning=tuning, dropout=0.0, adapter_dropout=0.0).train()
                model.load_state_dict(weights, strict=False)
                optimizer = torch.optim.AdamW(model.parameter_groups(), lr=1e-3)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(clouds(4)), torch.arange(4)).backward()
            optimizer.step()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_linear_probe_changes_tokenizer_and_head_alone(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = make(tuning="probe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"tokenizer", "head"}
    model.save_pretrained(tmp_path)
    assert torch.equal(Any2Point.from_pretrained(tmp_path)(clouds()), model(clouds()))


def gradients(
    model: Any2Point, autocast: bool = False
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(4)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(clouds())
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(3)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), found, {name: b.clone() for name, b in model.named_buffers()}


RANDOM = {"drop_path": 0.3, "attention_dropout": 0.2, "adapter_dropout": 0.2}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        RANDOM,
        {"pooling": "max+mean", "insertion": "attention_output", "ensemble": "max"},
        {"tokenizer": "pointnet", "adapter_dropout": 0.0},
        {"tuning": "full", "position_adds": "both"},
    ],
)
def test_checkpointing(options: dict[str, Any], autocast: bool) -> None:
    """The same logits, gradients and, above all, running statistics, bit for bit."""
    plain = gradients(make("dinov2", **options), autocast)
    again = gradients(make("dinov2", checkpointing=True, **options), autocast)
    assert torch.equal(again[0], plain[0])
    for got, want in zip(again[1:], plain[1:]):
        assert set(got) == set(want)
        for name, value in want.items():
            assert torch.equal(got[name], value), name
    before = dict(make("dinov2", **options).named_buffers())
    moved = [n for n, b in plain[2].items() if n.endswith("running_mean") and not torch.equal(b, before[n])]
    assert len(moved) > 3


def test_checkpointing_keeps_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph holds on to between forward and backward."""
    monkeypatch.setattr(_local_aggregate_recompute, "ROOM", 1)

    def held(**options: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model = make(**options).train()
        known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            keep = model(clouds())
        del keep
        return sum(size for pointer, size in sizes.items() if pointer not in known)

    assert held(checkpointing=True) < 0.3 * held()


def test_checkpointing_costs_nothing_without_gradient() -> None:
    calls = []
    model = make(checkpointing=True)
    block: Callable[..., Tensor] = model.encoder.block
    model.encoder.block = lambda *args: calls.append(0) or block(*args)
    with torch.no_grad():
        assert torch.equal(model(clouds()), make()(clouds()))
    assert len(calls) == 2


def test_a_checkpointed_model_learns() -> None:
    torch.manual_seed(0)
    options = SMALL | {"num_classes": 2, "dropout": 0.0, "checkpointing": True, "tuning": "full"}
    model = Any2Point(Any2PointConfig(**options), make_source())
    points = torch.randn(16, 96, 3)
    points[8:, :, 2] *= 0.1
    labels = torch.arange(16) // 8
    optimizer = torch.optim.AdamW(model.parameter_groups(0.05), lr=1e-3)
    for _ in range(25):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(points), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1
