"""Fake quantized models and runs that quantize."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_cap import QATCallback
from lightning_cap.quantization.layers import choose_layers, prepare
from tests.support.stopping import CrashError, StopAfter
from tests.support.toy import Toy, callback, loaders, trainer


def sparse_net(share: float = 0.5) -> nn.Sequential:
    """A plain model of 16 features, always the same, with zeros; one row of the first weight is all zero."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(torch.rand_like(layer.weight) >= share)
        net[0].weight[5] = 0.0
    return net


def quantized_net(share: float = 0.5) -> nn.Sequential:
    """The same, fake quantized."""
    net = sparse_net(share)
    prepare(net, choose_layers(net, None, None)[0])
    return net


def features(number: int = 6) -> torch.Tensor:
    return torch.randn(number, 16, generator=torch.Generator().manual_seed(1))


def quantizing_run(
    folder: Path,
    epoch: int = 2,
    first: bool = False,
    ckpt: str | None = None,
    stop: int | None = None,
    seed: int = 11,
    more: Any = (),
    data: Any = None,
    **kwargs: Any,
) -> tuple[Toy, QATCallback, Any]:
    """One ``fit`` of five epochs with events at 1 and 3, quantized from ``epoch`` on by a callback before or after the pruning one.

    Args:
        folder: Of checkpoints, after every second step of the four of an epoch, and of ``pruned``, those of the sparsities.
        epoch: See `QATCallback`.
        first: Whether that comes before the pruning callback.
        ckpt: To go on from.
        stop: The epoch that begins with a crash.
        seed: Of everything.
        more: Callbacks.
        data: Of ``fit``, where it is not that of `loaders`.
        kwargs: Of the Trainer.
    """
    pl.seed_everything(seed, verbose=False)
    module, qat = Toy(), QATCallback(epoch)
    cb = callback({1: 0.5, 3: 0.75}, dirpath=str(folder / "pruned"))
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", save_top_k=-1, every_n_train_steps=2)
    extra = [*more, saver, *([] if stop is None else [StopAfter(stop)])]
    pair = [qat, cb] if first else [cb, qat]
    t = trainer(folder, *pair, *extra, max_epochs=5, enable_checkpointing=True, **kwargs)
    with contextlib.suppress(CrashError):
        t.fit(module, **{**loaders(), **(data or {})}, ckpt_path=ckpt)
    return module, qat, cb
