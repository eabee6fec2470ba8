"""Bad input to `QATCallback` and to the exporters of integers. What depends on the Trainer is in `tests/callbacks/test_qat.py`."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import nn

from lightning_cap import QATCallback
from lightning_cap.callbacks.qat import quantized_layers
from lightning_cap.errors import ConfigError, DataError, TargetError
from lightning_cap.export import QDQ, TorchAO
from lightning_cap.quantization.layers import choose_layers, prepare
from tests.support.bad_input.exporters import FILES, INPUTS, MODEL, NO_PATHS
from tests.support.bad_input.table import NO_NUMBERS, Command, Line, wrong
from tests.support.checkpoints import checkpoint

NO_NAMES: tuple[Any, ...] = ("*.weight", 3, True, [3], [None], [""], {"a": 1}, object)
WORDS = ("no layer of the model was trained with int8 weights", "QATCallback")


def as_bytes(held: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(held, stream)
    return stream.getvalue()


SETTINGS = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def quantized_checkpoint(callbacks: Any) -> bytes:
    """Of a classifier, with states of callbacks."""
    from lightning_cap import VisionClassifier

    with torch.random.fork_rng(devices=[]):
        module = VisionClassifier("vit_tiny_patch16_224", num_classes=3, model_kwargs=SETTINGS)
    held = checkpoint(state_dict=module.state_dict(), hyper_parameters=dict(module.hparams), callbacks=callbacks)
    return as_bytes(held)


def loaded(state: Any) -> None:
    QATCallback().load_state_dict(state)


def torchao_runner(path: Any = "m.torchao.pt", model: Any = MODEL) -> None:
    TorchAO().runner(path, model)


def torchao_stored(path: Any) -> None:
    TorchAO().stored(path)


def exported(exporter: Any, path: str) -> None:
    exporter.export(MODEL, path, INPUTS)


PLAIN = {**FILES, "plain.ckpt": quantized_checkpoint({}), "x.pt": as_bytes(torch.randn(2, 3, 16, 16)),
         "broken.ckpt": quantized_checkpoint({"QATCallback": {"version": 7, "quantized": []}}),
         "other.ckpt": quantized_checkpoint({"QATCallback": {"version": 1, "quantized": ["model.gone"]}})}  # fmt: skip


def command(name: str, args: list[str], *words: str) -> Command:
    return Command(f"export integers of {name}", ["export", *args, "--input", "x.pt"], words, PLAIN)


LINES = [
    *wrong(QATCallback, "epoch", *NO_NUMBERS, 3.0, 0.5, -1, 2**40),
    *wrong(QATCallback, "include", *NO_NAMES),
    *wrong(QATCallback, "exclude", *NO_NAMES),
    *wrong(QATCallback, "unsupported", None, True, "skp", ["skip"], 3, words=["'skip' or 'refuse'"]),
    *(Line(f"a state of QATCallback {held}", lambda _, held=held: loaded(held), DataError, ("the state of QATCallback",))
      for held in (None, {}, {"version": 1}, {"version": 2, "quantized": []}, {"version": 1, "quantized": "net"},
                   {"version": 1, "quantized": [3]})),
    Line("states of callbacks", lambda _: quantized_layers({"QATCallback": {"quantized": 3}}), DataError, ("QATCallback",)),
    Line("no Linear layer", lambda _: choose_layers(nn.Sequential(nn.Conv1d(2, 2, 1)), None, None), TargetError,
         ("no Linear layer left to quantize", "0.weight: a Conv1d")),
    Line("no such weight", lambda _: choose_layers(nn.Sequential(MODEL), ["a.*"], None), TargetError, ("include: 'a.*'", "Near")),
    Line("no such layer", lambda _: prepare(nn.Sequential(MODEL), ["3"]), ConfigError, ("no Linear layer '3'",)),
    *(row for kind in (TorchAO, QDQ) for row in wrong(kind, "tolerance", *NO_NUMBERS, 0, 1, -0.1)),
    *wrong(QDQ, "static", None, 1, "yes", [True]),
    *(Line(f"{type(exporter).__name__} of plain layers", lambda _, e=exporter: exported(e, f"m{e.suffix}"), ConfigError, WORDS)
      for exporter in (TorchAO(), QDQ())),
    *wrong(torchao_runner, "model", None, "model", nn.Linear),
    *wrong(torchao_stored, "path", *NO_PATHS),
    command("a run without them", ["plain.ckpt", "--to", "torchao"], "to='torchao'", *WORDS),
    command("a run without them, as ONNX", ["plain.ckpt", "--to", "qdq"], "to='qdq'", *WORDS),
    command("a damaged state", ["broken.ckpt", "--to", "qdq"], "CKPT='broken.ckpt'", "QATCallback"),
    command("another model", ["other.ckpt", "--to", "torchao"], "no Linear layer 'gone'"),
    command("a wrong tolerance", ["plain.ckpt", "--to", "qdq", "--to.tolerance", "2"], "tolerance=2"),
]  # fmt: skip
