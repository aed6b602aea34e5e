"""The commands of `any2point`, one function each; `cli.main` calls `app` and reports errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from any2point._version import __version__
from any2point.bench.commands import bench

_typer = typer.Typer(
    name="any2point",
    help="Frozen language, vision and audio transformers for 3D point clouds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_typer.add_typer(bench, name="bench")

Run = Annotated[Path, typer.Argument(help="Folder of a run or of a saved model.", show_default=False)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Devices = Annotated[
    int, typer.Option(help="GPUs to share the work among, 0 for all; torchrun works too.", min=0)
]
Precision = Annotated[str, typer.Option(help="auto, fp32, tf32, bf16 or fp16.")]
SourceOption = Annotated[
    str | None, typer.Option(help="Checkpoint of the frozen transformer, where it is no longer where it was.")
]


def app(arguments: Sequence[str]) -> int:
    """Run a command; usage errors are printed with exit code 2, all others are raised."""
    from typer.main import get_command

    command = get_command(_typer)
    # With standalone_mode it would call sys.exit and turn Ctrl-C into exit code 1.
    result = _call(command, list(arguments))
    if result == 130:  # typer's way to report Ctrl-C
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _call(command: Any, arguments: list[str]) -> Any:
    try:
        return command.main(args=arguments, prog_name="any2point", standalone_mode=False)
    except Exception as error:
        # Told apart by what they offer, because typer may carry its own copy of click.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            if error.format_message():
                context = getattr(error, "ctx", None)
                command = context.command_path if context is not None else "any2point"
                print(
                    f"any2point: {error.format_message().rstrip(chr(46))}; see {command} -h", file=sys.stderr
                )
            return error.exit_code
        if type(error).__name__ == "Abort":
            raise KeyboardInterrupt from None
        raise


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@_typer.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@_typer.command()
def demo(
    source: Annotated[
        str | None, typer.Option(help="Checkpoint to use instead of the installed MiniLM, or random:bert.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Run folder; default runs/demo, runs/demo-2, ...")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Repeat everything with this many seeds.", min=1)] = 1,
    quick: Annotated[bool, typer.Option(help="A few seconds, to see that it works.")] = False,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Fine-tune a frozen language transformer on furniture shapes, with controls, in minutes."""
    from any2point.train.demo import run_demo

    run_demo(source=source, output=output, seeds=seeds, quick=quick, device=device, precision=precision)


@_typer.command()
def train(
    data: Annotated[
        str | None,
        typer.Option(help="sh3d15, a folder (class/file or train|test/class/file), or the recipe's files."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(help="The transformer to freeze: a checkpoint, minilm (default), random:bert, ..."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="YAML file, or clip-text/scanobjectnn, dinov2/modelnet40, ... (a wrong name lists all)."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Run folder to make.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option(help="Continue the run in --output with its own recipe.")] = False,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clouds per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.")] = None,
    select: Annotated[
        str | None,
        typer.Option(
            help="Weights to keep: of the last epoch, or the best on validation or (as officially) on test."
        ),
    ] = None,
    parity: Annotated[
        str | None, typer.Option(help="official: every quirk of the official code, in model and training.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = None,
    devices: Annotated[
        int | None, typer.Option(help="GPUs to share each batch among, 0 for all; torchrun works too.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32, tf32, bf16 or fp16.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any option of the recipe: model.views=3, train.select=validation, ..."),
    ] = None,
) -> None:
    """Fine-tune on your own clouds. Flags override the recipe; the resolved recipe is saved with the run.

    On several machines, or under a scheduler: torchrun ... -m any2point train ...
    """
    from any2point.train.run import train_run

    flags: dict[str, Any] = {"data": data, "source": source, "parity": parity}
    options = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed, "select": select}
    options |= {"device": device, "devices": devices, "precision": precision}
    flags |= {f"train.{name}": value for name, value in options.items()}
    overrides = {name: value for name, value in flags.items() if value is not None}
    train_run(recipe, overrides | _settings(option or []), output, resume)


@_typer.command("eval")
def evaluate(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Data set or its folder; default: what the run was trained on.")
    ] = None,
    split: Annotated[str, typer.Option(help="test or train.")] = "test",
    source: SourceOption = None,
    vote: Annotated[
        int, typer.Option(help="Passes to average: a plain one, others on other points and scales.", min=1)
    ] = 1,
    output: Annotated[Path | None, typer.Option(help="Folder for results.json and confusion.png.")] = None,
    device: Device = "auto",
    devices: Devices = 1,
    precision: Annotated[
        str | None, typer.Option(help="auto, fp32, bf16 or fp16; default: as it was trained.")
    ] = None,
) -> None:
    """Accuracy of a trained model, overall and class by class."""
    from any2point.train.run import evaluate_run

    compute = {"device": device, "devices": devices}
    compute |= {} if precision is None else {"precision": precision}
    evaluate_run(run, data, split, source, output, vote, compute)


@_typer.command()
def predict(
    run: Run,
    clouds: Annotated[
        list[Path], typer.Argument(help=".ply .obj .off .npy .xyz .txt .csv .pts", show_default=False)
    ],
    top: Annotated[int, typer.Option(help="How many classes to list.", min=1)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per file.")] = False,
    source: SourceOption = None,
    device: Device = "auto",
) -> None:
    """Classify point clouds and meshes."""
    from any2point.train.run import predict_files

    predict_files(run, clouds, top, as_json, source, device)


@_typer.command()
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Fine-tuned file of the official code; with --to-official, folder of a run.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(help="Folder to make; with --to-official, file.", show_default=False)
    ],
    variant: Annotated[
        str, typer.Option(help="Such as clip-text/scanobjectnn; auto: what the tensors (or options) say.")
    ] = "auto",
    pretrained: Annotated[
        Path | None,
        typer.Option(help="The transformer's checkpoint it was trained from, with the position table."),
    ] = None,
    to_official: Annotated[
        bool, typer.Option("--to-official", help="The other way: write a file that the official code loads.")
    ] = False,
    source: SourceOption = None,
) -> None:
    """Turn a checkpoint of the official code into a model folder of this package, or back."""
    from any2point.train import convert as conversion

    chosen = None if variant == "auto" else variant
    if to_official:
        conversion.to_official(checkpoint, output, chosen, source)
    else:
        conversion.from_official(checkpoint, output, chosen, pretrained)


@_typer.command()
def sources(
    path: Annotated[
        Path | None, typer.Argument(help="A checkpoint to look at: a file or a folder.", show_default=False)
    ] = None,
    family: Annotated[
        str | None, typer.Option(help="Read it as this family; without it, show this family alone.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, where it does not tell.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """The transformers that can be fine-tuned, or what a given checkpoint is."""
    from any2point.sources.table import print_sources

    print_sources(path, family=family, heads=heads, as_json=as_json)


@_typer.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """What is installed, what the machine has, what is missing and how to fix it."""
    from any2point.info import main

    main(["--json"] if as_json else [])


def _settings(texts: Sequence[str]) -> dict[str, Any]:
    """`name=value` texts; values are JSON where they can be, text otherwise."""
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--set: expected NAME=VALUE, got {text!r}")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value
    return values
