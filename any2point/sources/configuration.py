"""What stands beside a checkpoint: `config.json` of Hugging Face or timm, `open_clip_config.json`.

Only a few fields matter here. Their types are checked when the file is read, so that families need not;
fields that are null are left out. What open_clip says is put into the terms of Hugging Face.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# What a field has to be, for those that are read here or by a family.
_KINDS: list[tuple[str, type | tuple[type, ...], str]] = [
    ("a text", str, "model_type hidden_act activation activation_function"),
    ("a number", (int, float), "layer_norm_eps layer_norm_epsilon eps"),
    ("a number or a list", (int, list), "image_size patch_size"),
    ("a whole number", int, "num_attention_heads encoder_attention_heads n_heads n_head heads head_width"),
    ("a whole number", int, "width pad_token_id max_source_positions num_mel_bins"),
    ("a whole number", int, "frequency_stride time_stride max_length"),
    ("an object", dict, "text_config vision_config pretrained_cfg model_args"),
    ("an object", dict, "model_cfg text_cfg vision_cfg act_kwargs norm_kwargs"),
]
_FIELDS = {name: (text, kind) for text, kind, names in _KINDS for name in names.split()}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a clear ValueError."""
    if not path.is_file():
        raise ValueError(f"`path`: no file {path}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"`path`: cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"`path`: expected a JSON object in {path}, got {type(value).__name__}")
    return value


def read_config(file: Path) -> dict[str, Any]:
    """The configuration beside a checkpoint file, or {}."""
    names = ["config.json", "open_clip_config.json"]
    if file.name.startswith("open_clip"):
        names.reverse()
    for name in names:
        path = file.parent / name
        if path.is_file():
            config = _checked(read_json(path), path)
            return _from_open_clip(config["model_cfg"]) if "model_cfg" in config else config
    return {}


def _checked(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    checked = {}
    for name, value in config.items():
        if value is None:
            continue
        if name in _FIELDS:
            text, kind = _FIELDS[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(f"`path`: expected {text} as {name} in {path}, got {value!r}")
        checked[name] = _checked(value, path) if isinstance(value, dict) else value
    return checked


def _from_open_clip(model: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that matter, as a CLIP model of Hugging Face would have them."""
    text, vision = model.get("text_cfg", {}), model.get("vision_cfg", {})
    config: dict[str, Any] = {}
    for section, tower in (("text_config", text), ("vision_config", vision)):
        tanh = tower.get("act_kwargs", {}).get("approximate") == "tanh"
        config[section] = {
            "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu_new" if tanh else "gelu",
            "layer_norm_eps": tower.get("norm_kwargs", {}).get("eps", 1e-5),
        }
        config[section] |= {name: tower[name] for name in ("image_size", "patch_size") if name in tower}
    if "heads" in text:
        config["text_config"]["num_attention_heads"] = text["heads"]
    if "width" in vision:
        heads = vision["width"] // max(1, vision.get("head_width", 64))
        config["vision_config"]["num_attention_heads"] = max(1, heads)
    return config
