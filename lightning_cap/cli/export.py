"""``lightning-cap export``: a checkpoint as a file for another runtime, verified, and measured if wanted."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from lightning_cap.callbacks.qat import quantized_layers
from lightning_cap.callbacks.state import pruned_units
from lightning_cap.cli.checkpoint_model import CheckpointModel, load_checkpoint_model
from lightning_cap.cli.inputs import real_inputs
from lightning_cap.cli.messages import near
from lightning_cap.cli.parsing import CAPParser
from lightning_cap.errors import CAPError, ConfigError
from lightning_cap.export import Exporter, ExportRecord
from lightning_cap.export.batches import Inputs, call, head
from lightning_cap.export.benchmark import benchmark, print_benchmark, save_benchmark
from lightning_cap.export.exporter import MODEL_ARGS, num_bytes
from lightning_cap.export.safetensors import plain_model
from lightning_cap.export.shrunk import shrink
from lightning_cap.quantization.layers import prepare
from lightning_cap.utilities.arguments import require_path, require_whole, shown
from lightning_cap.utilities.files import require_writable
from lightning_cap.utilities.flops import count_flops

SUMMARY = "Write a checkpoint as a file for another runtime, and verify it against torch."

_DESCRIPTION = f"""{SUMMARY}

The file is read back and run on real inputs before it gets its name; where its outputs differ there is no file, and an error.
The model is rebuilt from the hyper-parameters in the checkpoint, else from the config.yaml of its run, which is found in the
folder of the checkpoint or the one above. Inputs are, of these, the first that there is: --input, --data, the validation data
of that config.yaml, noise; the output says which.
"""


def formats() -> dict[str, type[Exporter]]:
    """Every exporter by the name of its format, those of the user's that are imported included."""
    found: dict[str, type[Exporter]] = {}
    waiting = list(Exporter.__subclasses__())
    while waiting:
        kind = waiting.pop(0)
        waiting += kind.__subclasses__()
        if hasattr(kind, "format"):
            found.setdefault(kind.format, kind)
    return found


def export_parser(**kwargs: Any) -> CAPParser:
    """The options of ``lightning-cap export``."""
    parser = CAPParser(prog="lightning-cap export", description=_DESCRIPTION, **kwargs)
    parser.example = "lightning-cap export CKPT --to onnx"
    parser.add_argument(
        "ckpt",
        metavar="CKPT",
        type=str,
        help="A checkpoint of VisionClassifier or, with --module, of another LightningModule; or the .safetensors beside it.",
    )
    parser.add_argument(
        "--to",
        type=Exporter,
        required=True,
        help=f"The format: {', '.join(formats())}; or the class path of an Exporter. Settings follow, as in --to.tolerance=1e-3.",
    )
    for name, told in (
        ("--shrink", "Cut the pruned units out first. The checkpoint must be of a run that pruned units."),
        ("--benchmark", "Measure the dense model and the file in turns, at batch 1 and 32, and print a table."),
    ):
        parser.add_argument(name, action="store_true", help=told)
    for name, told in (
        ("--output", "Folder of the file. Default: export, beside the checkpoint."),
        ("--data", "Images to verify on: a folder of class folders, a .tar of them, or the folder of such splits."),
        (
            "--input",
            "A tensor (n, ...) to verify on, in a .pt or .npy file; or a .pt of the arguments in a tuple or dict.",
        ),
        ("--config", "The config.yaml of the run, for the model and its data."),
        ("--module", "Class path of the LightningModule, where the checkpoint does not tell the model."),
    ):
        parser.add_argument(name, type=str | None, default=None, help=told)
    parser.add_argument("--threads", type=int | None, default=None, help="Of --benchmark. Default: as torch has them.")
    return parser


def export(args: Sequence[str]) -> ExportRecord:
    """Do what ``lightning-cap export`` is to do.

    Args:
        args: After the word ``export``.

    Returns:
        The record of the file.

    Raises:
        CAPError: What is wrong, in one line.
    """
    parser = export_parser()
    given = parser.instantiate(parser.parse_args(_with_class_paths(args)))
    exporter: Exporter = given.to
    exporter.require_packages()
    if given.threads is not None:
        require_whole("--threads", given.threads)
    if given.benchmark and not exporter.runs_here():
        raise ConfigError(f"--benchmark: a file of {exporter.format!r} cannot be run on this machine. Leave it out.")
    paths = {name: _path(name, given[name]) for name in ("output", "data", "input", "config")}
    require_path("CKPT", given.ckpt, "runs/last.ckpt")
    checkpoint = Path(given.ckpt).expanduser()
    folder = paths["output"] or checkpoint.parent / "export"
    loaded = load_checkpoint_model(checkpoint, paths["config"], given.module)
    require_writable("--output", str(folder), folder)
    inputs, origin = real_inputs(loaded, paths["config"] is not None, paths["data"], paths["input"])
    with _in_words_of_the_command(checkpoint):
        model = _shrunk(checkpoint, loaded, inputs) if given.shrink else loaded.model
        quantized = _quantized_layers(loaded)
        if exporter.integers and quantized:
            model = copy.deepcopy(model)
            prepare(model, quantized)
    path = folder / f"{checkpoint.stem}{'-shrunk' if given.shrink else ''}{exporter.suffix}"
    metadata = {} if loaded.model_args is None else {MODEL_ARGS: json.dumps(loaded.model_args, sort_keys=True)}
    size = num_bytes(loaded.model)
    with _in_words_of_the_command(checkpoint), _leaving_no_empty_folder(folder):
        record = exporter.export(model, path, inputs, dense_bytes=size, shrunk=given.shrink, metadata=metadata)
    for line in describe(record, path, origin):
        print(line)
    if quantized and not exporter.integers:
        print(
            "Its run trained with int8 weights; they are in float in this format. For integers, --to qdq or --to torchao."
        )
    if given.benchmark:
        _benchmark(exporter, loaded.model, model, path, inputs, given.threads)
    return record


def describe(record: ExportRecord, path: Path, origin: str) -> list[str]:
    """What the user is told of an export.

    Args:
        record: Of it.
        path: Of the file.
        origin: What the inputs are.
    """
    dense = "" if not record.dense_bytes else f" (dense: {_size(record.dense_bytes)})"
    if record.difference is None:
        ran = "not run, as that needs another machine; its stored weights were compared"
    else:
        ran = (
            f"largest difference from torch {record.difference:.1e} of the largest output, tolerance {record.tolerance:.3g}, on "
            f"{record.inputs} inputs ({origin})"
        )
    zeros = f"zeros equal in all {record.weights} weights that have some" if record.weights else "no weight has zeros"
    if record.zeros_equal < record.weights:
        zeros = f"zeros equal in {record.zeros_equal} of {record.weights} weights that have some; the others are not stored as such"
    return [f"{path}: {_size(record.bytes)} on disk{dense}", f"Verified: {ran}; {zeros}."]


def _size(number: int) -> str:
    return f"{number / 1e6:.2f} MB" if number >= 1e5 else f"{number / 1e3:.2f} kB"


def _shrunk(checkpoint: Path, loaded: CheckpointModel, inputs: Inputs) -> nn.Module:
    """The model without its pruned units."""
    found = pruned_units(loaded.callbacks)
    if found is None or loaded.module is None:
        raise ConfigError(
            f"--shrink: CKPT={shown(str(checkpoint))} is of no run that pruned units. Give the .ckpt of one, with a pruner such as "
            "CAPUnits, or leave --shrink out."
        )
    units, masks = found
    return shrink(loaded.module, masks, units, head(inputs, 2)).eval()


def _quantized_layers(loaded: CheckpointModel) -> list[str]:
    """Names in the model of the layers that its run has quantized."""
    names = quantized_layers(loaded.callbacks)
    prefix = "" if loaded.module is None else plain_model(loaded.module, [])[1]
    return [name.removeprefix(prefix) for name in names if name.startswith(prefix)]


@contextmanager
def _in_words_of_the_command(checkpoint: Path) -> Iterator[None]:
    """What is wrong, by the names that the user has typed."""
    try:
        yield
    except CAPError as error:
        told, is_state, _ = str(error).partition(" To prune on from its weights, ")
        told = told.replace(" Resume from another checkpoint.", "")
        told = re.sub(r"^ckpt_path(?=:)", f"CKPT={shown(str(checkpoint))}", told)
        told = re.sub(r"^example_input(?=[:=])", "--input", told)
        raise type(error)(f"{told} Give another checkpoint, or leave --shrink out." if is_state else told) from error


@contextmanager
def _leaving_no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove what was made of a folder and its parents, if there is nothing in it after a failure."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        for place in missing:
            with suppress(OSError):
                place.rmdir()
        raise


def _benchmark(
    exporter: Exporter, dense: nn.Module, model: nn.Module, path: Path, inputs: Inputs, threads: int | None
) -> None:
    """Measure the dense model in the same format, and the file."""
    with tempfile.TemporaryDirectory() as folder:
        name = path.name
        models: dict[str, Callable[..., Any]] = {
            f"dense, {exporter.format}": exporter.dense_runner(dense, Path(folder), inputs, threads),
            name: exporter.runner(path, model, threads),
        }
        flops = {
            label: count_flops(call, m, head(inputs, 1)) for label, m in ((next(iter(models)), dense), (name, model))
        }
        sparse = [name] if exporter.skips_zeros else []
        files = {name: path} if path.is_file() else {}  # of a folder no size is told
        records = benchmark(models, inputs, threads=threads, files=files, flops=flops, sparse_kernels=sparse)
    save_benchmark(records, path.parent)
    print_benchmark(records)


def _path(name: str, value: str | None) -> Path | None:
    require_path(f"--{name}", value, "a/path", optional=True)
    return None if value is None else Path(value).expanduser()


def _with_class_paths(args: Sequence[str]) -> list[str]:
    """``--to onnx`` as the class path that the parser takes."""
    found, taken = formats(), list(args)
    for place, argument in enumerate(taken):
        option, equals, value = argument.partition("=")
        if option != "--to" or not (equals or place + 1 < len(taken)):
            continue
        value = value if equals else taken[place + 1]
        if value in found:
            value = f"{found[value].__module__}.{found[value].__qualname__}"
        elif "." not in value and "{" not in value and value not in {kind.__name__ for kind in found.values()}:
            raise ConfigError(f"--to={shown(value)}: choose {', '.join(found)}{near(value, found) or '.'}")
        taken[place if equals else place + 1] = f"--to={value}" if equals else value
    return taken
