"""What all records of a comparison depend on: weights, settings, data, version; those of other ones are not taken up."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import PurePath
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from lightning_cap._version import __version__
from lightning_cap.calibration.statistics import GradientSamples
from lightning_cap.comparison.record_store import digest
from lightning_cap.sparsity.targets import Targets
from lightning_cap.trainer.calibration import calibrating, calibration_batches, calibration_source
from lightning_cap.utilities import distributed

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DEPTH = 6  # of objects in objects


@dataclass(frozen=True)
class Basis:
    """What the records of a comparison depend on beside the settings of the pruner, as checksums.

    Attributes:
        model: Weights, targets, module, validation batches, precision and version.
        data: The datamodule, before calibration data is set up.
        calibration: The datamodule after that, and the first calibration batch; empty if nothing here reads calibration data.
    """

    model: str
    data: str
    calibration: str

    def holds(self, depends: Mapping[str, str]) -> bool:
        """Whether a record that says what it `depends` on would be the same today, with the same settings."""
        if depends.get("model") != self.model:
            return False
        if self.calibration and depends.get("calibration") == self.calibration:
            return True
        return depends.get("data") == self.data and not (self.calibration and depends.get("reads"))

    def loss(self, samples: int) -> str:
        """Of the samples that a calibration loss is measured on; empty for no such loss."""
        return checksum([samples, self.calibration]) if samples and self.calibration else ""


def basis_of(trainer: pl.Trainer, module: pl.LightningModule, targets: Targets, calibrates: bool) -> Basis:
    """What all records of a comparison depend on, as far as it can be known.

    Every process must call it; all get what rank 0 found.

    Of the module (with all in it) and the datamodule: public attributes and hyperparameters. Names that begin with ``_`` are for
    what does not matter.

    Args:
        trainer: In ``validate``.
        module: Its LightningModule.
        targets: The weights that are pruned.
        calibrates: Whether calibration data is read; its first batch (seed 0) counts then.
    """
    datamodule = getattr(trainer, "datamodule", None)
    with distributed.raise_on_all_ranks("Reading what the comparison depends on"):
        data = _data(datamodule)
        calibration = _calibration(trainer, module, targets) if calibrates else None  # it may set the data up
        tensors = {**module.state_dict(), **dict(module.named_buffers())}
        loaders = CombinedLoader(trainer.val_dataloaders, "sequential").flattened
        model = {
            "version": __version__,
            "weights": digest({name: value for name, value in tensors.items() if isinstance(value, Tensor)}),
            "targets": list(targets),
            "module": checksum([{n: _own(m) for n, m in module.named_modules()}, canonicalize(dict(module.hparams))]),
            "samples": [_length(getattr(loader, "dataset", None)) for loader in loaders],
            "batches": [float(number) for number in trainer.num_val_batches],
            "precision": str(trainer.precision),
        }
        found = Basis(checksum(model), checksum(data), checksum([calibration, _data(datamodule)]) if calibrates else "")
    basis: Basis = distributed.gather_objects(found)[0]
    return basis


def checksum(value: Any) -> str:
    """Of plain values, the same in every run of the program."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def canonicalize(value: Any, depth: int = _DEPTH) -> Any:
    """A description that JSON can hold, the same in every run of the program, and another one for other settings.

    Objects are described by type and ``repr``, and where that has an address in it (or they are dataclasses) by their attributes
    instead; tensors and modules by a checksum; data sets by their length.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {
            "{}": sorted(
                ([str(canonicalize(k)), canonicalize(v, depth)] for k, v in value.items()), key=lambda pair: pair[0]
            )
        }
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [canonicalize(entry, depth) for entry in value]
    if isinstance(value, (set, frozenset)):
        return sorted((canonicalize(entry, depth) for entry in value), key=str)
    return _described(value, depth)


def _described(value: Any, depth: int) -> Any:
    kind = _name(type(value))
    if isinstance(value, Tensor):
        return [kind, digest({"": value})]
    if isinstance(value, np.ndarray):
        return [kind, str(value.dtype), checksum(canonicalize(value.tolist()))]
    if isinstance(value, nn.Module):
        return [kind, digest({name: part for name, part in value.state_dict().items() if isinstance(part, Tensor)})]
    if isinstance(value, (Dataset, DataLoader)):
        return [kind, _length(value)]
    if isinstance(value, (pl.Trainer, LightningCLI)) or depth == 0:  # how it was started makes no difference
        return kind
    if isinstance(value, functools.partial):
        return [
            kind,
            canonicalize(value.func, depth - 1),
            canonicalize(value.args, depth - 1),
            canonicalize(value.keywords, depth - 1),
        ]
    if hasattr(value, "__qualname__"):  # a class or a function
        code = getattr(value, "__code__", None)
        return [
            _name(value),
            code.co_code.hex() if code is not None else "",
            canonicalize(getattr(value, "__defaults__", ())),
        ]
    text = repr(value)
    if hasattr(value, "__dict__") and (ADDRESS.search(text) or is_dataclass(value)):
        return [kind, canonicalize(vars(value), depth - 1)]
    return [kind, ADDRESS.sub("", text)]


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _own(module: nn.Module) -> Any:
    """Type and public attributes of one module, without those in it, what the run keeps in it, and the state of a metric."""
    state = module.metric_state if isinstance(module, Metric) else {}
    without = _internal(module) | set(state)
    return [
        _name(type(module)),
        canonicalize({k: v for k, v in vars(module).items() if k[0] != "_" and k not in without}),
    ]


def _data(datamodule: pl.LightningDataModule | None) -> Any:
    if datamodule is None:
        return None
    own = {k: v for k, v in vars(datamodule).items() if k[0] != "_" and k not in vars(pl.LightningDataModule())}
    return [_name(type(datamodule)), checksum([canonicalize(own), canonicalize(dict(datamodule.hparams))])]


def _internal(module: nn.Module) -> set[str]:
    """What torch and Lightning keep in every module."""
    return set(vars(pl.LightningModule() if isinstance(module, pl.LightningModule) else nn.Module()))


def _calibration(trainer: pl.Trainer, module: pl.LightningModule, targets: Targets) -> list[Any]:
    """Samples of the calibration data, and a checksum of its first batch under seed 0, as the module gets it."""
    with calibrating(trainer, module), torch.no_grad():
        source = calibration_source(trainer, module)
        first = next(calibration_batches(trainer, module, GradientSamples(1), targets, (0, 0), source), None)
    return [
        _length(getattr(source, "dataset", source)),
        checksum([canonicalize(leaf) for leaf in pytree.tree_leaves(first)]),
    ]


def _length(data: Any) -> int | None:
    """Length of the data, None where it does not know it."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None
