"""`any2point sources`: the table of families, and what a checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from any2point.cli import main
from any2point.sources import FAMILIES, Source
from any2point.sources.encoder import Layout
from any2point.sources.table import _layout_text

pytest.importorskip("typer")
safetensors = pytest.importorskip("safetensors.torch")

C = 16


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A small GPT-2 under the names of Hugging Face."""
    shapes = {"wpe.weight": (9, C), "wte.weight": (5, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    for i in range(2):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (C,), f"h.{i}.{norm}.bias": (C,)}
        for layer, inside, outside in (
            ("attn.c_attn", C, 3 * C),
            ("attn.c_proj", C, C),
            ("mlp.c_fc", C, 4 * C),
            ("mlp.c_proj", 4 * C, C),
        ):
            shapes |= {f"h.{i}.{layer}.weight": (inside, outside), f"h.{i}.{layer}.bias": (outside,)}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    safetensors.save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_head": 4}')
    return tmp_path


def test_the_table_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    plain = " ".join(text.split())
    for family in FAMILIES.values():
        assert f"{family.name} {family.width} x {family.depth}" in plain
        assert " ".join(family.title.split()) in plain
        assert f"checkpoint: {family.checkpoint}" in plain
        assert f"{' x '.join(map(str, family.positions))} {family.position_kind}" in plain
    for modality in ("language", "vision", "audio"):
        assert text.count(f"\n{modality}\n") == 1


def test_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == FAMILIES.keys()
    assert rows["roberta"]["positions"] == [512]
    assert rows["dinov2"]["layout"]["layer_scale"] is True
    assert rows["gpt2"]["layout"]["activation"] == "gelu_tanh"
    assert rows["bert"]["class_token"] is True
    assert all(row["position_kind"] in ("learned", "sinusoidal", "stand-in") for row in rows.values())


def test_one_family_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources", "--family", "whisper", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == ["whisper"]
    assert main(["sources", "--family", "whisper"]) == 0
    text = capsys.readouterr().out
    assert "encoder.conv1" in text
    assert "\nvision\n" not in text
    assert main(["sources", "--family", "nope"]) == 2
    assert "`family`: expected one of clip-text" in capsys.readouterr().err
    assert main(["sources", "--heads", "4"]) == 2
    assert "`heads`: expected a checkpoint to read with 4 heads, got none" in capsys.readouterr().err


def test_every_part_of_a_layout_is_said() -> None:
    layout = Layout("post", "swiglu", layer_scale=True, bias_kv=True, input_norm=True)
    assert _layout_text(layout, True, 4) == (
        "post-norm, SwiGLU, LayerScale, bias of keys and values, input norm, class token, 4 registers"
    )
    assert _layout_text(Layout(), False, 1) == "pre-norm, GELU, no class token, 1 register"


def test_a_checkpoint(gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sources", str(gpt2)]) == 0
    text = capsys.readouterr().out
    source = Source.from_checkpoint(gpt2)
    for part in (
        str(gpt2 / "model.safetensors"),
        "gpt2 (GPT-2, DistilGPT-2), language",
        "2: pre-norm, GELU by tanh, no class token",
        "16: 4 heads of 4, MLPs of 64",
        "9 learned",
        "1 tensor: wte.weight",
        source.fingerprint[:12],
    ):
        assert part in text
    assert "also fits" not in text

    assert main(["sources", str(gpt2 / "model.safetensors"), "--json", "--heads", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["family"], report["heads"], report["depth"]) == ("gpt2", 2, 2)
    assert report["positions"] == [9]
    assert report["unused"] == ["wte.weight"]
    assert report["also"] == []
    assert report["fingerprint"] == source.fingerprint
    assert report["parameters"] == sum(t.numel() for t in source.state_dict().values())


def test_links_into_a_cache_keep_their_configuration(gpt2: Path) -> None:
    blob, snapshot = gpt2 / "blobs" / "0123", gpt2 / "snapshot"
    blob.parent.mkdir()
    snapshot.mkdir()
    (gpt2 / "model.safetensors").rename(blob)
    (gpt2 / "config.json").rename(snapshot / "config.json")
    (snapshot / "model.safetensors").symlink_to(blob)
    for path in (snapshot, snapshot / "model.safetensors"):
        source = Source.from_checkpoint(path)
        assert source.heads == Source.from_origin(source.describe()).heads == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "`path`: no file or folder nowhere"),
        (["{folder}", "--family", "bert"], "expected a bert encoder"),
        (["{folder}", "--family", "gpt"], "`family`: expected one of clip-text"),
        (["{folder}", "--heads", "3"], "`heads`: expected a divisor of the width 16, got 3"),
        (["{folder}/config.json"], "config.json"),
    ],
)
def test_mistakes_are_one_line(
    gpt2: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["sources", *(argument.format(folder=gpt2) for argument in arguments)]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


def test_an_unknown_checkpoint_is_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"stem.weight": torch.ones(1)}, tmp_path / "other.pt")
    assert main(["sources", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "holds no known family (clip-text" in err
    assert "1 tensor, such as stem.weight" in err


def test_towers_of_one_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": C, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0}
    vision = small | {"image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    assert main(["sources", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "clip-text (CLIP text towers), language" in out
    assert "clip-vision (choose with --family)" in out
    assert main(["sources", str(tmp_path), "--family", "clip-vision"]) == 0
    assert "clip-vision (CLIP image towers), vision" in capsys.readouterr().out
