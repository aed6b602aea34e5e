"""The command `convert`: files as the official code writes them, and what they were trained from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden
import numpy as np
import parity
import pytest
import torch
from torch import Tensor

from any2point import Any2Point
from any2point.cli import main
from any2point.models.official import VARIANTS, official_state
from any2point.train import load_recipe


def official_file(variant: str, path: Path) -> dict[str, Tensor]:
    """A fine-tuned checkpoint with everything that the official code puts into it."""
    state = golden.small_state(variant)
    for name in state:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(11)
    optimizer = {"state": {0: {"step": 5, "exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    extra: dict[str, Any] = {"optimizer": optimizer, "epoch": 17}
    if variant.endswith("scanobjectnn"):
        extra |= {"model": state, "scheduler": {"base_values": [5e-4]}, "best_val": np.float64(91.9)}
    else:
        wrapped = {f"module.{name}": value for name, value in state.items()}
        extra |= {"base_model": wrapped, "metrics": {"acc": torch.tensor(94.3)}}
        extra |= {"best_metrics": {"acc": np.float32(94.3)}}
    torch.save(extra, path)
    return state


def pretrained_file(variant: str, path: Path) -> Path:
    """The checkpoint that it was trained from, under the names of its own project."""
    family = variant.split("/")[0]
    state = {name.removeprefix("encoder."): value for name, value in golden.small_state(variant).items()}
    frozen = {
        name: value
        for name, value in state.items()
        if name.startswith(("blocks", "resblocks")) and "adapter" not in name and "out_transform" not in name
    }
    norm = {"weight": torch.ones(48), "bias": torch.zeros(48)}
    table = golden.small_table(variant)
    if family == "clip-text":
        out = {f"transformer.{name}": value for name, value in frozen.items()}
        out |= {f"ln_final.{leaf}": value for leaf, value in norm.items()} | {"positional_embedding": table}
    elif family == "dinov2":
        out = frozen | {f"norm.{leaf}": value for leaf, value in norm.items()} | {"pos_embed": table}
        out |= {"cls_token": torch.zeros(1, 1, 48), "mask_token": torch.zeros(1, 48)}
        out["patch_embed.proj.weight"] = torch.zeros(48, 3, 14, 14)
    else:
        trunk = "modality_trunks.audio.blocks"
        out = {}
        for name, value in frozen.items():
            name = (
                name.replace("blocks", trunk, 1)
                .replace("norm", "norm_")
                .replace("attn.proj", "attn.out_proj")
            )
            out[name.replace("attn.qkv.", "attn.in_proj_")] = value
        for i in range(2):
            out |= {f"{trunk}.{i}.attn.bias_{kv}": torch.ones(1, 1, 48) for kv in "kv"}
        stem = "modality_preprocessors.audio"
        out |= {f"{stem}.cls_token": torch.zeros(1, 1, 48), f"{stem}.pos_embedding_helper.pos_embed": table}
        out[f"{stem}.rgbt_stem.proj.weight"] = torch.zeros(48, 1, 16, 16)
        out |= {f"modality_heads.audio.0.{leaf}": value for leaf, value in norm.items()}
    torch.save(out, path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_convert(variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = official_file(variant, tmp_path / "official.pth")
    pretrained = pretrained_file(variant, tmp_path / "pretrained.pth")
    files = [str(tmp_path / "official.pth"), str(tmp_path / "model")]
    assert main(["convert", *files, "--pretrained", str(pretrained)]) == 0
    assert variant in capsys.readouterr().out

    model = Any2Point.from_pretrained(tmp_path / "model")
    want = Any2Point.from_official(state, variant, position_table=golden.small_table(variant))
    points = golden.points(variant)[:2]
    assert torch.equal(model(points), want(points))
    assert len(model.class_names or ()) == VARIANTS[variant]["num_classes"]
    back = official_state(model, variant)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    assert back.keys() == state.keys()
    recipe = load_recipe(tmp_path / "model" / "recipe.yaml")
    assert (recipe.variant, recipe.parity, recipe.source) == (variant, "official", str(pretrained))

    assert main(["convert", "--to-official", str(tmp_path / "model"), str(tmp_path / "back.pth")]) == 2
    assert "width 48 (official: 768)" in capsys.readouterr().err
    assert not (tmp_path / "back.pth").exists()


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    variant = "dinov2/scanobjectnn"
    tuned, out = tmp_path / "official.pth", tmp_path / "model"
    state = official_file(variant, tuned)
    pretrained = pretrained_file(variant, tmp_path / "pretrained.pth")
    other = pretrained_file("imagebind/modelnet40", tmp_path / "audio.pth")
    changed = torch.load(pretrained, weights_only=True)
    changed["blocks.1.mlp.fc1.bias"][3] += 1
    torch.save(changed, tmp_path / "changed.pth")
    torch.save({"model": state, "best": Trap(tmp_path / "touched")}, tmp_path / "trap.pth")
    headless = {name: value for name, value in state.items() if not name.startswith("prediction")}
    torch.save({"model": headless}, tmp_path / "headless.pth")
    given = ["--pretrained", str(pretrained)]
    for arguments, message in (
        (
            [tuned, out],
            "--pretrained: expected the dinov2 checkpoint that official.pth (dinov2/scanobjectnn)",
        ),
        ([tuned, out, *given, "--variant", "imagebind/scanobjectnn"], "imagebind/scanobjectnn does not fit"),
        ([tuned, out, *given, "--variant", "dino"], "`variant`: expected one of clip-text/scanobjectnn"),
        ([tuned, out, "--pretrained", other], "expected a DINOv2"),
        ([tuned, out, "--pretrained", tmp_path / "none.pth"], "none.pth: no such file"),
        (
            [tuned, out, "--pretrained", tmp_path / "changed.pth"],
            "changed.pth, whose blocks.1.mlp.fc1.bias is",
        ),
        ([tmp_path / "trap.pth", out, *given], "for which code would have to run"),
        ([tmp_path / "headless.pth", out, *given], "expected dinov2/scanobjectnn or dinov2/modelnet40"),
        ([pretrained, out, *given], "`variant`: expected dinov2/scanobjectnn or dinov2/modelnet40, because"),
        (["--to-official", tmp_path, out], "expected a trained model, found no config.json"),
        (["--to-official", tmp_path, tuned], "expected a new file"),
    ):
        assert main(["convert", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert not (tmp_path / "touched").exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["clip-text/scanobjectnn", "imagebind/modelnet40"])
def test_there_and_back(variant: str, tmp_path: Path) -> None:
    """A model of full size through the command, as a file that the official code reads."""
    state = golden.state_dict(variant)
    parity.build(variant, state).save_pretrained(tmp_path / "model", include_source=True)
    assert main(["convert", "--to-official", str(tmp_path / "model"), str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    wrapper = "model" if variant.endswith("scanobjectnn") else "base_model"
    prefix = "" if wrapper == "model" else "module."
    for name, value in state.items():
        assert torch.equal(back[wrapper].pop(prefix + name), value), name
    assert not back[wrapper]
    assert set(back) >= {"optimizer", "epoch"}
