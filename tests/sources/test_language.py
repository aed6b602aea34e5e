"""Language families against their own implementation in transformers: the output of every block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from any2point.sources import Source

pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

C, DEPTH, LENGTH = 32, 3, 7
WORDS = 120
_BERT = {
    "vocab_size": WORDS,
    "hidden_size": C,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
}
_CLIP = _BERT | {"bos_token_id": 1, "eos_token_id": 3, "pad_token_id": 0, "max_position_embeddings": 9}
_GPT2 = {"vocab_size": WORDS, "n_embd": C, "n_layer": DEPTH, "n_head": 4, "n_positions": 20}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 3}
_DISTIL = {"vocab_size": WORDS, "dim": C, "n_layers": DEPTH, "n_heads": 4, "hidden_dim": 48}


def build(model: str, config: str, **options: Any) -> nn.Module:
    """A model in which every weight, bias and gain is random."""
    torch.manual_seed(1)
    built = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            gain = ("norm" in name.lower() or "ln_" in name) and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, 0.2)
    return built


def save(model: nn.Module, folder: Path, kind: str) -> Path:
    """The model in a folder as the hub has it, as one file of either kind or in parts."""
    folder.mkdir(exist_ok=True)
    if kind == "bin":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    else:
        model.save_pretrained(folder, max_shard_size="20KB" if kind == "parts" else "1GB")
        assert (folder / "model.safetensors.index.json").is_file() == (kind == "parts")
    return folder


def record(blocks: nn.ModuleList, run: Callable[[], Any]) -> list[Tensor]:
    """What enters the first block and what leaves every block while `run` runs."""
    states: list[Tensor] = []

    def first(tensor: Any) -> Tensor:
        return tensor[0] if isinstance(tensor, tuple) else tensor

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        states.append(first(output))

    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    assert len(states) == DEPTH + 1
    return states


def compare(source: Source, x: Tensor, want: list[Tensor], causal: bool = False) -> None:
    with torch.no_grad():
        states = source.encoder().hidden_states(x, causal=causal)
    assert len(states) == len(want)
    for ours, theirs in zip(states, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (want[-1] - want[-2]).abs().max() > 0.1


KINDS = ["safetensors", "bin", "parts"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["BertModel", "BertForMaskedLM"])
def test_bert(tmp_path: Path, model: str, kind: str) -> None:
    theirs = build(model, "BertConfig", **_BERT, hidden_act="gelu_new")
    source = Source.from_checkpoint(save(theirs, tmp_path / "m", kind))
    assert (source.name, source.depth, source.heads, source.layout.activation) == (
        "bert",
        DEPTH,
        4,
        "gelu_tanh",
    )
    assert source.position_table.shape == (20, C)
    base = getattr(theirs, "bert", theirs)
    words = torch.randn(2, LENGTH, C)
    want = record(base.encoder.layer, lambda: base(inputs_embeds=words))
    compare(source, words + source.position_table[:LENGTH], want)
    assert torch.equal(source.cls_token, base.embeddings.word_embeddings.weight[101])
    assert torch.equal(source.cls_position, source.position_table[0])
    assert not any("encoder.layer" in name for name in source.unused)


def test_bert_with_the_names_of_tensorflow(tmp_path: Path) -> None:
    theirs = build("BertForPreTraining", "BertConfig", **_BERT)
    new = Source.from_checkpoint(save(theirs, tmp_path / "new", "bin"))
    old = {}
    for name, value in theirs.state_dict().items():
        for leaf, legacy in (("weight", "gamma"), ("bias", "beta")):
            name = name.replace(f"LayerNorm.{leaf}", f"LayerNorm.{legacy}")
        old[name] = value
    assert "bert.encoder.layer.0.output.LayerNorm.gamma" in old
    torch.save(old, tmp_path / "new" / "pytorch_model.bin")
    assert Source.from_checkpoint(tmp_path / "new").fingerprint == new.fingerprint


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("model", "config", "types"),
    [
        ("RobertaModel", "RobertaConfig", 1),
        ("RobertaForMaskedLM", "RobertaConfig", 1),
        ("XLMRobertaModel", "XLMRobertaConfig", 1),
        ("RobertaModel", "RobertaConfig", 2),
    ],
)
def test_roberta(tmp_path: Path, model: str, config: str, types: int, kind: str) -> None:
    theirs = build(model, config, **_BERT, type_vocab_size=types, layer_norm_eps=1e-5, pad_token_id=1)
    source = Source.from_checkpoint(save(theirs, tmp_path / "m", kind))
    assert (source.name, source.depth, source.heads) == ("roberta", DEPTH, 4)
    assert source.position_table.shape == (18, C)
    base = getattr(theirs, "roberta", theirs)
    words = torch.randn(2, LENGTH, C)
    want = record(base.encoder.layer, lambda: base(inputs_embeds=words))
    compare(source, words + source.position_table[:LENGTH], want)
    assert torch.equal(source.cls_token, base.embeddings.word_embeddings.weight[0])


def test_roberta_is_told_from_bert_without_a_config(tmp_path: Path) -> None:
    theirs = build("RobertaForMaskedLM", "RobertaConfig", **_BERT, type_vocab_size=2, pad_token_id=1)
    torch.save(theirs.state_dict(), tmp_path / "named.bin")  # roberta. in front
    assert Source.from_checkpoint(tmp_path / "named.bin", heads=4).name == "roberta"
    plain = build("RobertaModel", "RobertaConfig", **_BERT, type_vocab_size=1, pad_token_id=1)
    torch.save(plain.state_dict(), tmp_path / "plain.bin")  # one token type
    assert Source.from_checkpoint(tmp_path / "plain.bin", heads=4).name == "roberta"
    tower = {f"text.transformer.{name}": value for name, value in plain.state_dict().items()}
    torch.save(tower, tmp_path / "open_clip_pytorch_model.bin")  # as text tower of another model
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"text_cfg": {}}}')
    assert Source.from_checkpoint(tmp_path / "open_clip_pytorch_model.bin", heads=4).name == "roberta"
    with pytest.raises(ValueError, match="`heads`: expected a number in heads= or as num_attention_heads"):
        Source.from_checkpoint(tmp_path / "plain.bin")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["DistilBertModel", "DistilBertForMaskedLM"])
def test_distilbert(tmp_path: Path, model: str, kind: str) -> None:
    theirs = build(model, "DistilBertConfig", **_DISTIL, max_position_embeddings=20, activation="relu")
    source = Source.from_checkpoint(save(theirs, tmp_path / "m", kind))
    assert (source.name, source.depth, source.heads, source.layout.activation) == (
        "distilbert",
        DEPTH,
        4,
        "relu",
    )
    base = getattr(theirs, "distilbert", theirs)
    words = torch.randn(2, LENGTH, C)
    want = record(base.transformer.layer, lambda: base(inputs_embeds=words))
    compare(source, words + source.position_table[:LENGTH], want)
    assert torch.equal(source.cls_token, base.embeddings.word_embeddings.weight[101])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["GPT2Model", "GPT2LMHeadModel"])
def test_gpt2(tmp_path: Path, model: str, kind: str) -> None:
    theirs = build(model, "GPT2Config", **_GPT2, n_inner=48, attn_implementation="eager")
    source = Source.from_checkpoint(save(theirs, tmp_path / "m", kind))
    assert (source.name, source.depth, source.heads, source.has_cls) == ("gpt2", DEPTH, 4, False)
    assert source.position_table.shape == (20, C)
    base = getattr(theirs, "transformer", theirs)
    words = torch.randn(2, LENGTH, C)
    x = words + source.position_table[:LENGTH]
    compare(source, x, record(base.h, lambda: base(inputs_embeds=words)), causal=True)
    open_mask = torch.zeros(2, 1, LENGTH, LENGTH)
    want = record(base.h, lambda: base(inputs_embeds=words, attention_mask=open_mask))
    compare(source, x, want)
    assert torch.equal(source.tensors["norm.weight"], base.ln_f.weight)
    assert torch.equal(source.tensors["norm.bias"], base.ln_f.bias)


def test_gpt2_of_other_kinds(tmp_path: Path) -> None:
    theirs = build("GPT2Model", "GPT2Config", **_GPT2)
    state = theirs.state_dict()
    for i in range(DEPTH):  # as old checkpoints have them
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20), f"h.{i}.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state, tmp_path / "gpt2.bin")
    source = Source.from_checkpoint(tmp_path / "gpt2.bin", heads=4)
    assert "h.0.attn.bias" in source.unused
    assert (
        source.fingerprint == Source.from_checkpoint(save(theirs, tmp_path / "m", "safetensors")).fingerprint
    )

    state["h.1.crossattention.c_attn.weight"] = torch.ones(C, C)
    torch.save(state, tmp_path / "gpt2.bin")
    with pytest.raises(ValueError, match=r"no tensor such as 'h\.1\.crossattention\.c_attn\.weight'"):
        Source.from_checkpoint(tmp_path / "gpt2.bin", heads=4)
    assert Source.from_checkpoint(tmp_path / "gpt2.bin", heads=4, depth=1).depth == 1

    (tmp_path / "config.json").write_text(json.dumps({"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(ValueError, match="expected attention scaled as in GPT-2"):
        Source.from_checkpoint(tmp_path / "gpt2.bin", "gpt2")


def clip_text(model: nn.Module) -> nn.Module:
    """The text tower, as the versions of transformers have it."""
    return getattr(model, "text_model", model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("model", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"])
def test_clip_of_hugging_face(tmp_path: Path, model: str, activation: str, kind: str) -> None:
    text = _CLIP | {"hidden_act": activation}
    if model == "CLIPModel":
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        theirs = build(model, "CLIPConfig", text_config=text, vision_config=small)
    else:
        theirs = build(model, "CLIPTextConfig", **text)
    source = Source.from_checkpoint(save(theirs, tmp_path / "m", kind))
    assert (source.name, source.depth, source.heads, source.has_cls) == ("clip-text", DEPTH, 4, False)
    assert source.layout.activation == activation
    assert source.position_table.shape == (9, C)
    tower = clip_text(theirs)
    ids = torch.randint(0, WORDS, (2, LENGTH))
    x = tower.embeddings.token_embedding(ids).detach() + source.position_table[:LENGTH]
    compare(source, x, record(tower.encoder.layers, lambda: tower(input_ids=ids)), causal=True)
    want = record(tower.encoder.layers, lambda: tower.encoder(inputs_embeds=x))
    compare(source, x, want)
    assert torch.equal(source.tensors["norm.weight"], tower.final_layer_norm.weight)


def open_clip_state(prefix: str = "") -> tuple[dict[str, Tensor], nn.Module]:
    """OpenAI's and open_clip's names for the weights of a model of Hugging Face, and that model."""
    theirs = build("CLIPTextModel", "CLIPTextConfig", **(_CLIP | {"hidden_act": "gelu"}))
    old = {name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()}
    state = {
        "positional_embedding": old["embeddings.position_embedding.weight"],
        "token_embedding.weight": old["embeddings.token_embedding.weight"],
        "text_projection": torch.randn(C, C),
    }
    for leaf in ("weight", "bias"):
        state[f"ln_final.{leaf}"] = old[f"final_layer_norm.{leaf}"]
        for i in range(DEPTH):
            a, b = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            parts = [old[f"{a}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            state[f"{b}.attn.in_proj_{leaf}"] = torch.cat(parts)
            state[f"{b}.attn.out_proj.{leaf}"] = old[f"{a}.self_attn.out_proj.{leaf}"]
            for number in "12":
                state[f"{b}.ln_{number}.{leaf}"] = old[f"{a}.layer_norm{number}.{leaf}"]
            state[f"{b}.mlp.c_fc.{leaf}"] = old[f"{a}.mlp.fc1.{leaf}"]
            state[f"{b}.mlp.c_proj.{leaf}"] = old[f"{a}.mlp.fc2.{leaf}"]
    return {prefix + name: value for name, value in state.items()}, theirs


@pytest.mark.parametrize("prefix", ["", "text."])
def test_open_clip(tmp_path: Path, prefix: str) -> None:
    state, theirs = open_clip_state(prefix)
    state |= {
        "visual.transformer.resblocks.0.attn.in_proj_weight": torch.ones(3, 3),
        "logit_scale": torch.ones([]),
    }
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    text = {"context_length": 9, "vocab_size": WORDS, "width": C, "heads": 4, "layers": DEPTH}
    config = {"model_cfg": {"embed_dim": C, "text_cfg": text}, "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    source = Source.from_checkpoint(tmp_path)
    assert (source.name, source.heads, source.layout.activation) == ("clip-text", 4, "gelu")
    tower = clip_text(theirs)
    x = torch.randn(2, LENGTH, C)
    want = record(tower.encoder.layers, lambda: tower.encoder(inputs_embeds=x))
    compare(source, x, want)

    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    assert Source.from_checkpoint(tmp_path).layout.activation == "quick_gelu"
    (tmp_path / "open_clip_config.json").unlink()
    assert Source.from_checkpoint(tmp_path, heads=4).layout.activation == "quick_gelu"  # OpenAI's own

    state[f"{prefix}transformer.resblocks.0.ls_1.gamma"] = torch.ones(C)
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no tensor such as 'transformer\.resblocks\.0\.ls_1\.gamma'"):
        Source.from_checkpoint(tmp_path)


@pytest.mark.parametrize("width", [512, 640, 768, 1024, 1280])
def test_heads_of_every_clip_width(width: int) -> None:
    assert Source.random("clip-text", width=width, depth=1, positions=(3,)).heads == width // 64
