"""A source: a pretrained transformer as data (tensors and a layout), whatever its modality."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from any2point.sources.checkpoint import read_checkpoint
from any2point.sources.checks import check_count, check_positions, check_sizes, check_source, convert
from any2point.sources.encoder import FrozenEncoder, Layout

_OPTIONAL = ("cls_token", "cls_position", "registers")


@dataclass(frozen=True)
class Source:
    """The frozen transformer that is fine-tuned for point clouds, in one canonical form.

    Attributes:
        name: family, one of `FAMILIES`.
        modality: "language", "vision" or "audio".
        width: channels C.
        depth: number of blocks.
        heads: attention heads.
        layout: how a block is put together.
        tensors: weights under canonical names: `blocks.<i>.{norm1,attn.qkv,attn.proj,norm2,mlp.fc1,mlp.fc2}`,
            `blocks.<i>.{ls1,ls2}`, `blocks.<i>.attn.{bias_k,bias_v}`, `input_norm` and, where the source
            has one, the final `norm`.
        position_table: `[L, C]` for sequences, `[H, W, C]` for images, without the class token's row.
        cls_token: `[C]` value that the class token starts from, or None for a random start.
        cls_position: `[C]` position encoding of the class token, or None for a random start.
        registers: `[R, C]` further frozen tokens between the class token and the others, with their positions
            added where they have any (DINOv2's registers, DeiT's and AST's distillation token), or None.
        position_kind: "learned", "sinusoidal" or "stand-in" (the family has no absolute positions, and its
            file says what the table holds instead).
        origin: how to get these weights again: `{"path": ...}` or `{"seed": ...}`, with the family.
        unused: tensors of the checkpoint that play no part.
    """

    name: str
    modality: str
    width: int
    depth: int
    heads: int
    layout: Layout
    tensors: Mapping[str, Tensor] = field(repr=False)
    position_table: Tensor = field(repr=False)
    cls_token: Tensor | None = field(default=None, repr=False)
    cls_position: Tensor | None = field(default=None, repr=False)
    registers: Tensor | None = field(default=None, repr=False)
    position_kind: str = "learned"
    origin: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check_sizes(self.width, self.depth, self.heads)
        last = self.tensors.get("blocks.0.mlp.fc2.weight")
        if last is None or last.dim() != 2:
            got = "none" if last is None else f"shape {list(last.shape)}"
            raise ValueError(f"`tensors`: expected a matrix 'blocks.0.mlp.fc2.weight', got {got}")
        check_source(self, {name: value.shape for name, value in self._skeleton().state_dict().items()})

    @property
    def has_cls(self) -> bool:
        """Whether the source has a class token of its own."""
        return self.cls_token is not None

    @property
    def mlp_width(self) -> int:
        """Hidden width of the MLPs."""
        return self.tensors["blocks.0.mlp.fc2.weight"].shape[1]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all tensors: two sources with the same fingerprint are the same network."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self._all_tensors().items()):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def encoder(self, dtype: torch.dtype | None = None) -> FrozenEncoder:
        """The transformer as a module.

        Args:
            dtype: type in which the layers of attention and MLP are stored and computed: bfloat16 takes
                half the memory. Norms stay in float32, and results have the type of the input, with and
                without autocast. With None, parameters are those of `tensors` and share their memory.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"`dtype`: expected a floating point type, got {dtype}")
        encoder = self._skeleton()
        tensors = {}
        for name in encoder.state_dict():
            matrix = dtype is not None and (".attn." in name or ".mlp." in name)
            tensors[name] = self.tensors[name].to(dtype) if matrix else self.tensors[name]
        encoder.load_state_dict(tensors, strict=True, assign=True)
        return encoder.requires_grad_(False)

    def _skeleton(self) -> FrozenEncoder:
        with torch.device("meta"):
            return FrozenEncoder(self.width, self.depth, self.heads, self.mlp_width, self.layout)

    def _all_tensors(self) -> dict[str, Tensor]:
        tensors = dict(self.tensors) | {"position_table": self.position_table}
        for name in _OPTIONAL:
            value = getattr(self, name)
            if value is not None:
                tensors[name] = value
        return tensors

    def describe(self) -> dict[str, Any]:
        """What is written to a `config.json`: enough to rebuild the source, given its tensors."""
        shape = list(self.position_table.shape[:-1])
        return {
            "family": self.name,
            "modality": self.modality,
            "width": self.width,
            "depth": self.depth,
            "heads": self.heads,
            "positions": shape,
            "position_kind": self.position_kind,
            "layout": asdict(self.layout),
            "origin": dict(self.origin),
            "fingerprint": self.fingerprint,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor of the source under its canonical name, for saving."""
        return {name: tensor.contiguous() for name, tensor in self._all_tensors().items()}

    @classmethod
    def from_state_dict(cls, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Source:
        """Inverse of `describe()` and `state_dict()`."""
        tensors = dict(state)
        extra = {name: tensors.pop(name, None) for name in ("position_table", *_OPTIONAL)}
        if extra["position_table"] is None:
            raise ValueError("`state`: expected a tensor 'position_table', got none")
        return cls(
            name=description["family"],
            modality=description["modality"],
            width=description["width"],
            depth=description["depth"],
            heads=description["heads"],
            layout=Layout(**description["layout"]),
            tensors=tensors,
            position_kind=description.get("position_kind", "learned"),
            origin=dict(description.get("origin", {})),
            **extra,  # type: ignore[arg-type]
        )

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        family: str | None = None,
        *,
        depth: int | None = None,
        heads: int | None = None,
    ) -> Source:
        """Read a pretrained transformer from a local file or folder.

        Args:
            path: `.safetensors`, a torch file with a plain state dict, a TorchScript archive, or a folder
                with one (and, as the hub has it, a `config.json`).
            family: one of `FAMILIES`; if None, recognised by the names of the tensors, with the help of
                `config.json` where relatives share them. Of a checkpoint with several towers (CLIP) the first
                family of `FAMILIES` is taken.
            depth: use the first blocks only.
            heads: attention heads, where neither `config.json` nor the family's convention tells.

        Raises:
            ValueError: the file is missing, truncated or of no known family.

        Example:
            >>> source = Source.from_checkpoint("all-MiniLM-L6-v2")
            >>> source.name, source.width, source.depth
            ('bert', 384, 6)
        """
        state, config, file = read_checkpoint(path)
        entry = get_family(matching_families(state, config, file)[0] if family is None else family)
        # Links are kept: a hub's cache links to files that have no config.json beside them.
        origin = {"path": str(Path(path).expanduser().absolute())}
        if depth is not None:
            origin["depth"] = depth  # type: ignore[assignment]
        if heads is not None:
            origin["heads"] = heads  # type: ignore[assignment]
        return convert(entry, state, config, depth=depth, heads=heads, origin=origin)

    @classmethod
    def random(
        cls,
        family: str,
        *,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        positions: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> Source:
        """The architecture of a family with random weights, as it would be before pretraining.

        Args:
            family: one of `FAMILIES`.
            width: channels; the family's base model by default, as for the arguments that follow.
            depth: blocks.
            heads: attention heads; by default of 64 channels each.
            positions: shape of the position table, `(L,)` or `(H, W)`.
            seed: of the weights; the same seed gives the same source.
        """
        entry = get_family(family)
        width = entry.width if width is None else width
        depth = entry.depth if depth is None else depth
        check_count("width", width)
        heads = max(1, width // 64) if heads is None else heads
        check_sizes(width, depth, heads)
        positions = entry.positions if positions is None else positions
        check_positions(positions, entry.positions)
        if isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"`seed`: expected an integer of 64 bits, got {seed!r}")
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return 0.02 * torch.randn(*shape, generator=generator)

        with torch.device("meta"):
            shapes = FrozenEncoder(width, depth, heads, 4 * width, entry.layout).state_dict()
        tensors = {}
        for name, value in shapes.items():
            if value.dim() == 2 or name.endswith(("bias_k", "bias_v")):
                tensors[name] = normal(*value.shape)
            else:
                tensors[name] = torch.zeros(value.shape) if name.endswith("bias") else torch.ones(value.shape)
        if entry.layout.norm == "pre":
            tensors |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        fixed = entry.table
        table = normal(*positions, width) if fixed is None else fixed(*positions, width)
        if table.shape[-1] != width:
            fits = f"a number that the sines and cosines of {family} fill, such as {table.shape[-1]}"
            raise ValueError(f"`width`: expected {fits}, got {width}")
        origin = {"seed": seed, "width": width, "depth": depth, "heads": heads, "positions": list(positions)}
        return cls(
            name=entry.name,
            modality=entry.modality,
            width=width,
            depth=depth,
            heads=heads,
            layout=entry.layout,
            tensors=tensors,
            position_table=table,
            cls_token=normal(width) if entry.has_cls else None,
            cls_position=(normal(width) if fixed is None else torch.zeros(width)) if entry.has_cls else None,
            registers=normal(entry.registers, width) if entry.registers else None,
            position_kind=entry.position_kind,
            origin=origin,
        )

    @classmethod
    def from_origin(cls, description: Mapping[str, Any]) -> Source:
        """The source that `describe()` described, from its seed or from the path it once had."""
        origin, family = dict(description["origin"]), description["family"]
        if "seed" in origin:
            return cls.random(family, **origin)
        if "path" in origin:
            return cls.from_checkpoint(origin.pop("path"), family, **origin)
        raise ValueError(f"`source`: this {family} source was built in memory and has to be given")


@dataclass(frozen=True)
class Family:
    """One row of the table of source families: how to recognise and read its checkpoints.

    Attributes:
        name: as in `Source.name`.
        title: the models it stands for, for readers.
        modality: "language", "vision" or "audio".
        checkpoint: what a checkpoint must look like, in one line.
        width: channels of the base model.
        depth: blocks of the base model.
        positions: shape of the base model's position table, `(L,)` or `(H, W)`.
        layout: how a block is put together.
        has_cls: whether it has a class token.
        matches: whether these tensors, with this `config.json`, are of this family.
        convert: `(state, config, *, depth, heads, origin) -> Source`.
        registers: number of further frozen tokens of the base model.
        position_kind: as in `Source.position_kind`.
        table: where positions are fixed, the table as a function of its shape, `(*positions, width)`.
    """

    name: str
    title: str
    modality: str
    checkpoint: str
    width: int
    depth: int
    positions: tuple[int, ...]
    layout: Layout
    has_cls: bool
    matches: Callable[[Mapping[str, Tensor], Mapping[str, Any]], bool]
    convert: Callable[..., Source]
    registers: int = 0
    position_kind: str = "learned"
    table: Callable[..., Tensor] | None = None


def get_family(name: str) -> Family:
    """The family of that name, or a ValueError that lists them."""
    from any2point.sources import FAMILIES

    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"`family`: expected one of {', '.join(FAMILIES)}, got {name!r}")
    return FAMILIES[name]


def matching_families(state: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> list[str]:
    """The families that a checkpoint holds, by precedence, or a ValueError that says what was seen."""
    from any2point.sources import FAMILIES

    def matches(entry: Family) -> bool:
        try:
            return entry.matches(state, config)
        except (RuntimeError, IndexError, TypeError):  # right names, but of shapes that it cannot look at
            return False

    matching = [name for name, entry in FAMILIES.items() if matches(entry)]
    if not matching:
        seen, known = ", ".join(sorted(state)[:4]), ", ".join(FAMILIES)
        kind = f" of model_type {config['model_type']!r}" if "model_type" in config else ""
        raise ValueError(
            f"`path`: {file} holds no known family ({known}); "
            f"it has {len(state)} tensor{'s' * (len(state) > 1)}{kind}, such as {seen}"
        )
    return matching


def choose_depth(available: int, depth: int | None) -> int:
    """The number of blocks to use, checked against what the checkpoint has."""
    if available == 0:
        raise ValueError("`path`: the checkpoint holds no complete block")
    if depth is None:
        return available
    if not 1 <= depth <= available:
        raise ValueError(f"`depth`: expected 1 to {available} blocks, got {depth}")
    return depth
