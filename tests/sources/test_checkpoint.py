"""Files and folders of checkpoints: parts, legacy files, configurations, and one clear error for the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from test_sources import dino_state
from torch import Tensor

from any2point.sources import FAMILIES, Source
from any2point.sources.checkpoint import Reader, read_activation, read_checkpoint, read_heads

safetensors = pytest.importorskip("safetensors.torch")

STATE = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3), "b.bias": torch.ones(1)}


def write_parts(folder: Path, suffix: str = "safetensors") -> Path:
    """Two files and their index; returns the index."""
    name = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    parts = {key: f"part-{key[0]}.{suffix}" for key in STATE}
    for part in set(parts.values()):
        tensors = {key: STATE[key] for key in STATE if parts[key] == part}
        if suffix == "safetensors":
            safetensors.save_file(tensors, folder / part)
        else:
            torch.save(tensors, folder / part)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_parts(tmp_path: Path, suffix: str) -> None:
    index = write_parts(tmp_path, suffix)
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    for path in (tmp_path, index):
        state, config, file = read_checkpoint(path)
        assert state.keys() == STATE.keys()
        assert all(torch.equal(state[key], STATE[key]) for key in STATE)
        assert config == {"model_type": "x"}
        assert file == index


def test_broken_parts(tmp_path: Path) -> None:
    index = write_parts(tmp_path)
    whole = json.loads(index.read_text())

    def expect(message: str, weight_map: object) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=message) as error:
            read_checkpoint(tmp_path)
        assert "\n" not in str(error.value)

    expect("expected a weight_map of tensors to files", [])
    expect("expected a weight_map of tensors to files", {})
    expect("expected a weight_map of tensors to files", {"a.weight": 1})
    expect(r"lists the file gone\.safetensors, which is not beside it", {"a.weight": "gone.safetensors"})
    expect(
        "lists the file .*, which is not beside it", {"a.weight": f"../{tmp_path.name}/part-a.safetensors"}
    )
    expect("lists the file .*, which is not beside it", {"a.weight": str(tmp_path / "part-a.safetensors")})
    more = whole["weight_map"] | {"c.weight": "part-b.safetensors"}
    expect(r"lists 'c\.weight', which part-b\.safetensors does not hold", more)
    part = tmp_path / "part-b.safetensors"
    part.write_bytes(part.read_bytes()[:-2])
    expect(r"part-b\.safetensors is not a complete safetensors file", whole["weight_map"])
    index.write_text("{")
    with pytest.raises(ValueError, match=r"cannot read .*index\.json"):
        read_checkpoint(tmp_path)


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, tmp_path / "optimizer.pt")
    assert set(read_checkpoint(tmp_path)[0]) == {"old"}
    safetensors.save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path)[0]) == {"new"}
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"expected one checkpoint file in .*, got optimizer\.pt, other\.pt"):
        read_checkpoint(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"expected one checkpoint file in .*, got none"):
        read_checkpoint(tmp_path)


def test_which_configuration(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    torch.save(STATE, tmp_path / "open_clip_pytorch_model.bin")
    assert read_checkpoint(tmp_path)[1]["text_config"]["hidden_act"] == "gelu"
    (tmp_path / "config.json").write_text("{}")
    assert read_checkpoint(tmp_path)[1]["text_config"]["hidden_act"] == "gelu"
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    assert read_checkpoint(tmp_path)[1] == {}


def test_open_clip_in_terms_of_hugging_face(tmp_path: Path) -> None:
    model = {
        "quick_gelu": False,
        "text_cfg": {"heads": 3, "act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}},
        "vision_cfg": {"width": 1280, "head_width": 80, "image_size": 28, "patch_size": 14, "layers": 32},
    }
    torch.save(STATE, tmp_path / "open_clip_pytorch_model.bin")

    def read() -> dict:
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        return read_checkpoint(tmp_path)[1]

    text = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-6, "num_attention_heads": 3}
    vision = {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_attention_heads": 16}
    vision |= {"image_size": 28, "patch_size": 14}
    assert read() == {"text_config": text, "vision_config": vision}
    model["quick_gelu"] = True
    assert read()["text_config"]["hidden_act"] == read()["vision_config"]["hidden_act"] == "quick_gelu"
    model["vision_cfg"] = {"layers": [3, 4, 6, 3], "width": 64}  # a ResNet
    assert read()["text_config"]["num_attention_heads"] == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"layer_norm_eps": "small"}',
            r"expected a number as layer_norm_eps in .*json, got 'small'",
        ),
        ('{"num_attention_heads": true}', "expected a whole number as num_attention_heads in"),
        ('{"text_config": [1]}', "expected an object as text_config in"),
        ('{"text_config": {"layer_norm_eps": []}}', "expected a number as layer_norm_eps in"),
        ('{"hidden_act": ["gelu"]}', "expected a text as hidden_act in"),
        ('{"model_cfg": {"vision_cfg": {"width": "a"}}}', "expected a whole number as width in"),
        ('{"model_cfg": 3}', "expected an object as model_cfg in"),
        ('{"image_size": "224"}', "expected a number or a list as image_size in"),
        ("[1]", "expected a JSON object in"),
        ("{", "cannot read"),
        ('{"a": ' + "[" * 100_000, "cannot read"),
    ],
)
def test_broken_configurations(tmp_path: Path, text: str, message: str) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(tmp_path)
    assert "config.json" in str(error.value)


def test_fields_that_are_null_are_left_out(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m.pt")
    (tmp_path / "config.json").write_text('{"pad_token_id": null, "text_config": {"eps": null, "x": 1}}')
    assert read_checkpoint(tmp_path)[1] == {"text_config": {"x": 1}}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "base_model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_either_format(tmp_path: Path, wrapper: str | None, zipped: bool) -> None:
    state: dict = {f"module.{key}": value for key, value in STATE.items()}
    state = state if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    got, config, _ = read_checkpoint(tmp_path / "m.pth")
    assert got.keys() == STATE.keys()
    assert config == {}


def test_legacy_files_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            import os

            return os.mkdir, (str(tmp_path / "evil"),)

    for zipped in (True, False):
        torch.save({"a": Evil()}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"cannot read .*evil\.pt as a checkpoint"):
            read_checkpoint(tmp_path / "evil.pt")
        assert not (tmp_path / "evil").exists()


def test_unknown_checkpoints_are_described(tmp_path: Path) -> None:
    safetensors.save_file(STATE, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ValueError, match="no known family") as error:
        Source.from_checkpoint(tmp_path)
    text = str(error.value)
    assert "3 tensors of model_type 'mamba', such as a.weight, b.bias, b.weight" in text
    assert all(name in text for name in FAMILIES)
    with pytest.raises(ValueError, match=r"`family`: expected one of clip-text, .*, got 'mamba'"):
        Source.from_checkpoint(tmp_path, "mamba")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_refuses_a_foreign_checkpoint(tmp_path: Path, family: str) -> None:
    safetensors.save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="`path`: ") as error:
        Source.from_checkpoint(tmp_path, family)
    assert "\n" not in str(error.value)


def test_reader() -> None:
    state: dict[str, Tensor] = {
        "net.h.0.a.weight": torch.ones(2, 2).half(),
        "net.h.0.a.bias": torch.ones(2),
        "net.h.0.b.weight": torch.zeros(3, 2),
        "net.h.0.count": torch.tensor(3),
        "net.h.1.extra": torch.ones(1),
        "other": torch.ones(1),
    }
    reader = Reader(state, "net.")
    fused = reader.fused(["h.0.a", "h.0.b"], "qkv", no_bias=("h.0.b",))
    assert fused["qkv.weight"].dtype == torch.float32
    assert fused["qkv.weight"].tolist() == [[1, 1], [1, 1], [0, 0], [0, 0], [0, 0]]
    assert fused["qkv.bias"].tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"tensor 'h\.0\.b\.bias' is missing"):
        reader.fused(["h.0.a", "h.0.b"], "qkv")
    with pytest.raises(
        ValueError, match=r"expected dense floating point in tensor 'h\.0\.count', got torch\.int64"
    ):
        reader.take("h.0.count")
    reader.check_blocks("h.{}.", 1)  # integers are counters, and block 1 is not used
    reader.check_blocks("h.{}.", 2, ignore=("extra",))
    with pytest.raises(ValueError, match=r"blocks of this family have no tensor such as 'h\.1\.extra'"):
        reader.check_blocks("h.{}.", 2)
    assert reader.unused() == ("h.0.count", "h.1.extra")


def test_configurations() -> None:
    assert read_activation({}, "relu") == "relu"
    assert read_activation({"hidden_act": "gelu_pytorch_tanh"}, "relu") == "gelu_tanh"
    with pytest.raises(ValueError, match=r"expected act in config\.json to be one of gelu, .*, got 'swish'"):
        read_activation({"act": "swish"}, "gelu", "act")
    assert read_heads({"num_attention_heads": 3}, None, default=5) == 3
    assert read_heads({"num_attention_heads": 3}, 4, default=5) == 4
    assert read_heads({}, None, default=5) == 5
    for wrong in ("3", 0, True, 2.0):
        with pytest.raises(ValueError, match="`heads`: expected a number in heads= or as n_head in config"):
            read_heads({"n_head": wrong}, None, default=None, name="n_head")


def test_a_model_is_not_loaded_onto_a_source_put_together_otherwise(tmp_path: Path) -> None:
    from any2point.models import Any2Point, Any2PointConfig

    plain = Source.random("clip-text", width=16, depth=1, heads=2, positions=(4,))
    small = {"num_points": 64, "num_tokens": 8, "neighbors": 4, "views": 2, "adapter_dim": 4}
    model = Any2Point(Any2PointConfig(num_classes=2, head_width=8, **small), plain)
    model.save_pretrained(tmp_path)
    assert Any2Point.from_pretrained(tmp_path, plain).source_info.layout == plain.layout
    other = dataclasses.replace(plain, layout=dataclasses.replace(plain.layout, activation="gelu"))
    assert other.fingerprint == plain.fingerprint  # the same tensors
    with pytest.raises(ValueError, match=r"activation='quick_gelu'.* got 2 heads and .*activation='gelu'"):
        Any2Point.from_pretrained(tmp_path, other)
    with pytest.raises(ValueError, match=r"`source`: expected 2 heads and .*, got 4 heads and"):
        Any2Point.from_pretrained(tmp_path, dataclasses.replace(plain, heads=4))


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damaged_files_are_an_error_or_harmless(tmp_path: Path, kind: str) -> None:
    """Cut, overwritten at either end, or with something behind: one line that names the file, no crash."""
    file = tmp_path / ("whole.safetensors" if kind == "safetensors" else "whole.pt")
    if kind == "safetensors":
        safetensors.save_file(dino_state(), file)
    else:
        torch.save(dino_state(), file, _use_new_zipfile_serialization=kind == "zip")
    whole = file.read_bytes()
    draw = random.Random(0)
    damaged = tmp_path / f"damaged{file.suffix}"
    messages = []
    for number in range(100):
        data = bytearray(whole)
        if number % 4 == 0:
            del data[draw.randrange(len(data)) :]
        elif number % 4 == 3:
            data += bytes(draw.randrange(256) for _ in range(20))
        else:
            for _ in range(3):
                place = draw.randrange(4000)
                data[place if number % 4 == 1 else -1 - place] = draw.randrange(256)
        damaged.write_bytes(data)
        try:
            Source.from_checkpoint(damaged, heads=4)
        except ValueError as error:
            messages.append(str(error))
    assert 25 < len(messages) < 100
    assert not any("\n" in message or not message.startswith("`") for message in messages)


def test_zip_of_a_version_to_come(tmp_path: Path) -> None:
    file = tmp_path / "future.pt"
    torch.save(dino_state(), file)
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") + 6] = 207  # the version that is needed to read it
    file.write_bytes(data)
    with contextlib.suppress(ValueError):  # torch may read it all the same
        assert Source.from_checkpoint(file, heads=4).name == "dinov2"
