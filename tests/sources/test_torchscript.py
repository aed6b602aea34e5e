"""TorchScript archives: read as data, equal to the state dict, and nothing in them is ever run."""

from __future__ import annotations

import collections
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from any2point.sources import Source
from any2point.sources.checkpoint import read_checkpoint
from any2point.sources.torchscript import read_torchscript

C, DEPTH = 64, 2
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """As in OpenAI's CLIP, with a mask that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(C, 1)
        self.ln_1 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(
            collections.OrderedDict(c_fc=nn.Linear(C, 4 * C), gelu=QuickGELU(), c_proj=nn.Linear(4 * C, C))
        )
        self.ln_2 = nn.LayerNorm(C)
        self.attn_mask = torch.zeros(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=self.attn_mask.to(x.dtype))[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = C
        self.resblocks = nn.Sequential(*[ResidualAttentionBlock() for _ in range(DEPTH)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class CLIP(nn.Module):
    """The text tower, and a bit of the image tower."""

    def __init__(self) -> None:
        super().__init__()
        self.context_length = 7
        self.sizes = [1, 2]
        self.visual = nn.Linear(2, 2)
        self.transformer = Transformer()
        self.token_embedding = nn.Embedding(9, C)
        self.positional_embedding = nn.Parameter(torch.randn(7, C))
        self.ln_final = nn.LayerNorm(C)
        self.text_projection = nn.Parameter(torch.randn(C, C))
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.nothing = nn.Parameter(torch.empty(0))
        self.register_buffer("steps", torch.arange(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln_final(self.transformer(x)) @ self.text_projection


def archive(path: Path, *, half: bool = True, trace: bool = False) -> CLIP:
    torch.manual_seed(0)
    model = CLIP().eval()
    model = model.half() if half else model
    x = torch.randn(5, 2, C, dtype=torch.float16 if half else torch.float32)
    torch.jit.save(torch.jit.trace(model, x) if trace else torch.jit.script(model), str(path))
    return model


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_archives_equal_the_state_dict(tmp_path: Path, half: bool, trace: bool) -> None:
    model = archive(tmp_path / "clip.pt", half=half, trace=trace)
    got = read_torchscript(tmp_path / "clip.pt")
    for name, value in model.state_dict().items():
        if name in got or not trace:  # tracing leaves out what is not used
            assert got[name].dtype == value.dtype
            assert torch.equal(got[name], value)
    masks = set() if trace else {f"transformer.resblocks.{i}.attn_mask" for i in range(DEPTH)}
    assert set(got) - set(model.state_dict()) == masks

    source = Source.from_checkpoint(tmp_path / "clip.pt")
    assert (source.name, source.width, source.depth, source.heads) == ("clip-text", C, DEPTH, 1)
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert source.fingerprint == Source.from_checkpoint(tmp_path / "plain.pt").fingerprint
    x = torch.randn(2, 5, C)
    with torch.no_grad():
        want = model.float().transformer(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(source.encoder()(x), want, rtol=1e-4, atol=1e-4)


def test_archives_are_never_loaded_as_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive(tmp_path / "clip.pt")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this could run code")

    monkeypatch.setattr(torch.jit, "load", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert "positional_embedding" in read_torchscript(tmp_path / "clip.pt")


def test_shared_and_sliced_storages(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = self.first
            self.register_buffer("turned", self.first.weight.detach().T)
            self.register_buffer("column", self.first.weight.detach()[:, 1])

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + self.turned + self.column

    model = Tied()
    torch.jit.save(torch.jit.script(model), str(tmp_path / "tied.pt"))
    got = read_torchscript(tmp_path / "tied.pt")
    assert set(got) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(got[name], value)


def write(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, **options: Any) -> Path:
    """An archive around any `data.pkl`."""
    with zipfile.ZipFile(path, "w", **options) as stream:
        stream.writestr("m/data.pkl", pickled)
        stream.writestr("m/constants.pkl", b"\x80\x02).")
        for name, data in (records or {}).items():
            stream.writestr(f"m/{name}", data)
    return path


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['EVIL_FILE']}",)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tensor(
    *,
    kind: str = "storage",
    storage: str = "torch\nFloatStorage",
    key: str = "0",
    numel: int = 4,
    offset: int = 0,
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    function: str = "torch._utils\n_rebuild_tensor_v2",
) -> bytes:
    """A module with the tensor `w`, as TorchScript pickles it."""

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    where = b"(" + text(kind) + f"c{storage}\n".encode() + text(key) + text("cpu") + number(numel) + b"tQ"
    shapes = [b"(" + b"".join(map(number, part)) + b"t" for part in (size, stride)]
    built = f"c{function}\n(".encode() + where + number(offset) + b"".join(shapes) + b"\x89"
    built += b"ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02c__torch__\nM\n)\x81}(" + text("w") + built + b"ub."


DATA = {"data/0": torch.arange(4.0).numpy().tobytes()}


def test_the_hand_made_archive_is_readable(tmp_path: Path) -> None:
    got = read_torchscript(write(tmp_path / "m.pt", tensor(offset=1, size=(3,)), DATA))
    assert got["w"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_calls_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int
) -> None:
    monkeypatch.setenv("EVIL_FILE", str(tmp_path / "evil"))
    write(tmp_path / "evil.pt", pickle.dumps({"w": Evil()}, protocol=protocol))
    with pytest.raises(ValueError, match=r"evil\.pt as a TorchScript archive \(refused: its pickle"):
        read_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor(function="os\nsystem"), r"refused: its pickle calls os\.system, which could run code"),
        (tensor(function="torch\nload"), r"refused: its pickle calls torch\.load"),
        (b"\x80\x02cos\nsystem\n)R.", "refused: its pickle calls os.system"),
        (b"\x80\x02csubprocess\nPopen\n)\x81.", r"refused: its pickle makes a subprocess\.Popen"),
        (b"\x80\x02c__torch__\nM\n(K\x01t\x81.", "refused: its pickle makes a"),
        (b"\x80\x02c__torch__x\nM\n)\x81.", "refused: its pickle makes a"),
        (tensor(storage="os\nFloatStorage"), r"refused: its pickle refers to a storage of os\.FloatStorage"),
        (tensor(storage="torch\nComplexFloatStorage"), "refused: its pickle refers to a storage of"),
        (tensor(kind="module"), "refused: its pickle refers to a module"),
        (tensor(numel=400), r"expected 400 x torch\.float32 in data/0, got 16 bytes"),
        (tensor(storage="torch\nHalfStorage"), r"expected 4 x torch\.float16 in data/0, got 16 bytes"),
        (tensor(key="1"), "There is no item named 'm/data/1'"),
        (tensor(key="../../etc/passwd"), "There is no item named"),
        (tensor(size=(5,)), r"a tensor of size \(5,\) exceeds its 4 stored values"),
        (tensor(offset=2), "exceeds its 4 stored values"),
        (tensor(size=(1 << 30,), stride=(0,)), "exceeds its 4 stored values"),
        (tensor(stride=(-1,)), "has the strides"),
        (tensor(offset=-1), "has the strides"),
        (tensor(size=(2, 2)), "has the strides"),
        (tensor()[:-1], "pickle exhausted before seeing STOP"),
        (tensor()[:40], "TorchScript archive"),
        (b"", "TorchScript archive"),
        (b"\x80\x02.", "TorchScript archive"),
        (b"\x80\x02h\x05.", "TorchScript archive"),
        (b"\x80\x02K\x01}b.", "expected a Module in its pickle, got int"),
        (b"\x80\x02K\x01)R.", "expected a Name in its pickle, got int"),
        (b"\x80\x02K\x01K\x02a.", "expected a list in its pickle, got int"),
        # a module that contains itself
        (b"\x80\x02c__torch__\nM\n)\x81q\x00}(" + text("m") + b"h\x00ub.", "contain one another"),
        (b"\x80\x02c__torch__\nM\n)\x81}(" + text("w") + b"K\x01ub.", "no tensors in"),
    ],
)
def test_contradictory_and_hostile_pickles(tmp_path: Path, pickled: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_checkpoint(write(tmp_path / "bad.pt", pickled, DATA))
    assert "bad.pt" in str(error.value)
    assert "\n" not in str(error.value)


def test_modules_shared_at_every_level_do_not_multiply(tmp_path: Path) -> None:
    module = b"c__torch__\nM\n)\x81q\x00}b"
    for level in range(40):  # 2^40 paths
        part = bytes([104, level])
        module += b"c__torch__\nM\n)\x81q" + bytes([level + 1])
        module += b"}(" + text("a") + part + text("b") + part + b"ub"
    pickled = b"\x80\x02" + module + b"h" + bytes([40]) + b"."
    with pytest.raises(ValueError, match="contain one another"):
        read_torchscript(write(tmp_path / "laughs.pt", pickled))


def test_records_must_be_stored_and_fit_the_file(tmp_path: Path) -> None:
    zeros = {"data/0": bytes(4_000_000)}
    bomb = tensor(numel=1_000_000, size=(1_000_000,))
    write(tmp_path / "bomb.pt", bomb, zeros, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="to be stored as it is, got a compressed record"):
        read_torchscript(tmp_path / "bomb.pt")

    # The directory at the end claims a terabyte for data/0.
    file = write(tmp_path / "large.pt", tensor(), DATA)
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = (1 << 31).to_bytes(4, "little") * 2
    file.write_bytes(data)
    with pytest.raises(ValueError, match="data/0 claims more bytes than the file has"):
        read_torchscript(file)


def test_truncated_and_damaged_archives(tmp_path: Path) -> None:
    archive(tmp_path / "clip.pt")
    whole = (tmp_path / "clip.pt").read_bytes()
    for part in (0.01, 0.5, 0.9, 0.999):
        (tmp_path / "short.pt").write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(ValueError, match=r"`path`: cannot read .*short\.pt") as error:
            Source.from_checkpoint(tmp_path / "short.pt")
        assert "\n" not in str(error.value)

    place = whole.index(read_torchscript(tmp_path / "clip.pt")["positional_embedding"].numpy().tobytes())
    damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    (tmp_path / "damaged.pt").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged\.pt as a TorchScript archive \(Bad CRC-32"):
        Source.from_checkpoint(tmp_path / "damaged.pt")


def test_random_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    archive(tmp_path / "clip.pt")
    with zipfile.ZipFile(tmp_path / "clip.pt") as stream:
        records = {name.split("/", 1)[1]: stream.read(name) for name in stream.namelist() if "/data/" in name}
        pickled = stream.read("clip/data.pkl")
    random = np.random.default_rng(0)
    opcodes = list(b")(]}lsubtRQcqh0.N\x81\x85")
    messages = []
    for _ in range(300):
        damaged = bytearray(pickled)
        for place in random.integers(len(damaged), size=random.integers(1, 4)):
            damaged[place] = random.choice(opcodes) if random.integers(2) else random.integers(256)
        try:
            read_torchscript(write(tmp_path / "m.pt", bytes(damaged), records))
        except ValueError as error:
            messages.append(str(error))
    assert 200 < len(messages) < 300
    assert not any("\n" in message for message in messages)


def test_foreign_byte_order(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the byte order little, got big"):
        read_torchscript(write(tmp_path / "big.pt", tensor(), DATA | {"byteorder": b"big"}))
