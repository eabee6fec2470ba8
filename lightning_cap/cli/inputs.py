"""Real inputs that an exported file is verified on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_cap.classifier.agreement import input_shape, normalization_of
from lightning_cap.cli.checkpoint_model import CheckpointModel
from lightning_cap.data import ImageNetDataModule
from lightning_cap.errors import CAPError, ConfigError, DataError
from lightning_cap.export.batches import (
    Inputs,
    batched_tensors,
    checked_inputs,
    concatenated,
    head,
    moved,
    num_rows,
)
from lightning_cap.utilities.arguments import shown

_NUMBER = 32  # of inputs
_ARGUMENTS = "the arguments of the model in a tuple or dict"
_OF = f"of a tensor, or of {_ARGUMENTS}"
_SPLITS = ("val", "validation", "val.tar", "validation.tar")


def real_inputs(
    loaded: CheckpointModel, config_given: bool, data: Path | None, file: Path | None
) -> tuple[Inputs, str]:
    """Inputs of the model, at most 32 rows, and what they are, for the user.

    Taken are, of these, the first that there is: the file, the images, the data of the run's configuration, noise.

    Args:
        loaded: The model.
        config_given: Whether the user has named the configuration: then its data must be there.
        data: A folder of class folders or a .tar of them, or a folder that has a split ``val`` or ``validation``.
        file: ``.pt`` or ``.npy`` of a tensor ``(n, ...)``, or ``.pt`` of the arguments in a tuple or a dict.

    Raises:
        ConfigError: There is nothing to take, or it is nothing for this model.
        DataError: It cannot be read.
    """
    if file is not None:
        return _of_file(file), f"inputs of {file}"
    if data is not None:
        return _of_module(_images(loaded.model, data), loaded.model), f"images of {data}"
    failed = ""
    if loaded.config is not None and loaded.config.has_data:
        try:
            return _of_module(loaded.config.make_data(), loaded.model), f"validation data of {loaded.config.path}"
        except (CAPError, OSError) as error:
            if config_given:
                raise
            failed = f" ({loaded.config.path}: {' '.join(str(error).split())})"
    shape = input_shape(loaded.model)
    if shape is None:
        raise ConfigError(
            f"CKPT: nothing tells the inputs of the model{failed}. Give --data FOLDER of images, or --input FILE {_OF}."
        )
    noise = torch.randn(_NUMBER, *shape, generator=torch.Generator().manual_seed(0))
    return noise, f"noise, as no data is known{failed}; for real inputs give --data FOLDER or --input FILE"


def _of_file(path: Path) -> Inputs:
    named = f"--input={shown(str(path))}"
    try:
        if path.suffix == ".npy":
            held: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # text read as a pickle raises nearly anything
        told = (
            error.strerror if isinstance(error, OSError) else None
        ) or "it is no tensor that torch or numpy has saved"
        raise DataError(
            f"{named}: it cannot be read ({told}). Give a .pt or .npy file of a tensor (n, ...)."
        ) from error
    if not isinstance(held, (Tensor, tuple, list, dict)):
        raise DataError(f"{named}: it holds a {type(held).__name__}. Give a tensor (n, ...), or {_ARGUMENTS}.")
    try:
        return head(moved(checked_inputs(named, held), "cpu", torch.float32), _NUMBER)
    except ConfigError as error:
        raise DataError(str(error)) from error


def _images(model: nn.Module, path: Path) -> pl.LightningDataModule:
    """Images as the model takes them in evaluation."""
    shape = input_shape(model)
    if shape is None:
        raise ConfigError(f"--data: the model does not tell the size of its images. Give --input FILE {_OF}.")
    if not path.exists():
        raise DataError(f"--data={shown(str(path))}: there is no such folder or file.")
    mean, std = normalization_of(model) or (None, None)
    has_splits = path.is_dir() and any((path / name).exists() for name in _SPLITS)
    alone = str(path.absolute())
    return ImageNetDataModule(
        root=str(path) if has_splits else None,
        train_split="train" if has_splits else alone,  # else whatever "train" is in the working directory
        val_split="val" if has_splits else alone,
        img_size=shape[-1],
        mean=mean,
        std=std,
        batch_size=_NUMBER,
        num_workers=0,
        verify_up_to=0,
    )


def _of_module(data: pl.LightningDataModule, model: nn.Module) -> Inputs:
    """The first inputs of the validation data."""
    data.prepare_data()
    data.setup("validate")
    taken: list[Inputs] = []
    loaders = data.val_dataloader()
    for batch in loaders[0] if isinstance(loaders, (list, tuple)) else loaders:
        inputs = checked_inputs("data", _inputs_of(batch, model))
        if taken and not _same_shapes(taken[0], inputs):  # padded to another length
            break
        taken.append(inputs)
        if sum(map(num_rows, taken)) >= _NUMBER:
            break
    if not taken:
        raise DataError(f"data: there is no validation data. Give --data FOLDER of images, or --input FILE {_OF}.")
    return head(concatenated(taken), _NUMBER)


def _inputs_of(batch: Any, model: nn.Module) -> Any:
    """Of a pair the first; of a mapping, what the forward method takes by these names, without labels."""
    if isinstance(batch, Mapping):
        takes = inspect.signature(model.forward).parameters
        inputs = {name: value for name, value in batch.items() if name in takes and not _is_label(name)}
        needs = {name for name, p in takes.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        if not inputs or not needs <= inputs.keys():
            raise ConfigError(
                f"data: a batch is a mapping with {shown(list(batch))}, not (inputs, labels), and {type(model).__name__} takes "
                f"{shown(list(takes))}. Give --input FILE {_OF}."
            )
        return inputs
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, (Tensor, Mapping)):
        raise ConfigError(f"data: a batch is a {type(batch).__name__}, not (inputs, labels). Give --input FILE {_OF}.")
    return inputs


def _is_label(name: str) -> bool:
    """Whether it is what a loss is computed of, by the names that transformers has for it."""
    return "label" in name or name in ("start_positions", "end_positions")


def _same_shapes(inputs: Inputs, others: Inputs) -> bool:
    """But for the number of rows."""
    structures = [pytree.tree_structure(batch) for batch in (inputs, others)]
    shapes = [[tensor.shape[1:] for tensor in batched_tensors(batch)] for batch in (inputs, others)]
    return structures[0] == structures[1] and shapes[0] == shapes[1]
