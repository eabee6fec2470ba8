"""Bad input to the exporters and to ``lightning-cap export``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cap.errors import ConfigError, DataError, ExportError
from lightning_cap.export import (
    ONNX,
    PT2,
    Compressed,
    CoreML,
    OpenVINO,
    Safetensors,
    SemiStructured,
    load_compressed,
    load_semi_structured,
)
from lightning_cap.export.compressed_files import read_header
from lightning_cap.export.safetensors import save_plain_weights
from tests.support.bad_input.table import NO_NUMBERS, Command, Line, wrong
from tests.support.checkpoints import checkpoint

MODEL = nn.Linear(4, 2)
INPUTS = torch.ones(3, 4)
NO_PATHS = (None, 3, True, "", " ", ["m"], object)


def export(
    model: Any = MODEL, path: Any = "m.safetensors", example_input: Any = INPUTS, exporter: Any = None, **given: Any
) -> None:
    """Named as `Exporter.export`, of weights."""
    (exporter or Safetensors()).export(model, path, example_input, **given)


def runner(path: Any = "m.safetensors", model: Any = MODEL) -> None:
    """Of a format that holds weights alone."""
    Compressed().runner(path, model)


def stored(path: Any) -> None:
    """Of plain weights."""
    Safetensors().stored(path)


def of_pt2(path: Any) -> None:
    """Of a program."""
    PT2().runner(path)


def plain_file(folder: Path) -> None:
    save_plain_weights(folder / "m.safetensors", {"weight": torch.ones(2)}, {})


def bytes_of(held: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream)
    return stream.getvalue()


RESNET = {"model": "resnet10t", "num_classes": 3}
OF_ANOTHER = bytes_of(checkpoint(hyper_parameters=RESNET))
OF_NONE = bytes_of(checkpoint())
TENSOR = bytes_of(torch.ones(2, 3))
FILES = {"a.ckpt": OF_ANOTHER, "none.ckpt": OF_NONE, "x.pt": TENSOR, "i.pt": bytes_of(torch.ones(2, 3, dtype=torch.int64)),
         "d.pt": bytes_of({"x": torch.ones(2)}), "text.pt": b"no tensor", "m.safetensors": b"damaged"}  # fmt: skip


def command(name: str, args: list[str], *words: str) -> Command:
    return Command(f"export {name}", ["export", *args], words, FILES)


LINES = [
    *wrong(export, "model", None, "model", nn.Linear, {"weight": torch.ones(2)}),
    *wrong(export, "path", *NO_PATHS),
    *wrong(export, "path", "m", "m.onnx", ".safetensors", words=("ends with .safetensors",)),
    *wrong(export, "example_input", None, 3, "x", True, Path("x.pt")),
    *wrong(export, "goal", "0.5", True, float("nan"), 1.5, [0.5]),
    *wrong(export, "dense_bytes", "3", True, 0, 1.5, float("inf")),
    *wrong(export, "shrunk", None, 1, "yes"),
    *wrong(export, "metadata", 3, "a", [("a", "b")]),
    *(Line(f"export: inputs {i}", lambda _, x=x: export(example_input=x), ConfigError, ("example_input:", "Give real inputs"))
      for i, x in enumerate((torch.ones(3), torch.ones(0, 4), INPUTS.to_sparse(), INPUTS * torch.nan))),
    *(Line(f"export: inputs in a structure {i}", lambda _, x=x: export(example_input=x), ConfigError, ("example_input: ", word))
      for i, (x, word) in enumerate((
          ((), "there is no tensor (n, ...) in ()"),
          ({}, "there is no tensor (n, ...) in {}"),
          ([[1.0]], "there is no tensor (n, ...) in [[1.0]]"),
          ((torch.tensor(1.0),), "there is no tensor (n, ...) in"),
          ({"input": torch.ones(0, 4)}, "there is no tensor (n, ...) in"),
          ({"input": INPUTS * torch.nan}, "'input' has values that are not finite"),
          ((INPUTS, [INPUTS / 0]), "'1_0' has values that are not finite"),
          ({3: INPUTS}, "3 is no name of an argument"),
          ({"input": INPUTS, "mask": INPUTS.numpy()}, "'mask' is a ndarray. Give tensors"),
      ))),
    *(Line(f"export: inputs of another model {i}", lambda _, x=x: export(example_input=x), ExportError, ("cannot be run on it",))
      for i, x in enumerate((torch.ones(3, 5), INPUTS.long(), (INPUTS, INPUTS), {"x": INPUTS}))),
    Line("export: two inputs to Core ML", lambda _: CoreML().write(MODEL, Path("m"), (INPUTS,), {}), ExportError,
         ("to='coreml': only a model from one float tensor to one tensor", "onnx, openvino, pt2")),
    Line("export: a folder for a file", lambda _: export(path="old.safetensors"), ConfigError, ("this is a folder",),
         lambda folder: (folder / "old.safetensors").mkdir()),
    Line("export: where nothing can be", lambda _: export(path="/dev/null/x.safetensors"), ConfigError, ("cannot be written",)),
    Line("export: foreign records", lambda _: export(), DataError, ("exports.jsonl",),
         lambda folder: (folder / "exports.jsonl").write_text('{"record": "other"}\n')),
    *(row for kind in (Safetensors, Compressed, PT2, ONNX, OpenVINO, CoreML, SemiStructured)
      for row in wrong(kind, "tolerance", *NO_NUMBERS, 0, 1, -0.1)),
    *wrong(CoreML, "precision", None, "fp16", 16, torch.float16),
    *wrong(SemiStructured, "dtype", None, "float32", 16, torch.float16),
    *wrong(runner, "model", None, "model", nn.Linear),
    *wrong(runner, "path", *NO_PATHS),
    *wrong(stored, "path", *NO_PATHS),
    *wrong(of_pt2, "path", *NO_PATHS),
    *wrong(load_compressed, "path", *NO_PATHS),
    *wrong(load_compressed, "path", "nowhere.safetensors", error=DataError, words=("cannot be read",)),
    Line("load_compressed: plain weights", lambda _: load_compressed("m.safetensors"), DataError, ("header has no",), plain_file),
    *wrong(load_semi_structured, "model", None, "model", nn.Linear, given={"path": "m.safetensors"}),
    *wrong(load_semi_structured, "path", *NO_PATHS, given={"model": MODEL}),
    *wrong(read_header, "path", *NO_PATHS, given={"key": "a"}),
    command("nothing", [], "required: ckpt, to", "export CKPT --to onnx"),
    command("to nothing", ["a.ckpt"], "required: to", "--to onnx"),
    command("to no format", ["a.ckpt", "--to", "onx"], "--to='onx'", "did you mean 'onnx'?"),
    command("to a class that is none", ["a.ckpt", "--to", "lightning_cap.pruners.CAP"], "to: "),
    command("no such option", ["a.ckpt", "--to", "pt2", "--shrnk"], "--shrnk", "did you mean '--shrink'?"),
    command("no such setting", ["a.ckpt", "--to", "pt2", "--to.tolerence", "1"], "did you mean 'tolerance'?"),
    command("no tolerance", ["a.ckpt", "--to", "pt2", "--to.tolerance", "0"], "tolerance=0"),
    command("no such checkpoint", ["nowhere.ckpt", "--to", "pt2"], "CKPT='nowhere.ckpt'", "cannot be read"),
    command("a folder", [".", "--to", "pt2"], "CKPT='.'", "this is a folder"),
    command("text", ["text.pt", "--to", "pt2"], "CKPT='text.pt'", "no file that torch has saved"),
    command("damaged weights", ["m.safetensors", "--to", "pt2"], "CKPT='m.safetensors'", "cannot be read"),
    command("a tensor", ["x.pt", "--to", "pt2"], "CKPT='x.pt'", "no Lightning checkpoint"),
    command("of no known model", ["none.ckpt", "--to", "pt2"], "it does not tell its model", "--module CLASS"),
    command("of another model", ["a.ckpt", "--to", "pt2"], "CKPT='a.ckpt'", "it is of another model"),
    command("no such module", ["none.ckpt", "--to", "pt2", "--module", "no.Net"], "--module='no.Net'", "cannot be imported"),
    command("a module without a name", ["none.ckpt", "--to", "pt2", "--module", "Net"], "--module='Net'"),
    command("a module of another kind", ["none.ckpt", "--to", "pt2", "--module", "torch.nn.Linear"], "no LightningModule"),
    command("no such configuration", ["none.ckpt", "--to", "pt2", "--config", "nowhere.yaml"], "nowhere.yaml", "no such file"),
    command("no number of threads", ["a.ckpt", "--to", "pt2", "--threads", "0"], "--threads=0"),
    command("letters for threads", ["a.ckpt", "--to", "pt2", "--threads", "two"], "threads: ", "two"),
    command("an empty folder", ["a.ckpt", "--to", "pt2", "--output", ""], "--output=''"),
]  # fmt: skip
